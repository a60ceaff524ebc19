"""Magnitude pruning: what to keep is read off the trained dense tables (Han et al., 2015), the baseline of dnis.txt, 3.4.

The model trains as it is. Then the (row block, column) pairs with the most energy are kept within the budget, in one shot, or
single weights above one threshold. Fine-tuning is the training that goes on after ``compact``.

Differences from Han et al.: one shot, where they prune and retrain by turns; embedding tables only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.algorithms.pruning import prune_pairs, prune_weights
from embsearch_plugin.budget import Budget
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Magnitude(AlgorithmConfig):
    """Settings of magnitude pruning.

    Args:
        fine_grained: prune single weights instead of (block, column) pairs.
        threshold: the smallest magnitude that is kept where no budget is (``derive(strict=False)``).
    """

    name: ClassVar[str] = "magnitude"
    fine_grained: bool = False
    threshold: float = 0.01

    def build(self) -> "MagnitudeSearch":
        """Return the algorithm of one session."""
        return MagnitudeSearch(self)


class MagnitudeSearch:
    """Magnitude pruning in one session. Its gates stay at one, and a search step learns nothing."""

    def __init__(self, config: Magnitude) -> None:
        self.config = config

    @hookimpl
    def embsearch_search_step(self) -> Mapping[str, float]:
        """Leave everything as it is."""
        return {}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Keep what is large."""
        prune = prune_weights if self.config.fine_grained else prune_pairs
        return prune(session, budget, self.config.threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the weights say it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register magnitude pruning."""
    return [Magnitude]
