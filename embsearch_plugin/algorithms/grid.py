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
from embsearch_plugin.algorithms.parts.fixed import Dims, FixedAllocation, WholeTableConfig
from embsearch_plugin.algorithms.uniform import Uniform, does_not_fit, fitting_dims, same_dim
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Grid(WholeTableConfig):
    """Settings of a grid search.

    Args:
        dims: the grid, ascending. Dims beyond the widest table, or over the budget, are left out.
    """

    name: ClassVar[str] = "grid"
    dims: tuple[int, ...] = tuple(range(4, 65, 4))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dims or self.dims[0] < 1 or any(left >= right for left, right in pairwise(self.dims)):
            raise ValueError(f"dims must hold at least one, be positive and ascending, no one twice; got {list(self.dims)}")

    def allocations(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> Sequence[SearchConfig]:
        """Return a uniform dim for each of the grid that is within the budget and the widest table.

        Raises:
            BudgetError: where there is none.
            SpaceError: where one could not be stored.
        """
        uniform = [Uniform(dim=dim) for dim in self.fitting(tables, budget)]
        return [same for each in uniform for same in each.allocations(tables, budget, space)]

    def fitting(self, tables: Sequence[Table], budget: Budget) -> list[int]:
        """Return the dims of the grid that are within the budget and the widest table.

        Raises:
            BudgetError: where there is none.
        """
        widest = max(table.dim for table in tables)
        fitting = fitting_dims(tables, budget, [dim for dim in self.dims if dim <= widest])
        if not fitting:
            raise BudgetError(does_not_fit(tables, budget, self.dims[0], f"smaller dims (the grid has {list(self.dims)})"))
        return fitting

    def build(self) -> "GridSearch":
        """Return the algorithm of one session."""
        return GridSearch(self)


class GridSearch(FixedAllocation):
    """One session of a grid search: the largest dim of the grid that fits."""

    def __init__(self, config: Grid) -> None:
        self.config = config

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the largest dim of the grid within the budget."""
        return same_dim(session, self.config.fitting(session.specs, budget)[-1])


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register grid search."""
    return [Grid]
