"""What a search and a compact model cost: steps of a DLRM beside the plain DLRM's, taken in turn in one run.

Every ratio is to the training step of the plain model on the same FBGEMM kernels with the same optimizer.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.algorithms.dnis import Dnis
from embsearch_plugin.data.dataset import Field, Schema
from embsearch_plugin.decorator import prepare
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.models import Dlrm
from embsearch_plugin.plugins import find_collections

FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
SKEW = 8  # ids are V * u ** SKEW for uniform u: the first 1 % of the rows get over half of the lookups


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Args:
        tables: number of tables, one feature each.
        rows: V of each.
        dim: D of each.
        batch: B.
        repeats: steps of each kind; their median counts.
        budget: of the compact model.
    """

    tables: int = 26
    rows: int = 100_000
    dim: int = 32
    batch: int = 4096
    repeats: int = 12
    budget: str = "25%"

    def schema(self) -> Schema:
        """The fields, and as many numbers as Criteo has."""
        return Schema(tuple(Field(f"f{i}", self.rows) for i in range(self.tables)), tuple(f"n{i}" for i in range(13)))

    def batches(self, bag: int) -> list[Batch]:
        """Four batches of bags of one id, or of ``bag`` on average."""
        return [self._batch(bag, seed) for seed in range(4)]

    def _batch(self, bag: int, seed: int) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        bags = self.tables * self.batch
        lengths = torch.ones(bags, dtype=torch.int64) if bag == 1 else torch.randint(1, 2 * bag, (bags,), generator=draw)
        ids = (torch.rand(int(lengths.sum()), generator=draw) ** SKEW * self.rows).long()
        features = KeyedJaggedTensor([f"f{i}" for i in range(self.tables)], ids, lengths=lengths)
        labels = torch.randint(0, 2, (self.batch,), generator=draw).float()
        return Batch(torch.randn(self.batch, 13, generator=draw), features, labels)

    def model(self) -> nn.Module:
        """A DLRM in its train task."""
        torch.manual_seed(0)
        return Dlrm(embedding_dim=self.dim).build(self.schema())


def ratios(bench: Bench, bag: int) -> dict[str, float]:
    """Return, per kind of step, its median time over that of the plain model's training step."""
    plain, searched, batches = bench.model(), bench.model(), bench.batches(bag)
    for found in find_collections(plain):
        found.replace_in(plain, FusedEmbeddingBags(found.module, FUSED))
    session = prepare(searched, algorithm=Dnis(warm_up=0), budget=bench.budget, fused=FUSED)
    train_plain, train_searched = _trainer(plain), _trainer(searched)
    for batch in batches:
        train_plain(batch)
        train_searched(batch)
    session.step(batches[0])
    before = _medians([train_plain, train_searched, session.step], batches, bench.repeats)
    session.compact(session.derive())
    after = _medians([train_plain, _trainer(searched)], batches, bench.repeats)
    return {"weight step": before[1] / before[0], "search step": before[2] / before[0], "compact step": after[1] / after[0]}


def _trainer(model: nn.Module) -> Callable[[Batch], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()

    return step


def _medians(steps: Sequence[Callable[[Batch], object]], batches: Sequence[Batch], repeats: int) -> list[float]:
    """Take the steps in turn, so that whatever else the machine does meets all of them alike."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats):
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step(batches[repeat % len(batches)])
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]
