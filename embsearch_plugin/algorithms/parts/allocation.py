"""Allocations that are made before any training: gates that are set once, and dims in proportion to weights."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan, TablePlan

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.search.tables import SearchTable

Dims = list[tuple[int, ...]]
"""Per table, the dim of each of its row blocks."""


@dataclass(frozen=True, kw_only=True)
class FixedConfig(SearchConfig):
    """Settings that say all sizes before any training."""

    @property
    def trains(self) -> bool:
        """Sizes are known."""
        return False

    @property
    def cuts_columns(self) -> bool:
        """Dims are as they are given, or multiples of the space's ``align``."""
        return False


@dataclass(frozen=True, kw_only=True)
class WholeTableConfig(FixedConfig):
    """Settings that give all rows of a table one dim."""

    warm_up: int = 0

    @property
    def cuts_rows(self) -> bool:
        """A dim is a whole table's."""
        return False


class FixedAllocation:
    """An algorithm whose dims follow from its settings, the tables and the budget.

    When the search starts, gates become one for the first columns of each row block and zero for the others; so the model
    trains as if its rows were that wide, padded with zeros to the width of their table. The network is unchanged. In a
    compact model learned projections may take the place of the zeros (``projected``, see :func:`padded_plan`).
    """

    projected: ClassVar[bool] = False

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the allocation within ``budget``; raise :class:`BudgetError` where there is none."""
        raise NotImplementedError

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """Let the first columns of every row block through."""
        chosen = self.dims(session, session.budget)
        session.set_gates([_prefixes(gate, dims) for gate, dims in zip(session.gates, chosen, strict=True)])

    @hookimpl
    def embsearch_search_step(self) -> Mapping[str, float]:
        """Leave everything as it is."""
        return {}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Keep the columns that were trained; where the budget is too small for them, allocate within it."""
        plan = padded_plan(session, [tuple(gate.sum(1).int().tolist()) for gate in session.gates], self.projected)
        if budget is None or budget.unit.of(plan) <= budget.limit(session.original_bytes):
            return plan
        return padded_plan(session, self.dims(session, budget), self.projected)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the session keeps the gates."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""


def padded_plan(session: "Session", dims: Dims, projected: bool = False) -> SizePlan:
    """Return the plan in which every row block keeps its first columns; zeros take the place of the others.

    ``projected``: instead of that, a learned matrix per table makes its width of the columns that are kept, where it is
    smaller than what it saves. It starts as the identity, which is padding.
    """
    plans = []
    for table, chosen in zip(session.tables, dims, strict=True):
        rows = [table.blocks.rows_of(block) for block in range(len(table.blocks.sizes))]
        plans.append(TablePlan.nested(table.spec, chosen, rows, projection=projected and _worth_projecting(table.spec, chosen)))
    return SizePlan(tuple(plans), session.space.align)


def _worth_projecting(spec: Table, dims: Sequence[int]) -> bool:
    """Whether columns are missing, and the table has more rows than a projection, (K, D), would add to its columns."""
    return max(dims) < spec.dim < spec.rows


def proportional(
    tables: Sequence["SearchTable"], weights: Sequence[Tensor], budget: Budget, align: int, projected: bool = False
) -> Dims:
    """Give every row block a dim in proportion to its weight: the largest that fit the budget together.

    One scale times the weights is rounded to the nearest multiple of ``align`` (or the table's width, which is the most a
    block gets). No block has less than ``align``; only where the budget does not hold so much for all, it may have nothing.
    The scale is the largest that fits, remaps and projections included, so what is left of the budget is less than the next
    step.

    Args:
        tables: the tables, and how their rows are cut.
        weights: per table (S,), at least zero.
        budget: the ceiling.
        align: stored widths are multiples of it.
        projected: as for :func:`padded_plan`.
    """
    limit = budget.limit(sum(table.spec.size_bytes for table in tables))
    growing = [_Growing(table, weight, align) for table, weight in zip(tables, weights, strict=True)]

    def cost(dims: Dims, extras: bool = True) -> int:
        return sum(_cost(table, chosen, budget.unit, projected, extras) for table, chosen in zip(tables, dims, strict=True))

    least = align if cost([g.at(0.0, align) for g in growing]) <= limit else 0
    scales = sorted({0.0, *(scale for g in growing for scale in g.scales)})

    def at(scale: float) -> Dims:
        return [g.at(scale, least) for g in growing]

    # Rows alone grow with the scale. Remaps and projections come and go, so from there on, step by step.
    above = bisect_right(scales, limit, key=lambda scale: cost(at(scale), extras=False))
    fitting = (dims for scale in reversed(scales[:above]) if cost(dims := at(scale)) <= limit)
    return next(fitting)  # at scale zero all dims are the least ones, which fit


class _Growing:
    """The dims of one table's row blocks, growing with a scale that all tables share."""

    def __init__(self, table: "SearchTable", weights: Tensor, align: int) -> None:
        width = table.spec.dim
        self.dims = torch.tensor([0, *range(align, width, align), width])
        # (S, K): the scale at which a block rounds up to its next dim; infinite for a block of no weight.
        self.steps = (self.dims[1:] + self.dims[:-1]).double() / 2 / weights.double()[:, None]

    @property
    def scales(self) -> list[float]:
        """Every scale at which a dim changes."""
        steps: list[float] = self.steps[self.steps.isfinite()].tolist()
        return steps

    def at(self, scale: float, least: int) -> tuple[int, ...]:
        """Return the dim of each block at a scale."""
        dims = self.dims[(self.steps <= scale).sum(1)]
        return tuple(dims.clamp(min=least).clamp(max=int(self.dims[-1])).tolist())


def _cost(table: "SearchTable", dims: Sequence[int], unit: Unit, projected: bool, extras: bool) -> int:
    """Return what a table costs at most; with ``extras``: a remap where dims differ, whatever its rows' order, a projection."""
    spec = table.spec
    kept = [(rows, dim) for rows, dim in zip(table.blocks.sizes, dims, strict=True) if rows]
    total = unit.weights(spec, sum(rows * dim for rows, dim in kept))
    if extras and len({dim for _, dim in kept}) > 1:
        total += unit.remap(spec)
    if extras and projected and _worth_projecting(spec, dims):
        total += max(dims) * unit.projected_column(spec)
    return total


def _prefixes(gate: Tensor, dims: Sequence[int]) -> Tensor:
    """Return a gate (S, D) that is one for the first columns of each block, and zero for the others."""
    kept = torch.arange(gate.shape[1], device=gate.device) < torch.tensor(dims, device=gate.device)[:, None]
    return kept.to(gate.dtype)
