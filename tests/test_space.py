"""Row blocks and column chunks, against references that count rows one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SpaceError
from embsearch_plugin.space import HALVING, RowBlocks, SearchSpace, TableGroup, cut_tables

SHARES = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda parts: tuple(p / sum(parts) for p in parts))
COUNTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)  # few values, so many ties


def ranked(counts: Sequence[int]) -> list[int]:
    """The rows by falling count; of equal ones, the lower row first."""
    return sorted(range(len(counts)), key=lambda row: (-counts[row], row))


def blocks_of(cut: RowBlocks) -> list[list[int]]:
    return [cut.rows_of(block).tolist() for block in range(len(cut.sizes))]


def table(name: str, rows: int, dim: int = 4) -> Table:
    return Table("bags", name, rows, dim, torch.float32, (name,))


def cut(counts: Sequence[Tensor], space: SearchSpace) -> list[RowBlocks]:
    return cut_tables([table(f"t{n}", len(count)) for n, count in enumerate(counts)], counts, space)


def test_the_default_blocks_halve_from_the_rare_rows_on() -> None:
    assert sum(HALVING) == 1
    assert SearchSpace().cut_rows(1024) == (32, 32, 64, 128, 256, 512)


@pytest.mark.parametrize(
    ("space", "rows", "sizes"),
    [
        pytest.param(SearchSpace(row_blocks=4), 100, (25, 25, 25, 25), id="equal blocks"),
        pytest.param(SearchSpace(row_blocks=np.int64(4)), 100, (25, 25, 25, 25), id="a number from numpy"),
        pytest.param(SearchSpace(row_blocks=(0.1, 0.9)), 1000, (100, 900), id="shares"),
        pytest.param(SearchSpace(row_blocks=[0.1, 0.9]), 1000, (100, 900), id="a list of shares"),
        pytest.param(SearchSpace(row_blocks=1), 7, (7,), id="one block"),
        pytest.param(SearchSpace(), 1, (1,), id="one row"),
        pytest.param(SearchSpace(), 31, (31,), id="too few rows to cut"),
        pytest.param(SearchSpace(row_blocks=2), 32, (16, 16), id="just enough rows to cut"),
        pytest.param(SearchSpace(), 200, (25, 25, 50, 100), id="small blocks are merged"),
        pytest.param(SearchSpace(row_blocks=(0.5, 0.4, 0.1)), 100, (50, 50), id="a small last block is merged too"),
        pytest.param(SearchSpace(row_blocks=6, min_block_rows=1), 3, (1, 1, 1), id="more blocks than rows"),
    ],
)
def test_cut_rows(space: SearchSpace, rows: int, sizes: tuple[int, ...]) -> None:
    assert space.cut_rows(rows) == sizes


@pytest.mark.parametrize(
    ("order", "in_order"),
    [([0, 1, 2, 3, 4, 5], 3), ([0, 1, 2, 3, 5, 4], 2), ([0, 1, 3, 2, 4, 5], 1), ([1, 0, 2, 3, 4, 5], 0)],
)
def test_leading_blocks_whose_rows_are_not_moved(order: list[int], in_order: int) -> None:
    assert RowBlocks((2, 2, 2), torch.tensor(order, dtype=torch.int32)).in_order == in_order


@given(SHARES, st.integers(1, 500), st.integers(1, 40))
def test_rows_are_cut_at_the_shares_where_both_sides_are_large_enough(shares: tuple[float, ...], rows: int, least: int) -> None:
    edges, start = [], 0
    for number in range(1, len(shares)):
        edge = round(rows * sum(shares[:number]))
        if edge - start >= least and rows - edge >= least:
            edges.append(edge)
            start = edge
    expected = [right - left for left, right in zip([0, *edges], [*edges, rows], strict=True)]
    sizes = SearchSpace(row_blocks=shares, min_block_rows=least).cut_rows(rows)
    assert list(sizes) == expected
    assert sum(sizes) == rows
    assert len(sizes) == 1 or min(sizes) >= least


@pytest.mark.parametrize(
    "row_blocks", [0, -3, True, False, 6.0, (), (True,), (0.5, 0.4), (0.6, 0.6, -0.2), (float("nan"), 1.0)]
)
def test_row_blocks_that_make_no_sense(row_blocks: Any) -> None:
    with pytest.raises(SpaceError, match="row_blocks must be a positive number of blocks, or positive shares that sum to 1"):
        SearchSpace(row_blocks=row_blocks)


def test_an_error_shows_the_sum() -> None:
    with pytest.raises(SpaceError, match=r"got \(0.5, 0.4\) \(sum 0.9\). Try 6, or"):
        SearchSpace(row_blocks=(0.5, 0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "model"}, "scope must be 'table' or 'global'; got 'model'"),
        ({"align": 0}, "align and min_block_rows must be at least 1, and whole; got 0 and 16"),
        ({"min_block_rows": 0}, "align and min_block_rows must be at least 1, and whole; got 4 and 0"),
        ({"align": 2.5}, "got 2.5 and 16"),
        ({"align": "4"}, "got '4' and 16"),
        ({"row_blocks": "6"}, "row_blocks must be a positive number of blocks, or positive shares that sum to 1; got '6'"),
    ],
)
def test_other_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(**options)


@pytest.mark.parametrize(
    ("space", "dim", "widths"),
    [
        pytest.param(SearchSpace(), 32, (4, 4, 8, 16), id="halves"),
        pytest.param(SearchSpace(), 4, (4,), id="as narrow as can be"),
        pytest.param(SearchSpace(), 24, (12, 12), id="stops at odd multiples of align"),
        pytest.param(SearchSpace(), 10, (10,), id="a dim that align does not divide"),
        pytest.param(SearchSpace(align=1), 5, (1, 1, 3), id="align 1"),
        pytest.param(SearchSpace(column_chunks=2), 16, (8, 8), id="a number"),
        pytest.param(SearchSpace(column_chunks=np.int32(2)), 16, (8, 8), id="a number from numpy"),
        pytest.param(SearchSpace(column_chunks=4), 12, (4, 4, 4), id="a number of chunks that would be too narrow"),
        pytest.param(SearchSpace(column_chunks=4), 4, (4,), id="as narrow as can be, by number"),
        pytest.param(SearchSpace(column_chunks=4, align=1), 8, (2, 2, 2, 2), id="a number, align 1"),
        pytest.param(SearchSpace(column_chunks=(4, 12)), 16, (4, 12), id="widths"),
        pytest.param(SearchSpace(column_chunks=(np.int64(4), np.int64(12))), 16, (4, 12), id="widths from numpy"),
        pytest.param(SearchSpace(column_chunks=(0.25, 0.75)), 32, (8, 24), id="shares"),
        pytest.param(SearchSpace(column_chunks=(0.1, 0.1, 0.8)), 32, (4, 4, 24), id="shares are rounded to align"),
        pytest.param(SearchSpace(column_chunks=(0.01, 0.09, 0.9)), 16, (16,), id="chunks that round to nothing join the next"),
        pytest.param(SearchSpace(column_chunks=(0.5, 0.5)), 1, (1,), id="shares of one column"),
        pytest.param(SearchSpace(column_chunks=(0.5, 0.5)), 10, (4, 6), id="shares of a dim that align does not divide"),
        pytest.param(SearchSpace(column_chunks=(3, 7)), 10, (3, 7), id="widths of a dim that align does not divide"),
    ],
)
def test_chunk_widths(space: SearchSpace, dim: int, widths: tuple[int, ...]) -> None:
    assert space.chunk_widths(dim) == widths
    assert all(type(width) is int for width in space.chunk_widths(dim))  # they are written as JSON
    assert space.dims(dim) == tuple(sum(widths[:n]) for n in range(len(widths) + 1))


@given(st.integers(1, 300), st.integers(1, 8))
def test_default_chunks_are_aligned_and_the_largest_is_half(dim: int, align: int) -> None:
    space = SearchSpace(align=align)
    widths = space.chunk_widths(dim)
    assert sum(widths) == dim
    assert list(widths) == sorted(widths)
    assert all(d % align == 0 for d in space.dims(dim)[:-1])
    assert len(widths) == 1 or widths[-1] == dim - dim // 2
    smallest = widths[0]
    assert smallest < 2 * align or (smallest // 2) % align  # it could not be halved again


@pytest.mark.parametrize(
    ("column_chunks", "message"),
    [
        (3, "a number that divides the table's dim 16, or the widths; got 3"),
        (0, "got 0"),
        (-2, "got -2"),
        (True, "got True"),
        (2.0, "got 2.0"),
        ((True, 15), r"a positive number of chunks, widths or shares; got \(True, 15\)"),
        ((4, 8), r"must be positive and sum to the table's dim 16; got \(4, 8\) \(sum 12\)"),
        ((20, -4), r"must be positive and sum to the table's dim 16; got \(20, -4\)"),
        ((), r"a positive number of chunks, widths or shares; got \(\)"),
        ("4", "a positive number of chunks, widths or shares; got '4'"),
        ((4.5, 11.5), "widths in columns, or shares that sum to 1; got 4.5"),
        ((-0.5, 1.5), "shares of columns must be positive"),
        ((6, 10), r"must be multiples of align=4; got \(6, 10\)"),
    ],
)
def test_column_chunks_that_make_no_sense(column_chunks: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(column_chunks=column_chunks).chunk_widths(16)


@given(st.lists(COUNTS, min_size=1, max_size=4), SHARES, st.integers(1, 20))
def test_tables_are_ranked_and_cut_one_by_one(counts: list[list[int]], shares: tuple[float, ...], least: int) -> None:
    space = SearchSpace(row_blocks=shares, min_block_rows=least)
    for count, blocks in zip(counts, cut([torch.tensor(c) for c in counts], space), strict=True):
        rows = ranked(count)
        sizes = space.cut_rows(len(count))
        assert blocks_of(blocks) == [rows[sum(sizes[:b]) : sum(sizes[: b + 1])] for b in range(len(sizes))]


@given(st.lists(COUNTS, min_size=1, max_size=4), SHARES, st.integers(1, 20))
def test_all_tables_are_ranked_and_cut_in_one_list(counts: list[list[int]], shares: tuple[float, ...], least: int) -> None:
    space = SearchSpace(row_blocks=shares, scope="global", min_block_rows=least)
    everything = [(-n, table, row) for table, count in enumerate(counts) for row, n in enumerate(count)]
    sizes = space.cut_rows(len(everything))
    expected: list[list[list[int]]] = [[[] for _ in sizes] for _ in counts]
    for place, (_, table, row) in enumerate(sorted(everything)):
        block = next(b for b in range(len(sizes)) if place < sum(sizes[: b + 1]))
        expected[table][block].append(row)
    found = cut([torch.tensor(c) for c in counts], space)
    assert [blocks_of(each) for each in found] == expected  # blocks that hold no row of a table stay, empty


def test_a_group_of_tables_is_cut_in_its_own_way() -> None:
    large = TableGroup(("user*", "bags.movie"), row_blocks=(0.2, 0.8), column_chunks=2)
    space = SearchSpace(row_blocks=1, groups=(large, TableGroup(("*",), row_blocks=2)))
    users, movies, days = (table(name, 100, 16) for name in ("user_id", "movie", "day"))
    assert [blocks.sizes for blocks in cut_tables([users, movies, days], [torch.ones(100)] * 3, space)] == [
        (20, 80),
        (20, 80),
        (50, 50),
    ]
    assert [space.of(each).chunk_widths(16) for each in (users, movies, days)] == [(8, 8), (8, 8), (4, 4, 8)]
    assert SearchSpace().of(users) == SearchSpace()
    space.check([users, movies, days])
    with pytest.raises(SpaceError, match="none is called 'bags.movie'"):
        space.check([users, days])
    with pytest.raises(SpaceError, match="positive shares that sum to 1"):
        SearchSpace(groups=(TableGroup(("*",), row_blocks=(0.2, 0.2)),))
    with pytest.raises(SpaceError, match="groups must be empty where scope is 'global'"):
        SearchSpace(scope="global", groups=(large,))


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.float32, torch.int32)])
def test_counts_of_any_dtype_rank_alike(dtypes: tuple[torch.dtype, ...]) -> None:
    counts = [torch.tensor([1, 5, 3]), torch.tensor([4, 2])]
    space = SearchSpace(row_blocks=(0.4, 0.6), scope="global", min_block_rows=1)
    found = cut([c.to(dtype) for c, dtype in zip(counts, dtypes, strict=True)], space)
    assert [blocks_of(each) for each in found] == [[[1], [2, 0]], [[0], [1]]]
    assert all(each.order.dtype == torch.int32 for each in found)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.randoms())
def test_lookup_is_the_block_of_each_row(sizes: list[int], random: Any) -> None:
    rows = list(range(sum(sizes)))
    random.shuffle(rows)
    cut = RowBlocks(tuple(sizes), torch.tensor(rows, dtype=torch.int32))
    lookup = cut.lookup()
    assert lookup.shape == (sum(sizes),)
    for block, members in enumerate(blocks_of(cut)):
        assert len(members) == sizes[block]
        assert all(lookup[row] == block for row in members)


@pytest.mark.parametrize(
    ("blocks", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_lookup_is_as_small_as_the_number_of_blocks_allows(blocks: int, dtype: torch.dtype) -> None:
    order: Tensor = torch.arange(blocks, dtype=torch.int32).flip(0)
    lookup = RowBlocks((1,) * blocks, order).lookup()
    assert lookup.dtype == dtype
    assert torch.equal(lookup.int(), order)  # the order is its own inverse
