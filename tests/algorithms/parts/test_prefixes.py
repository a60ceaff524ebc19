"""Row blocks that each keep the first columns: the allocation against every plan there is, and its bytes."""

from itertools import product

import pytest
import torch
from torch import Tensor

import embsearch_plugin as es
from embsearch_plugin.algorithms.parts.prefixes import Prefixes
from embsearch_plugin.algorithms.parts.pruning import best_pairs
from embsearch_plugin.collection import Table
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.search.tables import SearchTable
from embsearch_plugin.space import RowBlocks

DIMS = (0, 2, 6)
SPACE = es.SearchSpace(column_chunks=(2, 4), align=2)


def ordered(rows: int, how: str) -> Tensor:
    """Rows by falling frequency: as they stand, with those of the last block shuffled, or all of them."""
    first = {"ranked": rows, "first blocks ranked": 2 * rows // 3, "unranked": 0}[how]
    return torch.cat([torch.arange(first), first + torch.randperm(rows - first)]).int()


def prefixes(rows: int, how: str, *, falling: bool) -> Prefixes:
    """A table of three row blocks and six columns, whose worth falls from block to block, or does not."""
    third = rows // 3
    blocks = RowBlocks((third, third, rows - 2 * third), ordered(rows, how))
    worth = torch.rand(3, 6, dtype=torch.float64) * (torch.tensor([[9.0], [3.0], [1.0]]) if falling else 1)
    return Prefixes(SearchTable(Table("c", f"t{rows}", rows, 6, torch.float32, ("f",)), blocks), worth, DIMS)


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("how", ["ranked", "first blocks ranked", "unranked"])
def test_the_plan_is_the_best_of_all_that_fit(how: str, falling: bool) -> None:
    """By brute force: every plan is built, and its bytes are counted."""
    tables = [prefixes(30, how, falling=falling), prefixes(12, how, falling=falling)]
    worths = []
    for each in tables:  # in the order of the original columns
        worth = torch.empty_like(each.worth)
        worth[:, each.order] = each.worth
        worths.append(worth)
    every = [[(each, dims, each.plan(dims).size_bytes) for dims in product(DIMS, repeat=3)] for each in tables]
    for limit in range(40, 1000, 60):
        fitting = [(a, b) for a, b in product(*every) if a[2] + b[2] <= limit]
        best = max(sum(kept(each, dims) for each, dims, _ in pair) for pair in fitting)
        plan = best_pairs([each.table for each in tables], worths, es.Budget(bytes=limit), SPACE)
        assert plan.size_bytes <= limit
        assert sum(kept(each, dims_of(each, plan, number)) for number, each in enumerate(tables)) == pytest.approx(best)


def kept(each: Prefixes, dims: tuple[int, ...]) -> float:
    return sum(float(worth[:dim].sum()) for worth, dim in zip(each.worth, dims, strict=True))


def dims_of(each: Prefixes, plan: SizePlan, number: int) -> tuple[int, ...]:
    """The dims of a plan's table, by row block: that of the block's first row."""
    table = plan.tables[number]
    order = torch.arange(table.table.rows) if table.order is None else table.order.long()
    placed = torch.cat([torch.full((block.rows,), int(block.dim)) for block in table.blocks])
    dims = torch.zeros(table.table.rows, dtype=torch.int64).index_copy(0, order, placed[: len(order)])
    return tuple(int(dims[each.table.blocks.rows_of(block)[0]]) for block in range(3))
