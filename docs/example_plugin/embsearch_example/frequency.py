"""Frequency: frequent rows keep more columns, and nothing is learned.

A rule of thumb, as a baseline: a row block is worth its share of the table's lookups, and what d columns are worth grows
more slowly than d.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import embsearch_plugin as es
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.costs import Unit
from embsearch_plugin.knapsack import Option, TableOptions, allocate
from embsearch_plugin.limits import Limits, above
from embsearch_plugin.plan import TablePlan
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.search.tables import SearchTable


@dataclass(frozen=True, kw_only=True)
class Frequency(SearchConfig):
    """Settings of the rule.

    Args:
        power: d columns of a row are worth ``d ** power``; below one, so that each further column is worth less.
    """

    name: ClassVar[str] = "frequency"
    limits: ClassVar[Limits] = {"power": above(0)}
    ranges: ClassVar[Ranges] = {"power": Range(0.1, 1.0)}
    power: float = 0.5

    def build(self) -> "FrequencySearch":
        """Return the algorithm of one session."""
        return FrequencySearch(self)


class FrequencySearch:
    """The rule in one session. Its gates stay at one, where they start."""

    def __init__(self, config: Frequency) -> None:
        self.config = config

    @es.hookimpl
    def embsearch_search_step(self, session: es.Session, batch: Any) -> Mapping[str, float]:
        """Learn nothing; report the validation loss."""
        return {"loss": float(session.probe.evaluate(batch, session.gates).loss)}

    @es.hookimpl
    def embsearch_derive(self, session: es.Session, budget: es.Budget | None) -> es.SizePlan:
        """Choose the dims that are worth most within the budget; the rule has no size of its own."""
        budget = budget or session.budget
        options = [
            self._options(table, counts, session.space, budget.unit)
            for table, counts in zip(session.tables, session.frequencies, strict=True)
        ]
        chosen = allocate(options, budget.limit(session.original_bytes), budget.unit)
        plans = [_plan(table, dims) for table, dims in zip(session.tables, chosen, strict=True)]
        return es.SizePlan(tuple(plans), session.space.align)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to go on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""

    def _options(self, table: SearchTable, counts: Tensor, space: es.SearchSpace, unit: Unit) -> TableOptions:
        """Offer every dim for the whole table, and for each row block by itself; then rows need a remap."""
        shares = _shares(table, counts)
        spec, dims = table.spec, space.of(table.spec).dims(table.spec.dim)

        def of(rows: int, share: float) -> tuple[Option, ...]:
            return tuple(Option(dim, unit.weights(spec, rows * dim), share * dim**self.config.power) for dim in dims)

        blocks = tuple(of(rows, share) for rows, share in zip(table.blocks.sizes, shares, strict=True))
        return TableOptions(str(spec), of(spec.rows, 1.0), blocks if len(blocks) > 1 else (), unit.remap(spec))


def _shares(table: SearchTable, counts: Tensor) -> list[float]:
    """Return the share of each row block in the lookups of a table."""
    blocks = [table.blocks.rows_of(block).long() for block in range(len(table.blocks.sizes))]
    return [float(counts[rows].sum() / counts.sum()) for rows in blocks]


def _plan(table: SearchTable, dims: Sequence[int]) -> TablePlan:
    blocks = range(len(table.blocks.sizes))
    per_block = dims if len(dims) > 1 else list(dims) * len(blocks)
    return TablePlan.nested(table.spec, per_block, [table.blocks.rows_of(block) for block in blocks])


@es.hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register the rule."""
    return [Frequency]
