"""MDE: Mixed Dimension Embeddings (Ginart, Naumov, Mudigere, Yang, Zou, 2019; arXiv 1909.11810), a baseline of dnis.txt.

The dim of a row block follows from its popularity p by a power law, d = lambda * p ** alpha, with a temperature alpha
between 0 (one dim for all) and 1 (in proportion). p is the block's mean lookups per row. With one block per table, each read
once per example, that is one over the table's rows: frequent rows get more columns, and large tables fewer.

Differences from the paper:
    * lambda follows from the budget in bytes, indices included: the largest that fits (:func:`proportional`, which also says
      how dims are rounded). The paper sets it so that the most popular block has the base dim.
    * One learned matrix projects all blocks of a table to its width, a block of dim d by its first d rows; the paper has one
      per block. It is counted in the budget. A table that has no more rows than columns, or keeps all columns, has none.
    * The projection is there from the first step of a run, which rewrites the model before it is trained. In a session of one's
      own, the columns are padded with zeros until ``compact`` puts the projection, at first the identity, in their place.
    * The blocks are the search space's, neighbours merged down to ``blocks``, as dnis.txt (3.1) shares one blocking among
      methods.
    * The sixteen settings are four temperatures by four numbers of blocks; dnis.txt does not list its own.

In a session of its own it is one setting: ``es.Mde(temperature=0.4, blocks=1)``. A loop that searches trains a model for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.allocation import Dims, FixedAllocation, FixedConfig, proportional
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.errors import SettingsError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.space import RowBlocks, SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Mde(FixedConfig):
    """Settings of mixed dimensions.

    Args:
        temperatures: the alphas that are tried, each from 0 to 1.
        block_counts: the numbers of row blocks per table that are tried; a table has no more than the space gives it.
        temperature: one alpha, to try that alone; a session by itself takes the first of ``temperatures`` by default.
        blocks: one number of row blocks, likewise.
    """

    name: ClassVar[str] = "mde"
    ranges: ClassVar[Ranges] = {"temperature": Range(0.0, 1.0), "blocks": Range(1, 8)}
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    block_counts: tuple[int, ...] = (1, 2, 4, 8)
    temperature: float | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        alphas, counts = self._tried_temperatures, self._tried_counts
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas) or len(set(alphas)) < len(alphas):
            raise SettingsError(f"temperatures must hold at least one, lie between 0 and 1, and differ; got {list(alphas)}")
        if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
            raise SettingsError(f"block_counts must hold at least one, be at least 1, and differ; got {list(counts)}")

    def allocations(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> Sequence[SearchConfig]:
        """Return a config for each temperature and number of blocks, as far as the space tells them apart."""
        most = max(len(space.of(table).shares) for table in tables)
        counts = dict.fromkeys(min(count, most) for count in self._tried_counts)
        return [replace(self, temperature=alpha, blocks=k) for alpha, k in product(self._tried_temperatures, counts)]

    def build(self) -> "MdeSearch":
        """Return the algorithm of one session."""
        return MdeSearch(self._tried_temperatures[0], self._tried_counts[0])

    @property
    def _tried_temperatures(self) -> tuple[float, ...]:
        return self.temperatures if self.temperature is None else (self.temperature,)

    @property
    def _tried_counts(self) -> tuple[int, ...]:
        return self.block_counts if self.blocks is None else (self.blocks,)


class MdeSearch(FixedAllocation):
    """Mixed dimensions of one temperature in one session."""

    projected: ClassVar[bool] = True

    def __init__(self, temperature: float, blocks: int) -> None:
        self.temperature, self.blocks = temperature, blocks

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the power law's dims, as large as the budget allows."""
        weights = [
            popularity(table.blocks, counts, self.blocks) ** self.temperature
            for table, counts in zip(session.tables, session.frequencies, strict=True)
        ]
        return proportional(session.tables, weights, budget, session.space.align, self.projected)

    @hookimpl
    def embsearch_fold(self, session: "Session", plan: SizePlan) -> Sequence[Fold]:
        """Return projections that start as the identity, which is what padding was."""
        return [Fold(projection=torch.eye(t.width, t.table.dim)) if t.projection else UNFOLDED for t in plan.tables]


def popularity(blocks: RowBlocks, counts: Tensor, groups: int) -> Tensor:
    """Return the mean count per row of each row block (S,), where neighbouring blocks are merged into ``groups`` at most."""
    sizes, order = torch.tensor(blocks.sizes), blocks.order.long()
    lookups = torch.stack([part.sum() for part in counts[order].double().split(list(blocks.sizes))])
    group = torch.arange(len(sizes)) * min(groups, len(sizes)) // len(sizes)
    totals = torch.zeros(2, groups, dtype=torch.float64)
    totals.index_add_(1, group, torch.stack([lookups, sizes.double()]))
    return (totals[0] / totals[1].clamp(min=1))[group]


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register mixed dimensions."""
    return [Mde]
