"""Random search: dims are drawn several times, each draw is trained, and the best on validation is kept.

    ``by="table"``   a dim for each table, ten times (RaS; autodim.txt, III.D)
    ``by="block"``   dims that fall from row block to row block, frequent rows first, sixteen times (dnis.txt, 3.1)

Differences from the papers:
    * Their draws have no budget. Here the dims of a draw are multiplied by one number and rounded, so that they are the largest
      in these proportions that fit (:func:`proportional`). Almost no draw would fit a small budget as it is, and one that
      is far below a large one would be a weak rival.
    * Dims are drawn from all multiples of the space's ``align`` up to a table's width; AutoDim draws from five candidates.
    * DNIS draws one sequence for blocks of all features; so does this in a ``SearchSpace(scope="global")``. Where rows are cut
      per table, each table has a sequence of its own.

In a session of its own it is one draw: ``es.Random(draw=3)``. A loop that searches trains a model for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.allocation import Dims, FixedAllocation, FixedConfig, proportional
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SettingsError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, at_least
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Random(FixedConfig):
    """Settings of random search.

    Args:
        by: what a dim is drawn for: each ``"table"``, or each row ``"block"``, in descending order within a table.
        draws: how many draws are tried; by default as many as in the papers.
        draw: the number of one draw, from 0, to try that alone; a session by itself takes the first by default.
        seed: of the draws. A draw is the same for every seed of a run, so that what is chosen on one is used on all.
    """

    name: ClassVar[str] = "random"
    ranges: ClassVar[Ranges] = {"by": ("table", "block"), "draw": Range(0, 15)}
    limits: ClassVar[Limits] = {"draws": at_least(1), "draw": at_least(0), "seed": at_least(0)}
    by: Literal["table", "block"] = "table"
    draws: int | None = None
    draw: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("table", "block"):
            raise SettingsError(f"by must be 'table' or 'block'; got {self.by!r}")

    @property
    def n_draws(self) -> int:
        """How many draws are tried."""
        return (10 if self.by == "table" else 16) if self.draws is None else self.draws

    @property
    def cuts_rows(self) -> bool:
        """Where a dim is drawn for each block."""
        return self.by == "block"

    def allocations(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> Sequence[SearchConfig]:
        """Return a config for each draw."""
        return [replace(self, draw=draw) for draw in range(self.n_draws)] if self.draw is None else [self]

    def build(self) -> "RandomSearch":
        """Return the algorithm of one session."""
        return RandomSearch(self)


class RandomSearch(FixedAllocation):
    """One draw in one session."""

    def __init__(self, config: Random) -> None:
        self.config = config

    def dims(self, session: "Session", budget: Budget) -> Dims:
        """Return the draw, as large as the budget allows."""
        return proportional(session.tables, self._drawn(session), budget, session.space.align)

    def _drawn(self, session: "Session") -> list[Tensor]:
        """Return what was drawn, per table (S,)."""
        random = torch.Generator().manual_seed(self.config.seed * 1_000_003 + (self.config.draw or 0))
        align, blocks = session.space.align, [len(table.blocks.sizes) for table in session.tables]
        if self.config.by == "table":
            return [_draw(1, spec.dim, align, random).expand(s) for spec, s in zip(session.specs, blocks, strict=True)]
        if session.space.scope == "global":
            sequence = _draw(blocks[0], max(spec.dim for spec in session.specs), align, random)
            return [sequence] * len(blocks)
        return [_draw(s, spec.dim, align, random) for spec, s in zip(session.specs, blocks, strict=True)]


def _draw(count: int, width: int, align: int, random: torch.Generator) -> Tensor:
    """Draw dims from the multiples of ``align`` up to ``width``; return them in descending order: (count,)."""
    drawn = torch.randint(1, max(width // align, 1) + 1, (count,), generator=random) * align
    return drawn.sort(descending=True).values


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register random search."""
    return [Random]
