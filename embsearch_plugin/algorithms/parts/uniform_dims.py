"""One dim for every table: which can be stored, which fit a budget, and the largest that does."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from embsearch_plugin.algorithms.parts.allocation import Dims
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import BudgetError, SpaceError

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


def same_dim(session: "Session", dim: int) -> Dims:
    """Return one dim for all row blocks, cut off at the width of their table.

    Raises:
        SpaceError: where it is no multiple of the space's ``align``.
    """
    widths = aligned(session.specs, [dim] * len(session.specs), session.space.align)
    return [(width,) * len(table.blocks.sizes) for table, width in zip(session.tables, widths, strict=True)]


def aligned(specs: Sequence[Table], dims: Sequence[int], align: int) -> list[int]:
    """Return a dim for each table, cut off at its width.

    Raises:
        SpaceError: where one is neither a multiple of ``align`` nor the table's width: it could not be stored.
    """
    widths = [min(dim, spec.dim) for dim, spec in zip(dims, specs, strict=True)]
    for width, spec in zip(widths, specs, strict=True):
        if width % align and width != spec.dim:
            raise SpaceError(
                f"dims must be multiples of align={align}; got {width} for table {str(spec)!r}.\n"
                "  Possible solutions: 1) another dim  2) space=es.SearchSpace(align=1), where no fused kernel needs more."
            )
    return widths


def largest_dim(specs: Sequence[Table], budget: Budget, align: int) -> int:
    """Return the largest dim, a multiple of ``align``, that all tables can have within ``budget``.

    Raises:
        BudgetError: where not even the smallest fits.
    """
    widest = max(spec.dim for spec in specs)
    fitting = fitting_dims(specs, budget, (*range(align, widest, align), widest))
    if not fitting:
        raise BudgetError(does_not_fit(specs, budget, min(align, widest), f"a smaller align (it is {align})"))
    return fitting[-1]


def fitting_dims(specs: Sequence[Table], budget: Budget, dims: Iterable[int]) -> list[int]:
    """Return those of ``dims`` that all tables can have within ``budget``."""
    limit = budget.limit(sum(spec.size_bytes for spec in specs))
    return [dim for dim in dims if _cost(specs, dim, budget.unit) <= limit]


def does_not_fit(specs: Sequence[Table], budget: Budget, dim: int, otherwise: str) -> str:
    """Say that ``dim`` is over the budget, and what to try."""
    cost = _cost(specs, dim, budget.unit)
    needed = f"{cost:,} {budget.unit}"
    return (
        f"no uniform dim fits {budget}: dim {dim} needs {needed}.\n  Possible solutions: 1) raise the budget to {needed}  "
        f"2) {otherwise}."
    )


def _cost(specs: Sequence[Table], dim: int, unit: Unit) -> int:
    return sum(unit.weights(spec, spec.rows * min(dim, spec.dim)) for spec in specs)
