"""Small models and batches for tests, in every form that an EmbeddingBagCollection takes."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import embsearch_plugin as es
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.randomness import shared_generators
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.streaming.session import StreamSession

DEVICE = torch.device(os.environ.get("EMBSEARCH_TEST_DEVICE", "cpu"))
"""Where models and batches are: that of ``pytest --device``."""

SEARCHES = sorted(name for name, config in algorithms().items() if issubclass(config, SearchConfig))
STREAMS = sorted(name for name, config in algorithms().items() if issubclass(config, StreamConfig))


@dataclass(frozen=True)
class World:
    """A collection to test with, and what its batches look like."""

    tables: tuple[tuple[str, int, int, tuple[str, ...], PoolingType], ...]
    longest_bag: int = 1
    weighted: bool = False
    dtype: DataType = DataType.FP32

    @property
    def rows(self) -> dict[str, int]:
        """Per feature, the fewest rows of a table that reads it."""
        rows: dict[str, int] = {}
        for _, n, _, features, _ in self.tables:
            for feature in features:
                rows[feature] = min(n, rows.get(feature, n))
        return rows

    def collection(self, device: str | None = None) -> EmbeddingBagCollection:
        collection = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=rows,
                    embedding_dim=dim,
                    feature_names=list(features),
                    pooling=pooling,
                    data_type=self.dtype,
                )
                for name, rows, dim, features, pooling in self.tables
            ],
            is_weighted=self.weighted,
            device=torch.device(device) if device else None,
        )
        return collection if device else placed(collection)

    def features(self, batch: int, seed: int, keys: Sequence[str] | None = None) -> KeyedJaggedTensor:
        """Random bags: of one id, or of up to ``longest_bag``, empty ones among them."""
        random = torch.Generator().manual_seed(seed)
        keys = list(keys or sorted(self.rows, reverse=True))
        if self.longest_bag == 1:
            lengths = torch.ones(len(keys) * batch, dtype=torch.int64)
        else:
            lengths = torch.randint(0, self.longest_bag + 1, (len(keys) * batch,), generator=random)
        per_key = lengths.view(len(keys), batch).sum(1).tolist()
        skewed = [torch.rand(n, generator=random) ** 3 * self.rows[key] for key, n in zip(keys, per_key, strict=True)]
        weights = torch.rand(int(lengths.sum()), generator=random) + 0.5 if self.weighted else None
        return KeyedJaggedTensor(keys=keys, values=torch.cat(skewed).long(), lengths=lengths, weights=weights).to(DEVICE)

    def batch(self, batch: int = 32, seed: int = 0) -> Batch:
        random = torch.Generator().manual_seed(seed + 10_000)
        labels = torch.randint(0, 2, (batch,), generator=random).float()
        return Batch(torch.randn(batch, 3, generator=random), self.features(batch, seed), labels).to(DEVICE)


SUM, MEAN = PoolingType.SUM, PoolingType.MEAN
PLAIN = World((("t0", 200, 8, ("f0",), SUM), ("t1", 300, 8, ("f1",), SUM)))
WORLDS = {
    "one id": PLAIN,
    "bags": World(PLAIN.tables, longest_bag=4),
    "mean": World((("t0", 200, 8, ("f0",), MEAN), ("t1", 300, 8, ("f1",), SUM)), longest_bag=5),
    "weighted": World(PLAIN.tables, longest_bag=4, weighted=True),
    "weighted, one id": World(PLAIN.tables, weighted=True),
    "half": World(PLAIN.tables, longest_bag=3, dtype=DataType.FP16),
    "several features": World((("t0", 200, 8, ("f0", "g", "h"), SUM), ("t1", 300, 8, ("f1",), MEAN)), longest_bag=3),
    "shared feature": World((("t0", 200, 8, ("f", "g"), SUM), ("t1", 90, 8, ("f",), MEAN)), longest_bag=3),
    "shared feature, one id": World((("t0", 200, 8, ("f", "g"), SUM), ("t1", 90, 8, ("f",), SUM))),
    "unequal dims": World((("t0", 200, 12, ("f0",), SUM), ("t1", 300, 8, ("f1", "f2"), SUM), ("t2", 5, 4, ("f3",), SUM))),
    "unequal dims, bags": World((("t0", 200, 12, ("f0",), SUM), ("t1", 300, 8, ("f1",), MEAN)), longest_bag=4),
    "odd names": World((("t#0", 200, 8, ("a.b/c @#0", "1"), SUM), ("täble 1", 300, 8, ("0", "f@t#0"), MEAN)), longest_bag=3),
}


class Task(nn.Module):
    """A small train task on any collection, with batch norm and dropout, so that a careless search step shows."""

    def __init__(self, collection: nn.Module, width: int) -> None:
        super().__init__()
        self.collection = collection
        self.over = nn.Sequential(nn.Linear(width + 3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        looked_up: KeyedTensor = self.collection(batch.sparse_features)
        logits = self.over(torch.cat([looked_up.values(), batch.dense_features], 1)).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def placed(model: nn.Module) -> Any:
    """Put a model on the device; one on the meta device stays there."""
    return model if any(p.is_meta for p in model.parameters()) else model.to(DEVICE)


def task(world: World, seed: int = 0) -> Task:
    """Build the train task of a world; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return placed(Task(world.collection(), sum(dim * len(features) for _, _, dim, features, _ in world.tables)))


def dlrm(world: World = PLAIN, seed: int = 0) -> DLRMTrain:
    torch.manual_seed(seed)
    return placed(DLRMTrain(DLRM(world.collection(), 3, [8, 8], [8, 1])))


def train(model: nn.Module, optimizer: Any, batches: Iterable[Batch]) -> list[float]:
    """The user's loop, unchanged by a search."""
    losses = []
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def default_optimizer(world: World) -> Any:
    """Adam; SGD for half precision, where Adam's epsilon is zero."""
    if world.dtype == DataType.FP16:
        return lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return lambda params: torch.optim.Adam(params, lr=0.01)


def searched(
    world: World, steps: int = 12, algorithm: Any = None, budget: str = "40%", optimizer: Any = None, **options: Any
) -> tuple[Task, Any, Any]:
    """Train a world's task with a search beside it; return model, session and optimizer."""
    model = task(world)
    options.setdefault("space", es.SearchSpace(row_blocks=(0.1, 0.3, 0.6)))
    session = es.prepare(model, algorithm=algorithm or es.Dnis(warm_up=2, lr=0.1), budget=budget, **options)
    optimizer = (optimizer or default_optimizer(world))(model.parameters())
    session.attach(optimizer, validation=[world.batch(seed=900 + i) for i in range(3)])
    train(model, optimizer, (world.batch(seed=i) for i in range(steps)))
    return model, session, optimizer


def stored_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers of a model's compact collections."""
    compact = [m for m in model.modules() if isinstance(m, CompactEmbeddingBagCollection)]
    return sum(t.nbytes for m in compact for t in [*m.parameters(), *m.buffers()])


def tables_of(model: Task) -> list[Tensor]:
    """Copy a model's tables."""
    return [p.detach().clone() for p in model.collection.parameters()]


def moved(model: Task, before: list[Tensor]) -> bool:
    """Whether a model's tables are other than they were."""
    return any(not torch.equal(a, b) for a, b in zip(before, model.collection.parameters(), strict=True))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))


def streamed(
    world: World = PLAIN, steps: int = 8, algorithm: Any = "esapn", size: int = 32, **options: Any
) -> tuple[Task, StreamSession, torch.optim.Optimizer]:
    """Train a world's task as a stream; return model, session and optimizer."""
    model = task(world)
    config = algorithms()[algorithm](**STREAMING.get(algorithm, {}), row_lr=0.05) if isinstance(algorithm, str) else algorithm
    session = es.prepare(model, algorithm=config, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[world.batch(size, seed=900 + i) for i in range(3)])
    train(model, optimizer, (world.batch(size, seed=i) for i in range(steps)))
    return model, session, optimizer


STREAMING: dict[str, dict[str, Any]] = {
    "esapn": {"candidates": (1, 3, 8), "hidden": 16, "lr": 0.05, "init_std": 0.5},
    "autoemb": {"candidates": (1, 3), "hidden": 16, "lr": 0.05, "init_std": 0.5},
    "darts": {"candidates": (1, 3), "lr": 0.05, "init_std": 0.5},
    "fixed": {"init_std": 0.5},
}
"""Settings of algorithms on streams, for tables of few columns and few steps."""


FORMED = {
    "spectral": es.Spectral(warm_up=2),
    "nis": es.Nis(warm_up=2, group=8),
    "padding": es.AutoDim(candidates=(2, 4), every=2),
    "linear": es.AutoDim(candidates=(2, 4), every=2, transform="linear", lookup="separate"),
    "sam": es.Sam(candidates=(2, 4)),
}
"""Algorithms whose tables have forms."""


class Around(nn.Module):
    """A user's wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.model(batch)[0]
        return loss


class Told:
    """An observer that notes the steps whose forward passes are announced."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    @es.hookimpl
    def embsearch_before_forward(self, step: int) -> None:
        self.steps.append(step)


def random_state() -> list[Tensor]:
    """The state of every generator that models draw from."""
    return [generator.get_state() for generator in shared_generators()]


def set_random_state(state: Sequence[Tensor]) -> None:
    """Go on from ``state``, once a model is where it was."""
    for generator, each in zip(shared_generators(), state, strict=True):
        generator.set_state(each)
