"""Uniform: one smaller dim for every table, what a user tries first (MiD, MaD and FIXED of the papers).

Once the first step is done, gates are one for the first d columns and zero for the others; so the model trains as if its
tables had d columns, padded with zeros to their width outside the lookup. The network is unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.allocation import Dims, FixedAllocation, WholeTableConfig
from embsearch_plugin.algorithms.parts.uniform_dims import aligned, does_not_fit, fitting_dims, largest_dim, same_dim
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, at_least
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
    limits: ClassVar[Limits] = {"dim": at_least(1)}
    dim: int | None = None

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


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register uniform dims."""
    return [Uniform]
