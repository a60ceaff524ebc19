"""Budgets in bytes or parameters, the one place where bytes are counted, and the exact knapsack."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from embsearch_plugin.errors import BudgetError

INDEX_BYTES = torch.int32.itemsize
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_HELP = 'Write "10%" (of the original tables\' weight bytes), es.Budget(bytes="2GiB") or es.Budget(params=390_000).'


@dataclass(frozen=True)
class Budget:
    """How large all embedding tables together may be.

    Args:
        share: ``"10%"``: share of the original tables' weight bytes.
        bytes: bytes as a number or as text with a unit (``"2GiB"``, ``"300 MB"``).
        params: number of weights, projections included, as the papers count.

    Exactly one of the three is given.

    Raises:
        BudgetError: where a budget cannot be read, is not positive, or is over 100 %.
    """

    share: str | None = None
    bytes: int | str | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.share, self.bytes, self.params) if value is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget takes exactly one of share, bytes and params; got {len(given)}. {_HELP}")
        if self.amount <= 0:
            raise BudgetError(f"a budget must be above zero; got {self}. {_HELP}")
        if self.share is not None and self.amount > 1:
            raise BudgetError(f"a budget is at most 100 % of the original tables; got {self}. {_HELP}")

    @classmethod
    def of(cls, budget: "Budget | str") -> "Budget":
        """Return ``budget`` itself, or the budget that a text such as ``"10%"`` or ``"2GiB"`` stands for."""
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, str):
            raise BudgetError(f"a budget is a text or an es.Budget; got {budget!r}. {_HELP}")
        return cls(share=budget) if budget.strip().endswith("%") else cls(bytes=budget)

    @property
    def amount(self) -> float:
        """The budget as a number: a share between 0 and 1, bytes, or parameters."""
        if self.share is not None:
            return _percent(self.share)
        if self.bytes is not None:
            return _bytes(self.bytes)
        return _positive_int(self.params)

    def limit(self, original_bytes: int) -> int:
        """Return the ceiling for tables of ``original_bytes``: bytes, or parameters where those are budgeted."""
        return int(self.amount * original_bytes) if self.share is not None else int(self.amount)

    @property
    def unit(self) -> str:
        """What :meth:`limit` counts: ``"bytes"`` or ``"parameters"``."""
        return "bytes" if self.params is None else "parameters"

    def __str__(self) -> str:
        if self.share is not None:
            return self.share
        return f"{self.bytes} bytes" if isinstance(self.bytes, int) else self.bytes or f"{self.params} parameters"


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*%\s*", text) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(f"cannot read the budget {text!r} as a percentage. {_HELP}")
    return float(match[1]) / 100


def _bytes(value: int | str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise BudgetError(f"cannot read the budget {value!r} as bytes. {_HELP}")
    return int(float(match[1]) * _UNITS[match[2]])


def _positive_int(value: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BudgetError(f"params must be a whole number; got {value!r}. {_HELP}")
    return value


def human_bytes(count: float) -> str:
    """Return a size as people read it: ``"3.1 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Option:
    """One way to store one block: what it costs and what it is worth."""

    dim: int
    cost: int
    utility: float


@dataclass(frozen=True)
class TableOptions:
    """The ways to store one table: as one block, or block by block at a fixed extra cost.

    Args:
        name: the table, for messages.
        uniform: one dim for the whole table; needs no remap.
        blocks: per row block, its options.
        fixed_cost: what storing the table block by block costs besides (its remap); paid once.
    """

    name: str
    uniform: tuple[Option, ...]
    blocks: tuple[tuple[Option, ...], ...] = ()
    fixed_cost: int = 0

    @property
    def cheapest(self) -> int:
        """The least this table can cost."""
        return min(option.cost for option in self.uniform)


def allocate(tables: Sequence[TableOptions], limit: int, unit: str = "bytes") -> list[tuple[int, ...]]:
    """Choose one option per table, or per block of a table, so that the utility is greatest within ``limit``.

    An exact multiple-choice knapsack, solved as a mixed-integer programme by HiGHS.

    Returns:
        Per table the chosen dims: one where the table is stored uniformly, else one per block.

    Raises:
        BudgetError: where even the cheapest choice costs more than ``limit``.
    """
    least = sum(table.cheapest for table in tables)
    if least > limit:
        raise BudgetError(_does_not_fit(tables, limit, least, unit))
    columns = _Columns(tables)
    chosen = columns.solve(limit)
    if columns.costs[chosen].sum() > limit:  # HiGHS keeps a row only to a relative 1e-6; leave it that much room
        chosen = columns.solve(limit - max(1, int(limit * 1e-5)))
    return columns.dims(chosen)


def _does_not_fit(tables: Sequence[TableOptions], limit: int, least: int, unit: str) -> str:
    size = human_bytes if unit == "bytes" else "{:,} parameters".format
    largest = max(tables, key=lambda table: table.cheapest)
    return (
        f"no size plan fits {size(limit)}: the smallest possible model needs {size(least)}.\n"
        f"  Possible solutions: 1) raise the budget to {size(least)}  2) allow smaller dims "
        f"(candidates of {largest.name!r} start at {min(o.dim for o in largest.uniform)})  "
        f"3) leave out table {largest.name!r} ({size(largest.cheapest)} alone)."
    )


class _Columns:
    """The binary variables of the knapsack: per table its uniform options, a switch to blocks, the blocks' options."""

    def __init__(self, tables: Sequence[TableOptions]) -> None:
        self.tables = tables
        self.keys: list[tuple[int, int, int]] = []  # (table, block, dim); block -1: uniform, -2: the switch to blocks
        costs: list[int] = []
        utilities: list[float] = []
        for t, table in enumerate(tables):
            groups = [(-1, table.uniform), *enumerate(table.blocks)]
            if table.blocks:
                groups.insert(1, (-2, (Option(0, table.fixed_cost, 0.0),)))
            for block, options in groups:
                self.keys += [(t, block, option.dim) for option in options]
                costs += [option.cost for option in options]
                utilities += [option.utility for option in options]
        self.costs = np.array(costs, dtype=np.int64)
        self.utilities = np.array(utilities, dtype=np.float64)

    def solve(self, limit: int) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Return which variables are one in the best choice within ``limit``."""
        worth = -self.utilities / max(float(np.abs(self.utilities).max()), 1e-30)
        equations, totals = self._one_choice_each()
        scale = max(limit, 1)
        found = milp(
            worth,
            integrality=np.ones(len(self.keys)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(equations, totals, totals),
                LinearConstraint((self.costs / scale)[None, :], -np.inf, limit / scale),
            ],
            options={"mip_rel_gap": 1e-9, "time_limit": 60},
        )
        if found.x is None:
            raise BudgetError(f"the allocation within {limit:,} could not be solved: {found.message}")
        return np.asarray(found.x > 0.5)

    def _one_choice_each(self) -> "tuple[coo_array, np.ndarray[tuple[int], np.dtype[np.float64]]]":
        """Per table: uniform options and the switch sum to one. Per block: options sum to the switch."""
        rows: dict[tuple[int, int], int] = {}
        entries: list[tuple[int, int, int]] = []
        totals: list[float] = []
        for column, (t, block, _) in enumerate(self.keys):
            group = (t, -1) if block < 0 else (t, block)
            if group not in rows:
                rows[group] = len(rows)
                totals.append(1.0 if block < 0 else 0.0)
            entries.append((rows[group], column, 1))
        for column, (t, block, _) in enumerate(self.keys):
            if block == -2:
                entries += [(rows[t, b], column, -1) for b in range(len(self.tables[t].blocks))]
        row, col, value = zip(*entries, strict=True)
        return coo_array((value, (row, col)), shape=(len(rows), len(self.keys))), np.array(totals)

    def dims(self, chosen: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[tuple[int, ...]]:
        """Read the chosen dims, per table, from the chosen variables."""
        dims: list[list[int]] = [[] for _ in self.tables]
        for column in np.flatnonzero(chosen):
            table, block, dim = self.keys[column]
            if block != -2:
                dims[table].append(dim)
        return [tuple(chosen_dims) for chosen_dims in dims]
