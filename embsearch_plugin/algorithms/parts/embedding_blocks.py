"""Embedding blocks: which of a table's S x T blocks take part, what that costs, and the plan of it (nis.txt, 3.3.1).

What takes part is written as heights: chunk t of the columns is kept for the first ``heights[t]`` row blocks, the most frequent
ones, and for none where that is 0. A single-size embedding (s, t) has the height s in t chunks; a multi-size one a height per
chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from typing import Literal

import torch
from torch import Tensor

from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.knapsack import Option, TableOptions
from embsearch_plugin.plan import TablePlan
from embsearch_plugin.space import RowBlocks

Mode = Literal["se", "me"]


@cache
def menu(n_rows: int, n_chunks: int, mode: Mode) -> Tensor:
    """Return what a controller chooses among for a table of S x T blocks: int64 (choices, arms, T), heights.

    The table's heights are the sum of those of the chosen arms. The first arm is nothing, the last everything. ``"se"``: one
    choice among (0, 0) and the S x T pairs (s, t). ``"me"``: T choices, each of an s from 0 to S for one chunk.
    """
    if mode == "me":
        return torch.arange(n_rows + 1)[:, None] * torch.eye(n_chunks, dtype=torch.int64)[:, None]
    pairs = [(0, 0), *product(range(1, n_rows + 1), range(1, n_chunks + 1))]
    return torch.tensor([[[s if chunk < t else 0 for chunk in range(n_chunks)] for s, t in pairs]])


@dataclass(frozen=True)
class EmbeddingBlocks:
    """A table cut into S row blocks and T column chunks.

    Args:
        spec: the table.
        rows: (S,), the row blocks' sizes, most frequent rows first.
        widths: (T,), the column chunks' widths.
    """

    spec: Table
    rows: tuple[int, ...]
    widths: tuple[int, ...]

    def menu(self, mode: Mode) -> Tensor:
        """Return the arms of each choice: int64 (choices, arms, T)."""
        return menu(len(self.rows), len(self.widths), mode)

    def kept(self, heights: Tensor) -> Tensor:
        """Return which blocks take part, (..., T) to bool (..., S, T)."""
        return heights.unsqueeze(-2) > torch.arange(len(self.rows), device=heights.device)[:, None]

    def gates(self, heights: Tensor) -> Tensor:
        """Return the gates of what takes part, (..., T) to float32 (..., S, D)."""
        widths = torch.tensor(self.widths, device=heights.device)
        return self.kept(heights).float().repeat_interleave(widths, -1, output_size=self.spec.dim)

    def n_weights(self, heights: Tensor) -> Tensor:
        """Return the memory cost C, the number of weights: sum over t of d_t x V_{s_t}, (..., T) to int64 (...)."""
        rows = torch.tensor([0, *accumulate(self.rows)], device=heights.device)
        return (rows[heights] * torch.tensor(self.widths, device=heights.device)).sum(-1)

    def ways(self, arms: Tensor, worth: Tensor, unit: Unit, in_order: int) -> list[TableOptions]:
        """Offer every arm of every choice, in the ways in which a table can be stored.

        One that keeps nothing is free, and one that keeps everything is stored projected. Others pay their rows of the
        projection, and a remap besides, unless each chunk keeps all rows or none, or all rows that are kept stand in order.

        Args:
            arms: (choices, arms, T), the menu.
            worth: (choices, arms), what each is worth.
            unit: what costs are counted in, as the budget's.
            in_order: how many leading blocks hold rows that stand in order.
        """
        options = [
            [Option(arm, *pair) for arm, pair in enumerate(zip(costs, values, strict=True))]
            for costs, values in zip(self._costs(arms, unit).tolist(), worth.tolist(), strict=True)
        ]
        last, size = arms.shape[1] - 1, unit.weights(self.spec, self.spec.n_params)
        ends = Option(0, 0, float(worth[:, 0].sum())), Option(last, size, float(worth[:, last].sum()))
        rows = torch.tensor([0, *accumulate(self.rows)])[arms]
        unmapped = [((rows == 0) | (rows == self.spec.rows)).all(-1)]
        if in_order:
            unmapped.append((arms <= in_order).all(-1))
        ways = [TableOptions(str(self.spec), ends)]
        for free in unmapped:
            kept = zip(options, free.tolist(), strict=True)
            ways.append(TableOptions(str(self.spec), (), tuple(tuple(o for o in each if f[o.dim]) for each, f in kept)))
        if not any(bool(free.all()) for free in unmapped):
            ways.append(TableOptions(str(self.spec), (), tuple(map(tuple, options)), unit.remap(self.spec)))
        return ways

    def _costs(self, heights: Tensor, unit: Unit) -> Tensor:
        """Return what weights and their rows of the projection cost, (..., T) to int64 (...)."""
        columns = ((heights > 0) * torch.tensor(self.widths)).sum(-1)
        return self.n_weights(heights) * unit.weights(self.spec, 1) + columns * unit.projected_column(self.spec)

    def plan(self, heights: Tensor, blocks: RowBlocks) -> TablePlan:
        """Return the plan that keeps what takes part, (T,): chunks of many rows first, then the projection.

        What keeps everything needs no projection: its rows are stored projected.
        """
        dims = (self.kept(heights) * torch.tensor(self.widths)).sum(1).tolist()
        rows = [blocks.rows_of(block) for block in range(len(self.rows))]
        whole = bool((heights == len(self.rows)).all())
        return TablePlan.nested(self.spec, dims, rows, list(self._columns(heights)), projection=not whole)

    def _columns(self, heights: Tensor) -> Iterator[int]:
        """Yield the columns, chunk by chunk, by falling height: every block then keeps the first of them."""
        ends = list(accumulate(self.widths))
        for chunk in torch.argsort(heights, descending=True, stable=True).tolist():
            yield from range(ends[chunk] - self.widths[chunk], ends[chunk])
