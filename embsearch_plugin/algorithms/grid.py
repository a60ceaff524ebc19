"""Grid search: every uniform dim of a grid is trained, and the best on validation is kept (dnis.txt, 3.1: 4 to 64 by 4).

What the papers compare their searches with, and what a user does who has the time. A budget is a ceiling: of the grid, the
dims that it holds are tried, and a small one may win.

In a session of its own it is :class:`Uniform` with the largest dim of the grid that fits. A loop that searches the grid
trains a model for each ``config.allocations(...)``, as ``embsearch run`` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.allocation import Dims, FixedAllocation, WholeTableConfig
from embsearch_plugin.algorithms.parts.uniform_dims import aligned, does_not_fit, fitting_dims, same_dim
from embsearch_plugin.algorithms.uniform import Uniform
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError, SettingsError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Grid(WholeTableConfig):
    """Settings of a grid search.

    Args:
        dims: the grid, ascending. Dims beyond the widest table, over the budget, or that are no multiple of the space's
            ``align``, are left out.
    """

    name: ClassVar[str] = "grid"
    dims: tuple[int, ...] = tuple(range(4, 65, 4))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dims or self.dims[0] < 1 or any(left >= right for left, right in pairwise(self.dims)):
            raise SettingsError(f"dims must hold at least one, be positive and ascending, no one twice; got {list(self.dims)}")

    def check(self, tables: Sequence[Table], space: SearchSpace) -> None:
        """Make sure that a dim of the grid can be stored."""
        super().check(tables, space)
        if not self._storable(tables, space.align):
            aligned(tables, [self.dims[0]] * len(tables), space.align)

    def allocations(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> Sequence[SearchConfig]:
        """Return a uniform dim for each of the grid that can be stored, within the budget and the widest table.

        Raises:
            BudgetError: where there is none.
        """
        return [Uniform(dim=dim) for dim in self.fitting(tables, budget, space.align)]

    def fitting(self, tables: Sequence[Table], budget: Budget, align: int) -> list[int]:
        """Return the dims of the grid that can be stored, within the budget and the widest table.

        Raises:
            BudgetError: where there is none.
        """
        fitting = fitting_dims(tables, budget, self._storable(tables, align))
        if not fitting:
            raise BudgetError(does_not_fit(tables, budget, self.dims[0], f"smaller dims (the grid has {list(self.dims)})"))
        return fitting

    def _storable(self, tables: Sequence[Table], align: int) -> list[int]:
        widths = {table.dim for table in tables}
        within = [dim for dim in self.dims if dim <= max(widths)]
        return [dim for dim in within if dim % align == 0 or all(dim >= width for width in widths)]

    def build(self) -> "GridSearch":
        """Return the algorithm of one session."""
        return GridSearch(self)


class GridSearch(FixedAllocation):
    """One session of a grid search: the largest dim of the grid that fits."""

    def __init__(self, config: Grid) -> None:
        self.config = config

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the largest dim of the grid within the budget."""
        return same_dim(session, self.config.fitting(session.specs, budget, session.space.align)[-1])


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register grid search."""
    return [Grid]
