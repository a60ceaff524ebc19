"""From merged weights (weights times gates) to size plans: by (row block, column) pairs, or weight by weight.

Weights are compared over all tables as they are or, where they are ``relative``, divided by the root mean square of their
table: what is small for its table goes, and no table goes because its weights are smaller than another's.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embsearch_plugin.algorithms.parts.prefixes import Prefixes
from embsearch_plugin.budget import Budget
from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import AllocationError, BudgetError
from embsearch_plugin.knapsack import allocate_among
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.search.tables import SearchTable

_TINY = 1e-30  # what a table of zeros is divided by


def prune_pairs(session: "Session", budget: Budget | None, threshold: float, *, relative: bool = False) -> SizePlan:
    """Choose a dim per row block: the most energy within the budget, or every pair above the threshold."""
    energies = _energies(session, relative)
    if budget is not None:
        return best_pairs(session.tables, energies, budget, session.space)
    tables = _pairs_of(session.tables, energies, session.space)
    return SizePlan(tuple(pairs.plan(_above(pairs, threshold)) for pairs in tables), session.space.align)


def best_pairs(tables: Sequence["SearchTable"], energies: Sequence[Tensor], budget: Budget, space: SearchSpace) -> SizePlan:
    """Return the plan that keeps the most energy within the budget.

    Args:
        tables: the tables, and how their rows are cut.
        energies: what each (block, column) pair of a table is worth, per table (S, D).
        budget: the ceiling; what adds no energy is not bought.
        space: the candidate dims.

    Raises:
        BudgetError: where no plan fits.
    """
    candidates = _pairs_of(tables, energies, space)
    chosen = _largest(candidates, budget)
    return SizePlan(tuple(pairs.plan(dims) for pairs, dims in zip(candidates, chosen, strict=True)), space.align)


def kept_pairs(session: "Session", budget: Budget, *, relative: bool = False) -> list[Tensor]:
    """Return which pairs :func:`prune_pairs` would keep within ``budget``: per table (S, D), one or zero."""
    candidates = _pairs_of(session.tables, _energies(session, relative), session.space)
    chosen = _largest(candidates, budget)
    return [pairs.mask(dims).to(g.device) for pairs, dims, g in zip(candidates, chosen, session.gates, strict=True)]


def _energies(session: "Session", relative: bool) -> list[Tensor]:
    """Return the sum of squares of each (block, column) pair, per table (S, D)."""
    energies = [session.block_energy(index) for index in range(len(session.tables))]
    if not relative:
        return energies
    means = [energy.sum() / max(spec.n_params, 1) for energy, spec in zip(energies, session.specs, strict=True)]
    return [energy / mean.clamp(min=_TINY) for energy, mean in zip(energies, means, strict=True)]


def _pairs_of(tables: Sequence["SearchTable"], energies: Sequence[Tensor], space: SearchSpace) -> list[Prefixes]:
    return [
        Prefixes(table, energy, space.of(table.spec).dims(table.spec.dim))
        for table, energy in zip(tables, energies, strict=True)
    ]


def _largest(candidates: Sequence[Prefixes], budget: Budget) -> list[tuple[int, ...]]:
    """Allocate dims, per table one for all blocks or one for each, that keep the most energy within the budget."""
    limit = budget.limit(sum(pairs.table.spec.size_bytes for pairs in candidates))
    return [dims for _, dims in allocate_among([pairs.ways(budget.unit) for pairs in candidates], limit, budget.unit)]


def _above(pairs: Prefixes, threshold: float) -> tuple[int, ...]:
    """Return, per block, the smallest dim that keeps every column whose root mean square reaches the threshold."""
    sizes = torch.tensor(pairs.table.blocks.sizes, dtype=torch.float64).clamp(min=1)
    kept = (pairs.worth / sizes[:, None]).sqrt() >= threshold
    return pairs.at_least((kept * torch.arange(1, kept.shape[1] + 1)).amax(1).tolist())


def prune_weights(session: "Session", budget: Budget | None, threshold: float, *, relative: bool = False) -> SizePlan:
    """Keep the weights whose merged value reaches one threshold over all tables (dnis.txt, Eq. 9).

    Raises:
        AllocationError: where a weight is not a finite number: no threshold would say what to keep.
        BudgetError: where no plan fits.
    """
    plans = []
    for table, mask in zip(session.tables, kept_weights(session, budget, threshold, relative=relative), strict=True):
        rows = [table.blocks.rows_of(block) for block in range(len(table.blocks.sizes))]
        kept = bool(mask.any())
        plans.append(TablePlan.fine(table.spec, mask, rows) if kept else TablePlan.nested(table.spec, [0], [torch.cat(rows)]))
    return SizePlan(tuple(plans), session.space.align)


def kept_weights(session: "Session", budget: Budget | None, threshold: float = 0.0, *, relative: bool = False) -> list[Tensor]:
    """Return which single weights :func:`prune_weights` keeps: per table bool (V, D)."""
    for table, magnitudes in zip(session.tables, _magnitudes(session, relative), strict=True):
        if not bool(magnitudes.isfinite().all()):
            raise AllocationError(
                f"the weights of a table must be finite numbers; those of {str(table.spec)!r} are not.\n"
                "  Possible solution: look for NaN or infinity in the tables' weights; the training may have diverged."
            )
    least = threshold if budget is None else _bisect(session, budget, relative)
    return [_reaches(magnitudes, least) for magnitudes in _magnitudes(session, relative)]


def _bisect(session: "Session", budget: Budget, relative: bool) -> float:
    """Return the smallest threshold whose plan is within the budget."""
    limit = budget.limit(session.original_bytes)
    largest = max(float(magnitudes.max()) for magnitudes in _magnitudes(session, relative))
    low, high = 0.0, largest * (1 + 1e-6) + 1e-30  # at `high` nothing is kept, and nothing costs nothing
    if _fine_cost(session, low, budget.unit, relative) <= limit:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _fine_cost(session, middle, budget.unit, relative) <= limit else (middle, high)
    if _fine_cost(session, high, budget.unit, relative) > limit:
        raise BudgetError(
            f"no fine-grained plan fits {budget.unit.text(limit)}: not even a single weight with its places.\n  Possible "
            "solutions: 1) raise the budget  2) prune blocks and columns instead (fine_grained=False)."
        )
    return high


def _magnitudes(session: "Session", relative: bool) -> Iterator[Tensor]:
    for index in range(len(session.tables)):
        weight = session.merged_weight(index)
        yield weight.abs() / weight.square().mean().sqrt().clamp(min=_TINY) if relative else weight.abs()


def _reaches(magnitudes: Tensor, threshold: float) -> Tensor:
    """Return which weights reach the threshold; never those that are zero, as what was pruned before is."""
    return (magnitudes >= threshold) & (magnitudes > 0)


def _fine_cost(session: "Session", threshold: float, unit: Unit, relative: bool) -> int:
    total = 0
    for table, magnitudes in zip(session.tables, _magnitudes(session, relative), strict=True):
        kept = int(_reaches(magnitudes, threshold).sum())
        if kept:
            total += unit.weights(table.spec, kept) + unit.fine_index(table.spec, kept)
    return total
