"""Times of steps and lookups, taken in turn, so that whatever else the machine does meets all of them alike."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embsearch_plugin.bench.workload import FOUR_WIDTHS, FUSED, TWO_WIDTHS, Workload
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.compact.rewrite import compact_form
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.machine import clock
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.space import cut_tables

Step = Callable[[Batch], object]


@dataclass(frozen=True)
class Row:
    """One thing measured, and what it is compared with.

    Args:
        measured, baseline: what was timed.
        bag: ids per bag.
        milliseconds, baseline_milliseconds: medians.
        target: the ratio wanted, if any.
    """

    measured: str
    baseline: str
    bag: int
    milliseconds: float
    baseline_milliseconds: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        """How many times the baseline's time it takes."""
        return self.milliseconds / self.baseline_milliseconds

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "ratio": self.ratio}


def medians(steps: Mapping[str, Step], batches: Sequence[Batch], repeats: int) -> dict[str, float]:
    """Return each step's median milliseconds; every step is taken once on every batch before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-len(batches), repeats):
        for name, step in steps.items():
            started = clock()
            step(batches[number % len(batches)])
            if number >= 0:
                times[name].append(1000 * (clock() - started))
    return {name: statistics.median(taken) for name, taken in times.items()}


class Trainer:
    """The training step of a model; the optimizer of what is not fused is SGD."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def __call__(self, batch: Batch) -> None:
        """Train on a batch."""
        self.optimizer.zero_grad()
        self.model(batch)[0].backward()
        self.optimizer.step()


def model_steps(work: Workload, repeats: int) -> list[Row]:
    """Measure whole steps of the DLRM: of a search, and of the compact model with two widths."""
    batches, plain = work.batches(), Trainer(work.baseline())
    model, session = work.searched()
    weight_step = Trainer(model)
    weight_step(batches[0])  # ids are counted, so that rows can be ranked
    before = medians({"plain": plain, "weight step": weight_step, "search step": session.step}, batches, repeats)
    session.compact(work.plan(TWO_WIDTHS), weight_step.optimizer)
    after = medians({"plain": plain, "compact": weight_step}, batches, repeats)
    baseline = f"plain step: {work.kernels}, {'row-wise Adagrad' if work.fused else 'SGD'}"
    targets = {"weight step": 1.15 if work.bag == 1 else 1.7, "search step": 1.0, "compact training step": 1.1}
    times = {**before, "compact training step": after["compact"]}
    baselines = {"compact training step": after["plain"]}
    return [
        Row(
            name,
            baseline,
            work.bag,
            times[name],
            baselines.get(name, before["plain"]),
            target if work.fused else None,
        )
        for name, target in targets.items()
    ]


def lookups(work: Workload, repeats: int) -> list[Row]:
    """Measure the compact lookup alone, forward and in training, beside one table of width D per feature."""
    batches = work.batches()
    collections: dict[str, nn.Module] = {
        "uniform": uniform(work),
        "two widths": compact(work, TWO_WIDTHS),
        "four widths": compact(work, FOUR_WIDTHS),
    }
    rows = []
    for kind, wrap, targets in (("forward", forward, (1.7, None)), ("training", forward_and_backward, (1.55, None))):
        found = medians({name: wrap(module) for name, module in collections.items()}, batches, repeats)
        for name, target in zip(("two widths", "four widths"), targets if work.fused else (None, None), strict=True):
            baseline = f"uniform {work.kernels}, {kind}"
            rows.append(Row(f"compact lookup, {name}, {kind}", baseline, work.bag, found[name], found["uniform"], target))
    return rows


def uniform(work: Workload) -> nn.Module:
    """Return the DLRM's collection, on fused kernels where the work is."""
    kind = FusedEmbeddingBags if work.fused else EmbeddingBagCollection
    return next(module for module in work.baseline().modules() if isinstance(module, kind))


def compact(work: Workload, widths: tuple[tuple[float, float], ...]) -> CompactEmbeddingBagCollection:
    """Return the DLRM's collection in its compact form, on the same kernels."""
    collection = compact_form(find_collections(work.model())[0], work.plan(widths).tables, training=True)
    if work.fused:
        collection.fuse(FUSED)
    return collection


def forward(collection: nn.Module) -> Step:
    """Return the lookup without gradients."""

    def step(batch: Batch) -> None:
        with torch.no_grad():
            collection(batch.sparse_features).values()

    return step


def forward_and_backward(collection: nn.Module) -> Step:
    """Return the lookup with its update by a gradient of ones; plain tables get the gradient, and no update."""

    def step(batch: Batch) -> None:
        collection.zero_grad()
        values = collection(batch.sparse_features).values()
        values.backward(torch.ones_like(values))

    return step


def growth(work: Workload, repeats: int) -> dict[str, float]:
    """Return milliseconds of the plain step, of what a search adds, and of ranking the rows once."""
    batches, plain = work.batches(), Trainer(work.baseline())
    model, session = work.searched()
    weight_step = Trainer(model)
    weight_step(batches[0])
    found = medians({"plain": plain, "weight": weight_step, "search": session.step}, batches, repeats)
    started = clock()
    cut_tables(session.specs, session.frequencies, session.space)
    ranking = 1000 * (clock() - started)
    added = found["weight"] - found["plain"]
    return {"plain step": found["plain"], "added to a weight step": added, "search step": found["search"], "ranking": ranking}
