"""Uniform: one smaller dim for every table, what a user tries first (MiD, MaD and FIXED of the papers).

Once the first step is done, gates are one for the first d columns and zero for the others; so the model trains as if its
tables had d columns, padded with zeros to their width outside the lookup. The network is unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.budget import Budget, human_bytes
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan, TablePlan

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Uniform(AlgorithmConfig):
    """Settings of a uniform dim.

    Args:
        dim: the dim to train with; by default the largest multiple of the space's ``align`` within the session's budget.
            Tables narrower than it keep their own.
    """

    name: ClassVar[str] = "uniform"
    warm_up: int = 0
    dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"dim must be at least 1; got {self.dim}")

    @property
    def trains(self) -> bool:
        """Sizes are known before any training."""
        return False

    def build(self) -> "UniformSearch":
        """Return the algorithm of one session."""
        return UniformSearch(self)


class UniformSearch:
    """A uniform dim in one session: gates that are set once."""

    def __init__(self, config: Uniform) -> None:
        self.config = config

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """Let the first d columns through."""
        dim = self.config.dim or largest_dim(session.specs, session.budget, session.space.align)
        gates = [torch.zeros_like(gate) for gate in session.gates]
        for gate in gates:
            gate[:, :dim] = 1
        session.set_gates(gates)

    @hookimpl
    def embsearch_search_step(self) -> Mapping[str, float]:
        """Leave everything as it is."""
        return {}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Keep the first columns of every table: as many as fit, or as were trained where no budget is kept."""
        trained = max(int(gate[0].sum()) for gate in session.gates)
        fitting = trained if budget is None else largest_dim(session.specs, budget, session.space.align)
        dim = min(trained, fitting)
        rows = [table.blocks.order for table in session.tables]
        plans = [TablePlan.nested(s, [min(dim, s.dim)], [order]) for s, order in zip(session.specs, rows, strict=True)]
        return SizePlan(tuple(plans), session.space.align)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the session keeps the gates."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""


def largest_dim(specs: Sequence[Table], budget: Budget, align: int) -> int:
    """Return the largest dim, a multiple of ``align``, that all tables can have within ``budget``.

    Raises:
        BudgetError: where not even the smallest fits.
    """
    limit = budget.limit(sum(spec.size_bytes for spec in specs))
    weight = {spec: spec.dtype.itemsize if budget.unit == "bytes" else 1 for spec in specs}

    def cost(dim: int) -> int:
        return sum(spec.rows * min(dim, spec.dim) * weight[spec] for spec in specs)

    widest = max(spec.dim for spec in specs)
    fitting = [dim for dim in (*range(align, widest, align), widest) if cost(dim) <= limit]
    if not fitting:
        smallest = human_bytes(cost(align)) if budget.unit == "bytes" else f"{cost(align):,} parameters"
        raise BudgetError(
            f"no uniform dim fits {budget}: dim {align} needs {smallest}.\n  Possible solutions: 1) raise the budget to "
            f"{smallest}  2) a smaller align (it is {align})."
        )
    return fitting[-1]


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register uniform dims."""
    return [Uniform]
