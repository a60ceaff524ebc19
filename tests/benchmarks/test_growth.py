"""What a search and a compact model add to a step does not grow with the number of rows.

Not timed, but seen: every operation of a step is recorded with the shapes of what it returns. They must be the same for
tables a hundred times as large.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.datasets.utils import Batch

from embsearch_plugin.bench.timing import Step, Trainer
from embsearch_plugin.bench.workload import Workload
from embsearch_plugin.collection import Table
from embsearch_plugin.plan import SizePlan, TablePlan

FEW, MANY = 1_000, 100_000
IN_PLACE = ("aten.index_add_.default",)  # of the ids' counts: returns the counts, of which it changes the ids' only


class Recorder(TorchDispatchMode):
    """Records each operation and the shapes of what it returns; views are not work."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if not func.is_view and str(func) not in IN_PLACE:
            self.seen.append((str(func), [tuple(t.shape) for t in tree_leaves(returned) if isinstance(t, Tensor)]))
        return returned


def operations(step: Step, batch: Batch) -> list[tuple[str, list[tuple[int, ...]]]]:
    with Recorder() as recorder:
        step(batch)
    return recorder.seen


def plan(tables: Sequence[Table]) -> SizePlan:
    """The same rows at full width however many there are, not in their own order, so that there is a remap."""
    hot = torch.arange(FEW // 5, dtype=torch.int32).flip(0)
    plans = (
        TablePlan.nested(table, [table.dim, 4], [hot, torch.arange(FEW // 5, table.rows, dtype=torch.int32)])
        for table in tables
    )
    return SizePlan(tuple(plans))


def steps_on(rows: int, bag: int) -> dict[str, list[tuple[str, list[tuple[int, ...]]]]]:
    work = Workload(tables=3, rows=rows, dim=16, batch=64, bag=bag)
    batch = work.alike(rows=FEW).batches(1)[0]  # the same ids for all
    model, session = work.searched()
    train = Trainer(model)
    for _ in range(4):  # rows are ranked in the first, second and fourth of these search steps, and not in the next
        train(batch)
        session.step(batch)
    seen = {"weight": operations(train, batch), "search": operations(session.step, batch)}
    session.compact(plan(session.specs), train.optimizer)
    train(batch)
    return seen | {"compact": operations(train, batch)}


@pytest.mark.parametrize("bag", [1, 4])
def test_operations_do_not_know_the_number_of_rows(bag: int) -> None:
    few, many = steps_on(FEW, bag), steps_on(MANY, bag)
    for kind, seen in few.items():
        assert any("fbgemm" in name for name, _ in seen), kind
        assert seen == many[kind], kind


def test_an_operation_over_all_rows_is_seen() -> None:
    assert operations(lambda _: torch.zeros(FEW).add_(1), None) != operations(lambda _: torch.zeros(MANY).add_(1), None)
