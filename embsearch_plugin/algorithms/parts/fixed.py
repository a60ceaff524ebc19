"""Allocations that are made before any training: gates that are set once, and dims in proportion to weights."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embsearch_plugin.budget import Budget
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan, TablePlan, remap_bytes

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.search.tables import SearchTable

Dims = list[tuple[int, ...]]
"""Per table, the dim of each of its row blocks."""


class FixedAllocation:
    """An algorithm whose dims follow from its settings, the tables and the budget.

    When the search starts, gates become one for the first columns of each row block and zero for the others; so the model
    trains as if its rows were that wide, padded with zeros to the width of their table. The network is unchanged.
    """

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
        plan = padded_plan(session, [tuple(gate.sum(1).int().tolist()) for gate in session.gates])
        if budget is None or _size(plan, budget.unit) <= budget.limit(session.original_bytes):
            return plan
        return padded_plan(session, self.dims(session, budget))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the session keeps the gates."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""


def padded_plan(session: "Session", dims: Dims) -> SizePlan:
    """Return the plan in which every row block keeps its first columns; zeros take the place of the others."""
    plans = []
    for table, chosen in zip(session.tables, dims, strict=True):
        rows = [table.blocks.rows_of(block) for block in range(len(table.blocks.sizes))]
        plans.append(TablePlan.nested(table.spec, chosen, rows))
    return SizePlan(tuple(plans), session.space.align)


def proportional(tables: Sequence["SearchTable"], weights: Sequence[Tensor], budget: Budget, align: int) -> Dims:
    """Give every row block a dim in proportion to its weight: the largest that fit the budget together.

    One scale times the weights is rounded to the nearest multiple of ``align`` (or the table's width, which is the most a
    block gets). No block has less than ``align``; only where the budget does not hold so much for all, it may have nothing.
    The scale is the largest that fits, remaps included, so what is left of the budget is less than the next step.

    Args:
        tables: the tables, and how their rows are cut.
        weights: per table (S,), at least zero.
        budget: the ceiling.
        align: stored widths are multiples of it.
    """
    limit = budget.limit(sum(table.spec.size_bytes for table in tables))
    growing = [_Growing(table, weight, align) for table, weight in zip(tables, weights, strict=True)]
    least = align if _cost(tables, [g.at(0.0, align) for g in growing], budget.unit) <= limit else 0
    scales = sorted({0.0, *(scale for g in growing for scale in g.scales)})

    def at(scale: float) -> Dims:
        return [g.at(scale, least) for g in growing]

    # Weights alone grow with the scale. A remap comes and goes with differing dims, so from there on, step by step.
    above = bisect_right(scales, limit, key=lambda scale: _cost(tables, at(scale), budget.unit, remaps=False))
    fitting = (dims for scale in reversed(scales[:above]) if _cost(tables, dims := at(scale), budget.unit) <= limit)
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


def _cost(tables: Sequence["SearchTable"], dims: Dims, unit: str, remaps: bool = True) -> int:
    """Return what an allocation costs at most, with a remap for each table of several dims, whatever its rows' order."""
    total = 0
    for table, chosen in zip(tables, dims, strict=True):
        kept = [(rows, dim) for rows, dim in zip(table.blocks.sizes, chosen, strict=True) if rows]
        total += sum(rows * dim for rows, dim in kept) * (table.spec.dtype.itemsize if unit == "bytes" else 1)
        if remaps and unit == "bytes" and len({dim for _, dim in kept}) > 1:
            total += remap_bytes(table.spec)
    return total


def _size(plan: SizePlan, unit: str) -> int:
    return plan.size_bytes if unit == "bytes" else plan.n_params


def _prefixes(gate: Tensor, dims: Sequence[int]) -> Tensor:
    """Return a gate (S, D) that is one for the first columns of each block, and zero for the others."""
    kept = torch.arange(gate.shape[1], device=gate.device) < torch.tensor(dims, device=gate.device)[:, None]
    return kept.to(gate.dtype)
