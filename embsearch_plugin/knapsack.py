"""The exact knapsack: of each table's options those that are worth most together, within a budget."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import AllocationError, BudgetError

log = logging.getLogger(__name__)
TIME_LIMIT = 60  # seconds
_Chosen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Option:
    """One way to store one block: what it costs and what it is worth.

    Raises:
        AllocationError: where the worth is not a finite number.
    """

    dim: int
    cost: int
    utility: float

    def __post_init__(self) -> None:
        if not isfinite(self.utility):
            raise AllocationError(
                f"the worth of an option must be a finite number; got {self.utility} for dim {self.dim}.\n"
                "  Possible solution: look for NaN or infinity in the tables' weights; the training may have diverged."
            )


@dataclass(frozen=True)
class TableOptions:
    """The ways to store one table: as one block, or block by block at a fixed extra cost.

    Args:
        name: the table, for messages.
        uniform: one dim for the whole table; needs no remap.
        blocks: per row block, its options.
        fixed_cost: what storing the table block by block costs besides (its remap); paid once.
        column_cost: what each column that any block keeps costs besides (its row of the projection); the costs of uniform
            options hold that already.
        falling: whether no block may keep more columns than the one before it.
    """

    name: str
    uniform: tuple[Option, ...]
    blocks: tuple[tuple[Option, ...], ...] = ()
    fixed_cost: int = 0
    column_cost: int = 0
    falling: bool = False

    @property
    def cheapest(self) -> int:
        """The least this table can cost."""
        costs = [option.cost for option in self.uniform]
        return min([*costs, self._cheapest_blocks] if self.blocks else costs)

    @property
    def _least(self) -> list[Option]:
        """The cheapest option of each block."""
        return [min(block, key=lambda option: (option.cost, option.dim)) for block in self.blocks]

    @property
    def _least_columns(self) -> int:
        """The columns that are paid for in any case."""
        return max((option.dim for option in self._least), default=0)

    @property
    def _cheapest_blocks(self) -> int:
        return self.fixed_cost + sum(option.cost for option in self._least) + self.column_cost * self._least_columns

    def within(self, ceiling: int) -> "TableOptions":
        """Leave out what cannot be part of a best choice for this table at no more than ``ceiling``."""
        uniform = _worthwhile(self.uniform, ceiling)
        left = ceiling - self._cheapest_blocks
        if left < 0:
            return replace(self, uniform=uniform, blocks=())
        affordable: list[Sequence[Option]] = [
            [option for option in block if option.cost - least.cost + self._more_columns(option) <= left]
            for block, least in zip(self.blocks, self._least, strict=True)
        ]
        if not self.falling:  # otherwise what is worth nothing in one block may be what lets the next keep more
            affordable = [_worthwhile(block, ceiling) for block in affordable]
        return replace(self, uniform=uniform, blocks=tuple(map(tuple, affordable)))

    def _more_columns(self, option: Option) -> int:
        """Return what the columns of an option cost beyond those that are paid for in any case."""
        return self.column_cost * max(option.dim - self._least_columns, 0)


def _worthwhile(options: Sequence[Option], ceiling: int) -> tuple[Option, ...]:
    """Return the options within ``ceiling`` that are worth more than every cheaper one, by rising cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, -option.utility)):
        if option.cost <= ceiling and (not kept or option.utility > kept[-1].utility):
            kept.append(option)
    return tuple(kept)


def allocate(tables: Sequence[TableOptions], limit: int, unit: Unit = Unit.BYTES) -> list[tuple[int, ...]]:
    """Choose one option per table, or per block of a table, so that the utility is greatest within ``limit``.

    An exact multiple-choice knapsack, solved as a mixed-integer programme by HiGHS. The limit is kept to the byte; HiGHS
    counts in floating point, so what the last millionth of the limit could buy may be missed. Of a block's options that are
    worth the same, the cheapest is taken.

    Returns:
        Per table the chosen dims: one where the table is stored uniformly, else one per block.

    Raises:
        BudgetError: where even the cheapest choice costs more than ``limit``.
    """
    return [dims for _, dims in allocate_among([(table,) for table in tables], limit, unit)]


def allocate_among(
    tables: Sequence[Sequence[TableOptions]], limit: int, unit: Unit = Unit.BYTES
) -> list[tuple[int, tuple[int, ...]]]:
    """Do what :func:`allocate` does, where each table may be stored in one of several ways.

    Returns:
        Per table the number of the chosen way, and its chosen dims.
    """
    cheapest = [min(ways, key=lambda way: way.cheapest) for ways in tables]
    least = sum(way.cheapest for way in cheapest)
    if least > limit:
        raise BudgetError(_does_not_fit(cheapest, limit, least, unit))
    spare = limit - least
    knapsack = _Knapsack(
        [[way.within(spare + low.cheapest) for way in ways] for ways, low in zip(tables, cheapest, strict=True)]
    )
    chosen = knapsack.solve(limit)
    while int(knapsack.costs[chosen].sum()) > limit:  # HiGHS keeps the limit within its tolerance only
        knapsack.forbid(chosen)
        chosen = knapsack.solve(limit)
    return knapsack.dims(chosen)


def _does_not_fit(tables: Sequence[TableOptions], limit: int, least: int, unit: Unit) -> str:
    largest = max(tables, key=lambda table: table.cheapest)
    return (
        f"no size plan fits {unit.text(limit)}: the smallest possible model needs {unit.text(least)}.\n"
        f"  Possible solutions: 1) raise the budget to {least:,} {unit}  2) allow smaller dims "
        f"(candidates of {largest.name!r} start at {min(o.dim for o in largest.uniform)})  "
        f"3) leave out table {largest.name!r} ({unit.text(largest.cheapest)} alone)."
    )


UNIFORM, SWITCH, COLUMNS = -1, -2, -3  # in place of a block's number
Key = tuple[int, int, int, int]  # (table, way, block, dim)


class _Knapsack:
    """The binary variables of the programme.

    Per table and way: its uniform options, a switch to blocks, the blocks' options, and, where columns cost, for each dim
    whether any block keeps as many columns.
    """

    def __init__(self, tables: Sequence[Sequence[TableOptions]]) -> None:
        self.n_tables = len(tables)
        self.keys: list[Key] = []
        costs: list[int] = []
        utilities: list[float] = []
        for t, ways in enumerate(tables):
            for w, way in enumerate(ways):
                for block, options in _groups(way):
                    self.keys += [(t, w, block, option.dim) for option in options]
                    costs += [option.cost for option in options]
                    utilities += [option.utility for option in options]
        self.costs = np.array(costs, dtype=np.int64)
        self.utilities = np.array(utilities, dtype=np.float64)
        falling = {(t, w) for t, ways in enumerate(tables) for w, way in enumerate(ways) if way.falling}
        self.constraints = [*self._one_choice_each(), *self._columns_are_paid(), *self._dims_fall(falling)]

    def solve(self, limit: int) -> _Chosen:
        """Return which variables are one in the best choice within ``limit``."""
        limit = min(limit, int(self.costs.sum()))
        # HiGHS's tolerances are absolute, about 1e-6. A power of two keeps whole numbers of bytes exact.
        scale = 2.0 ** max(0, limit.bit_length() - 24)
        # So are those of the gap to the best, 1e-6: worths up to 1,000 make it a billionth of the largest.
        worth = self.utilities / (float(np.abs(self.utilities).max()) or 1.0) * 1e3
        found = milp(
            -worth,
            integrality=np.ones(len(self.keys), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[*self.constraints, LinearConstraint((self.costs / scale)[None, :], -np.inf, limit / scale)],
            options={"mip_rel_gap": 1e-9, "time_limit": TIME_LIMIT},
        )
        if found.x is None:
            raise AllocationError(
                f"no allocation within {limit:,} was found (at most {TIME_LIMIT} s are taken): {found.message}\n  Possible "
                "solutions: 1) fewer row_blocks or column_chunks  2) another budget."
            )
        status: int = found.status
        if status == 1:
            log.warning("the allocation within %s is the best that was found in %d s, not proven", f"{limit:,}", TIME_LIMIT)
        chosen: _Chosen = np.asarray(found.x > 0.5)
        if any(np.min(slack) < 0 for c in self.constraints for slack in c.residual(chosen.astype(np.float64))):
            raise AllocationError(
                f"the solver's choice within {limit:,} breaks its constraints.\n  Possible solutions: 1) another version of "
                "scipy  2) another budget."
            )
        return chosen

    def forbid(self, chosen: _Chosen) -> None:
        """Never return this choice again."""
        self.constraints.append(LinearConstraint(chosen.astype(np.float64)[None, :], -np.inf, chosen.sum() - 1))

    def _one_choice_each(self) -> Iterator[LinearConstraint]:
        """Per table: uniform options and the switches sum to one. Per block: options sum to its way's switch."""
        rows, totals = _Rows(len(self.keys)), dict[object, float]()
        for column, (t, w, block, _) in enumerate(self.keys):
            if block in (UNIFORM, SWITCH):
                rows.add(t, column, 1)
                totals[t] = 1.0
            elif block != COLUMNS:
                rows.add((t, w, block), column, 1)
                totals[t, w, block] = 0.0
        switches = {(t, w): column for column, (t, w, block, _) in enumerate(self.keys) if block == SWITCH}
        for group in totals:
            if isinstance(group, tuple):
                rows.add(group, switches[group[:2]], -1)
        right = [totals[group] for group in rows.names]
        yield LinearConstraint(rows.matrix(), right, right)

    def _columns_are_paid(self) -> Iterator[LinearConstraint]:
        """Per block, and dim of its way: where the block keeps so many columns or more, they are paid for."""
        rows = _Rows(len(self.keys))
        paid: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for column, (t, w, block, dim) in enumerate(self.keys):
            if block == COLUMNS:
                paid.setdefault((t, w), []).append((dim, column))
        for column, (t, w, block, dim) in enumerate(self.keys):
            for least, payment in paid.get((t, w), ()) if block >= 0 else ():
                if dim >= least:
                    rows.add((t, w, block, least), column, 1)
                    rows.add((t, w, block, least), payment, -1)
        if rows.names:
            yield LinearConstraint(rows.matrix(), -np.inf, 0)

    def _dims_fall(self, falling: Collection[tuple[int, int]]) -> Iterator[LinearConstraint]:
        """Per block of such a way: it keeps no more columns than the one before it."""
        rows = _Rows(len(self.keys))
        for column, (t, w, block, dim) in enumerate(self.keys):
            if (t, w) in falling and block >= 0 and dim:
                rows.add((t, w, block + 1), column, -dim)
                if block > 0:
                    rows.add((t, w, block), column, dim)
        if rows.names:
            yield LinearConstraint(rows.matrix(), -np.inf, 0)

    def dims(self, chosen: _Chosen) -> list[tuple[int, tuple[int, ...]]]:
        """Read the chosen way and dims, per table, from the chosen variables."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.n_tables)]
        for column in np.flatnonzero(chosen):
            table, way, block, dim = self.keys[column]
            if block not in (SWITCH, COLUMNS):
                found[table].append((way, dim))
        return [(pairs[0][0], tuple(dim for _, dim in pairs)) for pairs in found]


def _groups(way: TableOptions) -> Iterator[tuple[int, tuple[Option, ...]]]:
    """Yield the variables of one way to store a table, by block."""
    yield UNIFORM, way.uniform
    if way.blocks:
        yield SWITCH, (Option(0, way.fixed_cost, 0.0),)
        yield from enumerate(way.blocks)
        if way.column_cost:
            dims = sorted({option.dim for block in way.blocks for option in block} - {0})
            steps = [dim - before for before, dim in pairwise([0, *dims])]
            yield COLUMNS, tuple(Option(d, step * way.column_cost, 0.0) for d, step in zip(dims, steps, strict=True))


class _Rows:
    """A sparse matrix whose rows have names."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.names: dict[object, int] = {}
        self.entries: dict[tuple[int, int], int] = {}

    def number(self, name: object) -> int:
        return self.names.setdefault(name, len(self.names))

    def add(self, name: object, column: int, value: int) -> None:
        self.entries[self.number(name), column] = value

    def matrix(self) -> coo_array:
        row, column = zip(*self.entries, strict=True)
        return coo_array((list(self.entries.values()), (row, column)), shape=(len(self.names), self.columns))
