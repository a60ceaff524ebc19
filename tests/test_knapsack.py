"""The knapsack against every possible choice."""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import AllocationError, BudgetError
from embsearch_plugin.knapsack import Option, TableOptions, allocate, allocate_among


def choices(table: TableOptions) -> Iterator[tuple[tuple[int, ...], int, float]]:
    """Every way to store a table: its dims, cost and utility."""
    for option in table.uniform:
        yield (option.dim,), option.cost, option.utility
    if table.blocks:
        for chosen in product(*table.blocks):
            if table.falling and any(after.dim > before.dim for before, after in pairwise(chosen)):
                continue
            cost = table.fixed_cost + sum(o.cost for o in chosen) + table.column_cost * max(o.dim for o in chosen)
            yield tuple(o.dim for o in chosen), cost, sum(o.utility for o in chosen)


def best(tables: Sequence[TableOptions], limit: int) -> float | None:
    """The greatest utility within the limit, of all there are."""
    totals = [(0, 0.0)]
    for table in tables:
        totals = [(c + cost, u + utility) for c, u in totals for _, cost, utility in choices(table) if c + cost <= limit]
    return max((utility for _, utility in totals), default=None)


def outcome(tables: Sequence[TableOptions], dims: Sequence[tuple[int, ...]]) -> tuple[int, float]:
    """The cost and utility of what was chosen."""
    found = [next((c, u) for d, c, u in choices(t) if d == chosen) for t, chosen in zip(tables, dims, strict=True)]
    return sum(cost for cost, _ in found), sum(utility for _, utility in found)


@st.composite
def instances(draw: st.DrawFn, largest: int) -> tuple[list[TableOptions], int]:
    """Up to three tables, and a limit that is often exactly what some choice costs, or one less."""
    utility = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e6, allow_subnormal=False))
    dims = (0, 4, 8)[: draw(st.integers(1, 3))]
    tables = []
    for number in range(draw(st.integers(1, 3))):
        blocks = []
        for rows in draw(st.lists(st.integers(1, largest), min_size=2, max_size=3)):
            gains = draw(st.lists(utility, min_size=len(dims) - 1, max_size=len(dims) - 1))
            odd = draw(st.integers(0, 3))  # costs that differ by next to nothing
            worth = accumulate([0.0, *gains])
            blocks.append(tuple(Option(d, rows * d + (odd if d else 0), u) for d, u in zip(dims, worth, strict=True)))
        uniform = [Option(d, sum(b[i].cost for b in blocks), sum(b[i].utility for b in blocks)) for i, d in enumerate(dims)]
        fixed = draw(st.sampled_from([0, 1, largest]))
        whole, column = draw(st.booleans()), draw(st.sampled_from([0, 0, 1, largest]))
        by_block = (tuple(blocks), fixed, column, draw(st.booleans()))
        tables.append(TableOptions(f"t{number}", tuple(uniform), *(() if whole else by_block)))
    exact = sum(draw(st.sampled_from(list(choices(table))))[1] for table in tables)
    return tables, draw(st.sampled_from([exact, exact - 1, draw(st.integers(0, 10 * largest))]))


@pytest.mark.parametrize("largest", [50, 10**6, 10**11])
@settings(max_examples=300)
@given(st.data())
def test_no_choice_within_the_limit_is_worth_more(largest: int, data: st.DataObject) -> None:
    """To the byte up to a million bytes; above, what a millionth of the limit more could buy may be missed."""
    tables, limit = data.draw(instances(largest))
    if best(tables, limit) is None:
        with pytest.raises(BudgetError, match="no size plan fits"):
            allocate(tables, limit)
        return
    cost, utility = outcome(tables, allocate(tables, limit))
    assert cost <= limit
    assert utility >= (best(tables, limit - limit // 10**6) or 0.0) * (1 - 1e-6)


@settings(max_examples=300)
@given(st.data())
def test_the_best_of_several_ways_to_store_a_table(data: st.DataObject) -> None:
    first, limit = data.draw(instances(50))
    second, _ = data.draw(instances(50))
    tables = list(zip(first, second, strict=False))  # as many as both have
    totals = [(0, 0.0)]
    for ways in tables:
        found = [(cost, utility) for way in ways for _, cost, utility in choices(way)]
        totals = [(c + cost, u + utility) for c, u in totals for cost, utility in found if c + cost <= limit]
    if not totals:
        with pytest.raises(BudgetError, match="no size plan fits"):
            allocate_among(tables, limit)
        return
    chosen = allocate_among(tables, limit)
    cost, utility = outcome([ways[way] for ways, (way, _) in zip(tables, chosen, strict=True)], [dims for _, dims in chosen])
    assert cost <= limit
    assert utility >= max(utility for _, utility in totals) * (1 - 1e-6)


def test_columns_are_paid_for_once_by_all_blocks() -> None:
    blocks = tuple((Option(0, 0, 0.0), Option(4, 40, 5.0), Option(8, 80, 7.0)) for _ in range(3))
    columns = TableOptions("a", (Option(0, 0, 0.0),), blocks, 0, 10)
    assert allocate([columns], 3 * 40 + 40) == [(4, 4, 4)]
    assert sorted(allocate([columns], 3 * 40 + 39)[0]) == [0, 4, 4]
    assert sorted(allocate([columns], 2 * 40 + 80 + 80)[0]) == [4, 4, 8]


def table(name: str, rows: int, utilities: Sequence[float], dims: Sequence[int] = (0, 4, 8)) -> TableOptions:
    """A table of one block."""
    return TableOptions(name, tuple(Option(d, rows * d, u) for d, u in zip(dims, utilities, strict=True)))


@pytest.mark.parametrize("rows", [1, 10**6, 10**12])
def test_a_limit_that_is_exactly_met(rows: int) -> None:
    tables = [table("a", rows, (0, 1, 2)), table("b", rows, (0, 1, 2))]
    assert allocate(tables, 12 * rows) in ([(8,), (4,)], [(4,), (8,)])
    assert sorted(allocate(tables, 12 * rows - 1)) in ([(0,), (8,)], [(4,), (4,)])


def test_one_byte_over_the_limit_is_too_much_however_large_the_limit() -> None:
    tables = [
        TableOptions("huge", (Option(0, 0, 0.0), Option(8, 10**12, 10.0))),
        TableOptions("tiny", (Option(0, 0, 0.0), Option(4, 1, 1.0))),
    ]
    assert allocate(tables, 10**12) == [(8,), (0,)]
    assert allocate(tables, 10**12 + 1) == [(8,), (4,)]


def test_what_cannot_be_afforded_does_not_blur_what_can() -> None:
    tables = [table("vast", 10**9, (0, 1e12, 2e12)), table("a", 10, (0, 3e-3, 4e-3)), table("b", 10, (0, 1e-3, 5e-3))]
    assert allocate(tables, 80) == [(0,), (0,), (8,)]


def test_the_cheapest_of_equal_worth_is_taken() -> None:
    blocks = tuple(tuple(Option(d, 10 * d, 5.0 * (d > 0)) for d in (8, 4, 0)) for _ in range(3))
    dear = TableOptions("a", (Option(0, 0, 0.0), Option(8, 10**6, 15.0)), blocks, 40)
    assert allocate([dear, table("b", 10, (0, 0, 0))], 10**5) == [(4, 4, 4), (0,)]


def test_a_limit_above_everything_takes_the_best() -> None:
    assert allocate([table("a", 3, (0, 1, 2))], 10**40) == [(8,)]


def test_a_solver_that_is_wrong_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = SimpleNamespace(x=np.ones(2), status=0, message="optimal")
    monkeypatch.setattr("embsearch_plugin.knapsack.milp", lambda *args, **more: solved)
    with pytest.raises(AllocationError, match="the solver's choice within 40 breaks its constraints"):
        allocate([TableOptions("a", (Option(0, 0, 0.0), Option(4, 40, 1.0)))], 80)


def test_blocks_are_stored_one_by_one_only_where_that_pays() -> None:
    uniform = (Option(0, 0, 0.0), Option(4, 80, 6.0))
    blocks = ((Option(0, 0, 0.0), Option(4, 40, 5.0)), (Option(0, 0, 0.0), Option(4, 40, 1.0)))
    assert allocate([TableOptions("a", uniform, blocks, 10)], 80) == [(4,)]
    assert allocate([TableOptions("a", uniform, blocks, 10)], 79) == [(4, 0)]
    assert allocate([TableOptions("a", uniform, blocks, 40)], 79) == [(0,)]


def test_a_table_may_be_cheapest_block_by_block() -> None:
    blocks = ((Option(4, 8, 1.0), Option(8, 16, 2.0)), (Option(0, 0, 0.0), Option(8, 160, 9.0)))
    tables = [TableOptions("a", (Option(4, 88, 3.0),), blocks, 5)]
    assert allocate(tables, 13) == [(4, 0)]
    with pytest.raises(BudgetError, match="the smallest possible model needs 13 B"):
        allocate(tables, 12)


def test_a_budget_that_nothing_fits() -> None:
    tables = [table("small", 1000, (1, 2), dims=(4, 8)), table("large", 2**20, (1, 2), dims=(4, 8))]
    with pytest.raises(BudgetError) as error:
        allocate(tables, 4 * (2**20 + 1000) - 1)
    assert str(error.value) == (
        "no size plan fits 4.0 MiB: the smallest possible model needs 4.0 MiB.\n"
        "  Possible solutions: 1) raise the budget to 4,198,304 bytes  "
        "2) allow smaller dims (candidates of 'large' start at 4)  3) leave out table 'large' (4.0 MiB alone)."
    )
    with pytest.raises(
        BudgetError, match=r"fits 5 parameters: .* needs 4,198,304 parameters.\n .* raise the budget to 4,198,304 p"
    ):
        allocate(tables, 5, Unit.PARAMETERS)
    assert allocate(tables, 4 * (2**20 + 1000)) == [(4,), (4,)]


@pytest.mark.parametrize("utility", [float("nan"), float("inf")])
def test_a_worth_that_is_no_number_is_refused(utility: float) -> None:
    with pytest.raises(
        AllocationError, match=f"must be a finite number; got {utility} for dim 4.*\n.*training may have diverged"
    ):
        Option(4, 16, utility)


def test_a_large_model_takes_seconds() -> None:
    """26 tables from 3 to 10 million rows, in 6 blocks of 5 dims."""
    draw, tables = random.Random(0), []
    for number in range(26):
        rows = [max(1, int(10 ** (0.5 + number / 4) * share)) for share in (1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)]
        dims, blocks = (0, 4, 8, 16, 32), []
        for place, n in enumerate(rows):
            worth = accumulate([0.0, *(n * draw.random() / (place + 1) for _ in dims[1:])])
            blocks.append(tuple(Option(d, 4 * n * d, u) for d, u in zip(dims, worth, strict=True)))
        uniform = [Option(d, sum(b[i].cost for b in blocks), sum(b[i].utility for b in blocks)) for i, d in enumerate(dims)]
        tables.append(TableOptions(f"t{number}", tuple(uniform), tuple(blocks), 4 * sum(rows)))
    limit = sum(t.uniform[-1].cost for t in tables) // 10
    start = time.perf_counter()
    chosen = allocate(tables, limit)
    assert time.perf_counter() - start < 10
    cost = sum(_cost(t, dims) for t, dims in zip(tables, chosen, strict=True))
    assert 0.999 * limit < cost <= limit


def _cost(options: TableOptions, dims: tuple[int, ...]) -> int:
    if len(dims) == 1:
        return next(o.cost for o in options.uniform if o.dim == dims[0])
    return options.fixed_cost + sum(
        next(o.cost for o in block if o.dim == dim) for block, dim in zip(options.blocks, dims, strict=True)
    )
