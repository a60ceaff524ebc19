"""Uniform: one smaller dim for every table, what a user tries first (MiD, MaD and FIXED of the papers).

Once the first step is done, gates are one for the first d columns and zero for the others; so the model trains as if its
tables had d columns, padded with zeros to their width outside the lookup. The network is unchanged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.allocation import Dims, FixedAllocation, WholeTableConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError, SettingsError, SpaceError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Uniform(WholeTableConfig):
    """Settings of a uniform dim.

    Args:
        dim: the dim to train with, which the budget must hold; by default the largest multiple of the space's ``align``
            within it. Tables narrower than it keep their own. It must be a multiple of ``align``: the papers' dims, 2 (MiD)
            and 10 (MaD), take ``space=SearchSpace(align=1)``.
    """

    name: ClassVar[str] = "uniform"
    dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim is not None and self.dim < 1:
            raise SettingsError(f"dim must be at least 1; got {self.dim}")

    @property
    def same_at_every_budget(self) -> bool:
        """A dim that was asked for does not depend on the budget."""
        return self.dim is not None

    def check(self, tables: Sequence[Table], space: SearchSpace) -> None:
        """Make sure that the dim that was asked for can be stored."""
        super().check(tables, space)
        aligned(tables, [self.dim or 0] * len(tables), space.align)

    def build(self) -> "UniformSearch":
        """Return the algorithm of one session."""
        return UniformSearch(self)


class UniformSearch(FixedAllocation):
    """A uniform dim in one session: gates that are set once."""

    def __init__(self, config: Uniform) -> None:
        self.config = config

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the dim that was asked for, or the largest that fits.

        Raises:
            BudgetError, SpaceError: where it does not fit the budget, or the space's ``align``.
        """
        if self.config.dim is None:
            return same_dim(session, largest_dim(session.specs, budget, session.space.align))
        if not fitting_dims(session.specs, budget, [self.config.dim]):
            raise BudgetError(does_not_fit(session.specs, budget, self.config.dim, "leave out dim, for the largest that fits"))
        return same_dim(session, self.config.dim)


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


def _cost(specs: Sequence[Table], dim: int, unit: str) -> int:
    return sum(spec.rows * min(dim, spec.dim) * (spec.dtype.itemsize if unit == "bytes" else 1) for spec in specs)


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register uniform dims."""
    return [Uniform]
