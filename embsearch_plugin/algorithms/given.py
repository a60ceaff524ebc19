"""Given: one dim for each table, as it is told. No search at all: what a plain hyperparameter search tunes, as a baseline.

A study may vary the dims themselves, one parameter per table (``given.dims.t_user``), and no algorithm takes part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.allocation import Dims, FixedAllocation, WholeTableConfig
from embsearch_plugin.algorithms.parts.uniform_dims import aligned, largest_dim, same_dim
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError, SettingsError, SpaceError, did_you_mean
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Given(WholeTableConfig):
    """Settings of given dims.

    Args:
        dims: the dim of each table, by its name, or by its name with the collection's path before it; 0 leaves it out, and one
            that is not named keeps its own. What is wider than its table is as wide as that. With none, the largest uniform dim
            that fits.
    """

    name: ClassVar[str] = "given"
    dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(type(dim) is not int or dim < 0 for dim in self.dims.values()):
            raise SettingsError(f"dims must be at least 0, and whole numbers; got {dict(self.dims)}")

    def check(self, tables: Sequence[Table], space: SearchSpace) -> None:
        """Make sure that there are such tables, and that their dims can be stored."""
        super().check(tables, space)
        self.widths(tables, space)

    def widths(self, tables: Sequence[Table], space: SearchSpace) -> list[int]:
        """Return each table's dim.

        Raises:
            SpaceError: where a table does not exist, or a dim is no multiple of the space's ``align``.
        """
        names = [[table.name, str(table)] for table in tables]
        unknown = next((name for name in self.dims if not any(name in both for both in names)), None)
        if unknown is not None:
            known = [path for _, path in names]
            raise SpaceError(f"dims must be of tables of the model; there is no {unknown!r}.{did_you_mean(unknown, known)}")
        dims = [self.dims.get(str(table), self.dims.get(table.name, table.dim)) for table in tables]
        return aligned(tables, dims, space.align)

    def build(self) -> "GivenDims":
        """Return the algorithm of one session."""
        return GivenDims(self)


class GivenDims(FixedAllocation):
    """Given dims in one session."""

    def __init__(self, config: Given) -> None:
        self.config = config

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the dims as they are given.

        Raises:
            BudgetError: where the budget does not hold them.
        """
        if not self.config.dims:
            return same_dim(session, largest_dim(session.specs, budget, session.space.align))
        chosen = self.config.widths(session.specs, session.space)
        sizes = [(spec, spec.rows * dim) for spec, dim in zip(session.specs, chosen, strict=True)]
        needed = sum(budget.unit.weights(spec, count) for spec, count in sizes)
        if needed > budget.limit(session.original_bytes):
            raise BudgetError(
                f"the given dims do not fit {budget}: they need {needed:,} {budget.unit}.\n  Possible "
                "solutions: 1) smaller dims  2) raise the budget to that."
            )
        return [(dim,) * len(table.blocks.sizes) for dim, table in zip(chosen, session.tables, strict=True)]


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register given dims."""
    return [Given]
