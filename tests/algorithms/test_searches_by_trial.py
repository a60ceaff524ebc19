"""Grid search, random search and mixed dimensions: which allocations are tried, and that each is what it says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from support import PLAIN, SEARCHES, SUM, WORLDS, World, searched

import embsearch_plugin as es
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.mde import popularity
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.search.session import Session
from embsearch_plugin.space import RowBlocks

SPECS = [Table("c", f"t{i}", rows, dim, torch.float32, ("f",)) for i, (rows, dim) in enumerate([(1000, 12), (30, 8)])]
SPACE = es.SearchSpace(row_blocks=(0.1, 0.3, 0.6), align=1)


def dims_of(session: Session) -> list[tuple[int, ...]]:
    return [tuple(gate.sum(1).int().tolist()) for gate in session.gates]


def allocated(config: object, world: str = "one id", **options: object) -> Session:
    options = {"budget": "50%", "space": SPACE, **options}
    return searched(WORLDS[world], steps=4, algorithm=config, **options)[1]


def test_a_method_of_one_allocation_tries_itself_alone() -> None:
    for config in (es.Uniform(), es.Magnitude(), es.Dnis()):
        assert list(config.allocations(SPECS, es.Budget.of("10%"), SPACE)) == [config]


@pytest.mark.parametrize("name", SEARCHES)
def test_an_allocation_is_among_its_own_and_is_found_again(name: str) -> None:
    budget = es.Budget.of("60%")
    tried = algorithms()[name]().allocations(SPECS, budget, SPACE)
    assert len({repr(config) for config in tried}) == len(tried) >= 1
    assert list(algorithms()[name]().allocations(SPECS, budget, SPACE)) == list(tried)
    for config in tried:
        assert config in config.allocations(SPECS, budget, SPACE)


def test_spectral_has_tiny_uniform_dims_as_rivals() -> None:
    ours = es.Spectral()
    tried = ours.allocations(SPECS, es.Budget.of("60%"), es.SearchSpace(align=1))
    assert list(tried) == [ours, es.Uniform(dim=1), es.Uniform(dim=2), es.Uniform(dim=4)]
    assert ours.allocations(SPECS, es.Budget.of("60%"), es.SearchSpace()) == [ours, es.Uniform(dim=4)]
    assert ours.allocations(SPECS, es.Budget.of("1%"), SPACE) == [ours]
    with pytest.raises(ValueError, match="rivals must be positive dims, no one twice"):
        es.Spectral(rivals=(2, 2))


# Grid.


@pytest.mark.parametrize("budget", [10, 30, 50, 75, 100])
def test_a_grid_tries_its_dims_within_the_budget_and_the_widest_table(budget: int) -> None:
    grid = es.Grid(dims=(1, 2, 5, 8, 12, 13, 40))
    cost = {dim: sum(4 * spec.rows * min(dim, spec.dim) for spec in SPECS) for dim in grid.dims}
    limit = sum(spec.size_bytes for spec in SPECS) * budget // 100
    tried = grid.allocations(SPECS, es.Budget(share=f"{budget}%"), SPACE)
    assert tried == [es.Uniform(dim=dim) for dim in grid.dims if cost[dim] <= limit and dim <= 12]


def test_the_grid_of_the_paper() -> None:
    assert es.Grid().dims == (4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64)


def test_a_session_of_a_grid_takes_the_largest_dim_that_fits() -> None:
    assert dims_of(allocated(es.Grid(dims=(1, 3, 5)))) == [(3,) * 3, (3,) * 3]


def test_a_grid_of_which_nothing_fits_says_so() -> None:
    for dims, budget in (((4, 8), "20%"), ((16,), "100%")):
        with pytest.raises(BudgetError, match=r"no uniform dim fits .*\n.*raise the budget .* smaller dims \(the grid has"):
            es.Grid(dims=dims).allocations(SPECS, es.Budget.of(budget), SPACE)


# Uniform.


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_uniform_dim_below_the_largest_that_fits_is_kept_as_it_is(dim: int) -> None:
    session = allocated(es.Uniform(dim=dim))
    assert dims_of(session) == [(dim,) * 3, (dim,) * 3]
    assert session.derive().size_bytes == session.original_bytes * dim // 8


def test_a_uniform_dim_over_the_budget_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(BudgetError, match="no uniform dim fits 50%: dim 5 needs .*\n.*leave out dim"):
        allocated(es.Uniform(dim=5))


# Random.


def test_random_search_draws_as_often_as_in_the_papers() -> None:
    tables, budget, space = [Table("", "t", 100, 32, torch.float32, ("f",))], es.Budget.of("50%"), es.SearchSpace()
    counts = [len(es.Random(**settings).allocations(tables, budget, space)) for settings in ({}, {"by": "block"}, {"draws": 3})]
    assert counts == [10, 16, 3]


@pytest.mark.parametrize("by", ["table", "block"])
def test_draws_differ_from_each_other_and_are_the_same_again(by: str) -> None:
    draws = [dims_of(allocated(es.Random(by=by, draw=draw, warm_up=1), "unequal dims")) for draw in range(12)]
    assert len({str(dims) for dims in draws}) >= 8
    again = [dims_of(allocated(es.Random(by=by, draw=draw, warm_up=1), "unequal dims", seed=7)) for draw in range(3)]
    assert again == draws[:3]
    other = [dims_of(allocated(es.Random(by=by, draw=draw, warm_up=1, seed=1), "unequal dims")) for draw in range(3)]
    assert other != draws[:3]


@pytest.mark.parametrize("scope", ["table", "global"])
@pytest.mark.parametrize("draw", range(4))
def test_block_draws_descend_and_table_draws_are_uniform_within_a_table(draw: int, scope: str) -> None:
    space = es.SearchSpace(row_blocks=(0.1, 0.3, 0.6), align=1, scope=scope)
    for dims in dims_of(allocated(es.Random(by="block", draw=draw, warm_up=1), space=space)):
        assert list(dims) == sorted(dims, reverse=True)
    for dims in dims_of(allocated(es.Random(draw=draw, warm_up=1), space=space)):
        assert len(set(dims)) == 1


def test_one_sequence_is_drawn_for_blocks_over_all_tables() -> None:
    space = es.SearchSpace(row_blocks=(0.1, 0.3, 0.6), align=1, scope="global")
    for draw in range(4):
        first, second = dims_of(allocated(es.Random(by="block", draw=draw, warm_up=1), space=space))
        assert first == second


def test_random_search_tries_its_draws() -> None:
    assert es.Random(draws=3).allocations(SPECS, es.Budget.of("10%"), SPACE) == [es.Random(draws=3, draw=n) for n in range(3)]
    assert dims_of(allocated(es.Random(warm_up=1))) == dims_of(allocated(es.Random(warm_up=1, draw=0)))


# Mixed dimensions.


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_popularity_is_the_mean_count_of_a_row(groups: int) -> None:
    counts = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(groups))
    order = torch.argsort(counts, descending=True, stable=True).int()
    sizes = (2, 0, 5, 13, 20)
    edges = [0, 2, 2, 7, 20, 40]
    merged = [block * min(groups, 5) // 5 for block in range(5)]
    for block, value in enumerate(popularity(RowBlocks(sizes, order), counts, groups).tolist()):
        rows = [int(order[i]) for b in range(5) if merged[b] == merged[block] for i in range(edges[b], edges[b + 1])]
        assert value == pytest.approx(sum(int(counts[row]) for row in rows) / max(len(rows), 1))


def test_with_one_block_per_table_dims_follow_the_rows() -> None:
    """Each table is read once per example, so p is in proportion to one over its rows."""
    session = allocated(es.Mde(warm_up=1, temperature=1.0, blocks=1), "unequal dims", space=es.SearchSpace(align=1))
    rows = [spec.rows for spec in session.specs]
    (a, *_), (b, *_), (c, *_) = dims_of(session)
    assert rows == [200, 300, 5] and session.specs[1].features == ("f1", "f2")  # t1 is read twice
    assert 1 < a < 12 and c == 4
    assert b == pytest.approx(a * 200 / 300 * 2, abs=1)


def test_a_temperature_of_zero_is_uniform_and_a_higher_one_gives_frequent_rows_more() -> None:
    counts = {f"t{i}": 10_000 / torch.arange(1, rows + 1) ** 0.5 for i, rows in enumerate((200, 300))}  # row 0 leads
    # Four columns of eight would be the whole budget, and projections cost something.
    assert dims_of(allocated(es.Mde(temperature=0.0, blocks=3, warm_up=1), frequencies=counts)) == [(3,) * 3, (3,) * 3]
    widest = []
    for temperature in (0.2, 0.6, 1.0):
        session = allocated(es.Mde(temperature=temperature, blocks=3, warm_up=1), budget="60%", frequencies=counts)
        assert all(list(dims) == sorted(dims, reverse=True) for dims in dims_of(session))
        assert session.derive().size_bytes <= 0.6 * session.original_bytes
        widest.append(dims_of(session)[0][0] / dims_of(session)[0][-1])
    assert widest == sorted(widest) and widest[-1] > widest[0]


@pytest.mark.parametrize("temperature", [0.25, 0.5])
def test_dims_follow_a_power_of_the_popularity(temperature: float) -> None:
    """d = lambda * p ** alpha, to the nearest column: of 16 times the lookups come 16 ** alpha times the columns."""
    wide = World((("t0", 50, 64, ("f0",), SUM), ("t1", 50, 64, ("f1",), SUM)))
    counts = {"t0": torch.full((50,), 16), "t1": torch.full((50,), 1)}
    config = es.Mde(temperature=temperature, blocks=1, warm_up=1)
    session = searched(wide, steps=2, algorithm=config, budget="50%", space=es.SearchSpace(align=1), frequencies=counts)[1]
    (often, *_), (rarely, *_) = dims_of(session)
    assert 20 < often < 64
    assert rarely == pytest.approx(often / 16**temperature, abs=1)


def test_sixteen_settings_as_far_as_the_space_tells_them_apart() -> None:
    budget = es.Budget.of("10%")
    assert len(es.Mde().allocations(SPECS, budget, es.SearchSpace(row_blocks=8))) == 16
    tried = es.Mde().allocations(SPECS, budget, SPACE)
    assert [(c.temperature, c.blocks) for c in tried] == [(a, k) for a in (0.2, 0.4, 0.6, 0.8) for k in (1, 2, 3)]
    assert len(es.Mde(temperature=0.5).allocations(SPECS, budget, SPACE)) == 3


@dataclass(frozen=True, kw_only=True)
class Foreign(SearchConfig):
    """Of another package."""

    name: ClassVar[str] = "foreign"
    batches: int | Literal["all"] | None = "all"
    start: tuple[float, str] = (0.5, "cosine")
    widths: tuple[int, ...] | None = None
    rate: int | float = 1


def test_settings_that_may_be_more_than_numbers_are_left_to_their_owner() -> None:
    assert Foreign(batches=3, widths=(1, 2), rate=0.5).start == (0.5, "cosine")
    with pytest.raises(ValueError, match=r"widths must be whole numbers; got \(1.5,\)"):
        Foreign(widths=(1.5,))
    with pytest.raises(ValueError, match="rate must be a number; got nan"):
        Foreign(rate=float("nan"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.Grid(dims=()), "dims must hold at least one, be positive and ascending"),
        (lambda: es.Grid(dims=(0, 4)), "positive and ascending"),
        (lambda: es.Grid(dims=(4, 4)), "no one twice; got .4, 4."),
        (lambda: es.Grid(dims=(8, 4)), "ascending"),
        (lambda: es.Grid(dims=(4.5, 8)), r"dims must be whole numbers; got \(4.5, 8\)"),
        (lambda: es.Grid(dims=4), "dims must be whole numbers; got 4"),
        (lambda: es.Uniform(dim=True), "dim must be a whole number; got True"),
        (lambda: es.Magnitude(relative="no"), "relative must be True or False; got 'no'"),
        (lambda: es.Random(draws=1.5), "draws must be a whole number; got 1.5"),
        (lambda: es.Magnitude(rounds=1.5), "rounds must be a whole number; got 1.5"),
        (lambda: es.Spectral(rivals=(1.5,)), r"rivals must be whole numbers; got \(1.5,\)"),
        (lambda: es.Nis(penalty=float("nan")), "penalty must be a number; got nan"),
        (lambda: es.Nis(lr="0.1"), "lr must be a number; got '0.1'"),
        (lambda: es.AutoDim(xi=float("nan")), "xi must be a number; got nan"),
        (lambda: es.Esapn(losses=2.5), "losses must be a whole number; got 2.5"),
        (lambda: es.Random(draws=0), "draws must be at least 1"),
        (lambda: es.Random(draw=-1), "draw must be at least 0; got -1"),
        (lambda: es.Random(seed=-1), "seed must be at least 0; got -1"),
        (lambda: es.Random(by="row"), "by must be 'table' or 'block'; got 'row'"),
        (lambda: es.Mde(temperatures=()), "temperatures must hold at least one"),
        (lambda: es.Mde(temperatures=(0.5, 1.5)), "lie between 0 and 1"),
        (lambda: es.Mde(temperatures=(0.5, 0.5)), "differ"),
        (lambda: es.Mde(temperature=-0.1), "lie between 0 and 1"),
        (lambda: es.Mde(temperature=float("nan")), "temperature must be a number; got nan"),
        (lambda: es.Mde(block_counts=()), "block_counts must hold at least one"),
        (lambda: es.Mde(blocks=0), "be at least 1"),
        (lambda: es.Mde(warm_up=-1), "warm_up must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_one_draw_in_a_loop_of_ones_own() -> None:
    """What the documentation says of a loop that searches by itself: a session per candidate."""
    tried = es.Random(draws=3, warm_up=1).allocations(SPECS, es.Budget.of("50%"), SPACE)
    plans = [searched(PLAIN, steps=4, algorithm=config, budget="50%", space=SPACE)[1].derive() for config in tried]
    assert len({str(plan) for plan in plans}) == 3
