"""The search space: how a table's rows are cut into blocks and its columns into chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate, pairwise
from math import isclose
from numbers import Integral, Real
from operator import index
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SpaceError, did_you_mean

# From the rare rows on, each block holds half of the rows that are left, so that the few rows which fill most of a
# zipf-distributed log are told apart.
HALVING = (1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


RowCut = int | tuple[float, ...]
ColumnCut = int | tuple[int | float, ...]


@dataclass(frozen=True)
class TableGroup:
    """Tables that are cut in a way of their own.

    Args:
        tables: their names, or patterns such as ``"t_user*"``; a table is in the first group that it matches.
        row_blocks: as :class:`SearchSpace` has it; null for what the space says.
        column_chunks: likewise.
    """

    tables: tuple[str, ...]
    row_blocks: RowCut | None = None
    column_chunks: ColumnCut | None = None

    def holds(self, table: Table) -> bool:
        """Whether a table is one of the group's, by its name, or by its name with the collection's path before it."""
        return any(fnmatchcase(name, pattern) for name in (table.name, str(table)) for pattern in self.tables)


@dataclass(frozen=True)
class SearchSpace:
    """Embedding blocks: S row blocks by T column chunks.

    Args:
        row_blocks: a number of equal blocks, or the blocks' shares of the rows, most frequent rows first, summing to one. By
            default the rarest half of the rows is a block, half of the others another, and so on: six; of NIS, five equal ones.
        column_chunks: a number of equal chunks (fewer, where a table is too narrow to cut it into so many), or the chunks'
            widths, summing to the table's dim, or their shares of it, summing to one and rounded to multiples of ``align``
            (a chunk that rounds to nothing joins the next). By default the width is halved again and again, down to
            ``align``: 32 columns are cut into 4, 4, 8 and 16; of NIS, four equal chunks.
        scope: ``"table"`` ranks and cuts the rows of each table; ``"global"`` ranks the rows of all tables in one list
            and cuts that (dnis.txt, 2.3).
        min_block_rows: blocks with fewer rows are merged with their neighbour, so that a tiny table is one block.
        align: stored widths are multiples of it: 4 for FBGEMM's kernels, 1 for plain tables and the papers' dims.
        groups: tables that are cut in a way of their own; ``"global"`` cuts all alike.

    Raises:
        SpaceError: where shares or widths do not add up.
    """

    row_blocks: RowCut | None = None
    column_chunks: ColumnCut | None = None
    scope: Literal["table", "global"] = "table"
    min_block_rows: int = 16
    align: int = 4
    groups: tuple[TableGroup, ...] = ()

    def __post_init__(self) -> None:
        shares = self.shares
        if not shares or not min(shares) > 0 or not isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise SpaceError(
                f"row_blocks must be a positive number of blocks, or positive shares that sum to 1; got {self.row_blocks!r} "
                f"(sum {sum(shares):g}). Try 6, or (0.1, 0.2, 0.7)."
            )
        if self.column_chunks is not None and not (_is_count(self.column_chunks) or _numbers(self.column_chunks)):
            raise SpaceError(
                f"column_chunks must be a positive number of chunks, widths or shares; got {self.column_chunks!r}. Try 4."
            )
        if self.scope not in ("table", "global"):
            raise SpaceError(f"scope must be 'table' or 'global'; got {self.scope!r}.")
        if not _is_count(self.align) or not _is_count(self.min_block_rows):
            raise SpaceError(
                f"align and min_block_rows must be at least 1, and whole; got {self.align!r} and {self.min_block_rows!r}. "
                "Try 4 and 16."
            )
        if self.scope == "global" and self.groups:
            raise SpaceError("groups must be empty where scope is 'global', which cuts the rows of all tables in one list.")
        for group in self.groups:
            self._within(group)

    def of(self, table: Table) -> "SearchSpace":
        """Return how a table is cut: as its group says, where it is in one."""
        group = next((group for group in self.groups if group.holds(table)), None)
        return self if group is None else self._within(group)

    def check(self, tables: Sequence[Table]) -> None:
        """Make sure that every pattern of every group is that of a table, and that columns can be cut as they are to be.

        Raises:
            SpaceError: where one is not, or columns cannot be.
        """
        for pattern in (pattern for group in self.groups for pattern in group.tables):
            if not any(TableGroup((pattern,)).holds(table) for table in tables):
                names = [table.name for table in tables]
                raise SpaceError(
                    f"groups must be of tables of the model; none is called {pattern!r}.{did_you_mean(pattern, names)}"
                )
        for table in tables:
            self.of(table).chunk_widths(table.dim)

    def _within(self, group: TableGroup) -> "SearchSpace":
        rows = self.row_blocks if group.row_blocks is None else group.row_blocks
        columns = self.column_chunks if group.column_chunks is None else group.column_chunks
        return replace(self, row_blocks=rows, column_chunks=columns, groups=())

    @property
    def shares(self) -> tuple[float, ...]:
        """The blocks' shares of the rows."""
        if self.row_blocks is None:
            return HALVING
        if _is_count(self.row_blocks):
            return (1 / index(self.row_blocks),) * index(self.row_blocks)
        return _numbers(self.row_blocks)

    def cut_rows(self, rows: int) -> tuple[int, ...]:
        """Cut ``rows`` ranked rows into blocks; return their sizes (S,), which sum to ``rows``."""
        edges = [round(rows * share) for share in accumulate(self.shares)]
        edges[-1] = rows
        kept = [0]
        for edge in edges[:-1]:
            if edge - kept[-1] >= self.min_block_rows and rows - edge >= self.min_block_rows:
                kept.append(edge)
        kept.append(rows)
        return tuple(right - left for left, right in pairwise(kept))

    def chunk_widths(self, dim: int) -> tuple[int, ...]:
        """Cut ``dim`` columns into chunks; return their widths (T,), which sum to ``dim``."""
        if self.column_chunks is None:
            return _halve(dim, self.align)
        if isinstance(self.column_chunks, Sequence) and isclose(sum(self.column_chunks), 1.0, abs_tol=1e-6):
            return _dealt(dim, self.column_chunks, self.align)
        if isinstance(self.column_chunks, Sequence):
            widths = tuple(_whole(width) for width in self.column_chunks)
        elif _is_count(self.column_chunks) and dim % self.align == 0 and dim < self.column_chunks * self.align:
            widths = (self.align,) * (dim // self.align)
        elif _is_count(self.column_chunks) and dim % self.column_chunks == 0:
            widths = (dim // index(self.column_chunks),) * index(self.column_chunks)
        else:
            raise SpaceError(
                f"column_chunks must be a number that divides the table's dim {dim}, or the widths; got {self.column_chunks!r}."
            )
        if sum(widths) != dim or min(widths) < 1:
            raise SpaceError(
                f"column chunk widths must be positive and sum to the table's dim {dim}; got {widths} (sum {sum(widths)})."
            )
        if any(width % self.align for width in widths) and dim % self.align == 0:
            raise SpaceError(f"column chunk widths must be multiples of align={self.align}; got {widths}.")
        return widths

    def dims(self, dim: int) -> tuple[int, ...]:
        """Candidate dims of a table of width ``dim``: 0 and every sum of leading chunks, ascending."""
        return (0, *accumulate(self.chunk_widths(dim)))


def _is_count(value: object) -> TypeGuard[int]:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) > 0


def _numbers(value: object) -> tuple[float, ...]:
    """Return a sequence of numbers as a tuple; an empty one where it is something else."""
    given = tuple(value) if isinstance(value, Sequence) else ()
    return given if all(isinstance(number, Real) and not isinstance(number, bool) for number in given) else ()


def _whole(width: object) -> int:
    if isinstance(width, Integral):
        return index(width)
    raise SpaceError(f"column chunks are widths in columns, or shares that sum to 1; got {width!r} among widths.")


def _dealt(dim: int, shares: Sequence[float], align: int) -> tuple[int, ...]:
    """Cut ``dim`` columns where the shares end, to the nearest multiple of ``align``."""
    if min(shares) <= 0:
        raise SpaceError(f"shares of columns must be positive; got {tuple(shares)}.")
    ends = [align * round(dim * share / align) for share in accumulate(shares)][:-1]
    edges = sorted({0, *(end for end in ends if end < dim), dim})
    return tuple(right - left for left, right in pairwise(edges))


def _halve(dim: int, align: int) -> tuple[int, ...]:
    widths: list[int] = []
    left = dim
    while left >= 2 * align and (left // 2) % align == 0:
        widths.insert(0, left - left // 2)
        left //= 2
    return (left, *widths)


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """A table's rows, ranked and cut.

    Args:
        sizes: (S,) rows in each block, block 0 holding the most frequent rows; a block may be empty.
        order: int32 (V,), ``order[rank]`` is the row of that rank.
    """

    sizes: tuple[int, ...]
    order: Tensor

    def lookup(self) -> Tensor:
        """Return the block of each row: (V,), uint8 or the smallest larger type that numbers all blocks."""
        dtype = next(t for t in (torch.uint8, torch.int16, torch.int32) if len(self.sizes) <= torch.iinfo(t).max + 1)
        ranked = torch.repeat_interleave(torch.arange(len(self.sizes), dtype=dtype), torch.tensor(self.sizes))
        blocks = torch.empty_like(ranked)
        blocks[self.order.long()] = ranked
        return blocks

    @cached_property
    def in_order(self) -> int:
        """How many leading blocks hold the table's first rows as these stand: where no other row is kept, none is moved."""
        moved = (self.order != torch.arange(self.order.numel(), device=self.order.device)).nonzero()
        first = int(moved[0]) if len(moved) else self.order.numel()
        return sum(end <= first for end in accumulate(self.sizes))

    def rows_of(self, block: int) -> Tensor:
        """Return the rows of a block, most frequent first: int32 (sizes[block],)."""
        start = sum(self.sizes[:block])
        return self.order[start : start + self.sizes[block]]


def cut_tables(tables: Sequence[Table], counts: Sequence[Tensor], space: SearchSpace) -> list[RowBlocks]:
    """Rank the rows of every table by frequency and cut them into blocks.

    Args:
        tables: the tables.
        counts: per table, how often each of its rows occurred, (V,).
        space: where to cut, and whether per table or over all tables together.
    """
    orders = [torch.argsort(count, descending=True, stable=True).int() for count in counts]
    if space.scope == "table":
        sizes = [space.of(table).cut_rows(order.numel()) for table, order in zip(tables, orders, strict=True)]
        return [RowBlocks(size, order) for size, order in zip(sizes, orders, strict=True)]
    return [RowBlocks(size, order) for size, order in zip(_cut_globally(counts, space), orders, strict=True)]


def _cut_globally(counts: Sequence[Tensor], space: SearchSpace) -> list[tuple[int, ...]]:
    """Cut one list of all rows of all tables; return each table's rows in each of the S blocks."""
    merged = torch.argsort(torch.cat([count.flatten() for count in counts]), descending=True, stable=True)
    table_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor([c.numel() for c in counts]))[merged]
    blocks = torch.split(table_of, list(space.cut_rows(merged.numel())))
    per_block = torch.stack([torch.bincount(block, minlength=len(counts)) for block in blocks])
    return [tuple(int(n) for n in column) for column in per_block.t()]
