"""Kernels and whole steps in small, each group led by its baseline. Measured only with ``--benchmark-enable``.

embsearch bench                                 # the full sizes, and memory
pytest tests/benchmarks --benchmark-enable      # these
"""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch

from embsearch_plugin.bench.timing import Step, Trainer, compact, forward, forward_and_backward, uniform
from embsearch_plugin.bench.workload import DENSE, FOUR_WIDTHS, SPARSE, TBE, TWO_WIDTHS, Workload

WORKS = {bag: Workload(tables=8, rows=20_000, batch=512, bag=bag) for bag in (1, 10)}
LOOKUPS = {"uniform": None, "two widths": TWO_WIDTHS, "four widths": FOUR_WIDTHS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(benchmark: Any, step: Step, work: Workload) -> None:
    batches = cycle(work.batches())
    step(next(batches))  # the first step builds kernels
    benchmark(lambda: step(next(batches)))


def step_of(kind: str, work: Workload) -> Step:
    if kind == "plain training step":
        return Trainer(work.baseline())
    model, session = work.searched()
    weight_step = Trainer(model)
    weight_step(work.batches(1)[0])
    session.step(work.batches(1)[0])
    if kind == "search step":
        return session.step
    if kind == "compact training step":
        session.compact(work.plan(TWO_WIDTHS), weight_step.optimizer)
    return weight_step


@pytest.mark.parametrize("kind", ["plain training step", "weight step", "search step", "compact training step"])
@pytest.mark.parametrize("kernels", [TBE, SPARSE])
@pytest.mark.parametrize("bag", WORKS)
def test_whole_steps(benchmark: Any, bag: int, kernels: str, kind: str) -> None:
    benchmark.group = f"DLRM, bags of {bag}, {kernels}"
    work = WORKS[bag].alike(kernels=kernels)
    run(benchmark, step_of(kind, work), work)


@pytest.mark.parametrize("form", LOOKUPS)
@pytest.mark.parametrize("kind", ["forward", "training"])
@pytest.mark.parametrize("kernels", [TBE, SPARSE, DENSE])
@pytest.mark.parametrize("bag", WORKS)
def test_lookups(benchmark: Any, bag: int, kernels: str, kind: str, form: str) -> None:
    benchmark.group = f"lookup, bags of {bag}, {kind}, {kernels}"
    work, widths = WORKS[bag].alike(kernels=kernels), LOOKUPS[form]
    collection = uniform(work) if widths is None else compact(work, widths)
    run(benchmark, (forward if kind == "forward" else forward_and_backward)(collection), work)
