"""A table whose row blocks each keep the first of its columns, in one order: what that costs, and is worth."""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embsearch_plugin.costs import Unit
from embsearch_plugin.knapsack import Option, TableOptions
from embsearch_plugin.plan import TablePlan

if TYPE_CHECKING:
    from embsearch_plugin.search.tables import SearchTable


class Prefixes:
    """The ways to store one table, whole or block by block.

    Args:
        table: the table, and how its rows are cut.
        worth: what each (block, column) pair is worth, float64 (S, D).
        dims: how many columns a block may keep, ascending, from none to all.
        projection: whether the columns are those of a new basis, by falling worth already, which a projection leads back from;
            otherwise they are the table's own.

    Attributes:
        order: the columns as they are kept, by falling worth.
        worth: (S, D), in that order.
    """

    def __init__(self, table: "SearchTable", worth: Tensor, dims: Sequence[int], projection: bool = False) -> None:
        self.table, self.dims, self.projection = table, dims, projection
        whole = worth.sum(0)
        self.order: list[int] = (
            list(range(len(whole))) if projection else torch.argsort(whole, descending=True, stable=True).tolist()
        )
        self.worth = worth[:, self.order]

    def ways(self, unit: Unit) -> list[TableOptions]:
        """Return the ways to store the table, what it costs in each, and what it is worth then.

        It is stored as one block, or block by block. Then a remap is paid, unless rows stay where they are, and the columns'
        places are, unless every block keeps all columns or none.
        """
        spec, blocks = self.table.spec, self.table.blocks
        natural = self.projection or self.order == list(range(spec.dim))
        placement = 0 if natural else unit.placement(spec)
        column = unit.projected_column(spec) if self.projection else 0
        uniform = [
            Option(o.dim, o.cost + column * o.dim + (placement if o.dim not in (0, spec.dim) else 0), o.utility)
            for o in self._options(self.worth.sum(0), sum(blocks.sizes), unit)
        ]
        ways = [TableOptions(str(spec), tuple(uniform))]
        if len(blocks.sizes) == 1:
            return ways
        of_blocks = [self._options(worth, size, unit) for worth, size in zip(self.worth, blocks.sizes, strict=True)]
        remap = unit.remap(spec)
        orders = [(len(of_blocks), False)]  # how many leading blocks may keep columns, and whether their dims must fall
        if remap and blocks.in_order:
            orders.append((blocks.in_order, True))
        menus = [self.dims, (0, spec.dim)] if placement else [self.dims]
        for (leading, falling), menu in product(orders, menus):
            kept = [menu] * leading + [(0,)] * (len(of_blocks) - leading)
            options = [tuple(o for o in each if o.dim in dims) for each, dims in zip(of_blocks, kept, strict=True)]
            fixed = (0 if falling else remap) + (placement if menu is self.dims else 0)
            ways.append(TableOptions(str(spec), (), tuple(options), fixed, column, falling))
        return ways

    def _options(self, worth: Tensor, rows: int, unit: Unit) -> tuple[Option, ...]:
        kept = torch.nn.functional.pad(worth.cumsum(0), (1, 0)).tolist()
        return tuple(Option(dim, unit.weights(self.table.spec, rows * dim), kept[dim]) for dim in self.dims)

    def at_least(self, needed: Sequence[int]) -> tuple[int, ...]:
        """Return the smallest dim of each block that keeps as many columns as it needs."""
        return tuple(next(dim for dim in self.dims if dim >= need) for need in needed)

    def plan(self, dims: Sequence[int]) -> TablePlan:
        """Build the table's plan from one dim for all blocks, or one for each."""
        blocks = self.table.blocks
        rows = [blocks.rows_of(block) for block in range(len(blocks.sizes))]
        columns = None if self.projection else self.order
        return TablePlan.nested(self.table.spec, self._per_block(dims), rows, columns, projection=self.projection)

    def mask(self, dims: Sequence[int]) -> Tensor:
        """Return one where a (block, column) pair is kept, zero elsewhere: (S, D)."""
        mask = torch.zeros(self.worth.shape)
        for block, dim in enumerate(self._per_block(dims)):
            mask[block, self.order[:dim]] = 1
        return mask

    def _per_block(self, dims: Sequence[int]) -> list[int]:
        return list(dims) if len(dims) > 1 else list(dims) * len(self.table.blocks.sizes)
