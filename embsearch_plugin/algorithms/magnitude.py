"""Magnitude pruning: what to keep is read off the trained dense tables (Han et al., 2015), the baseline of dnis.txt, 3.4.

The model trains as it is. Then the (row block, column) pairs with the most energy are kept within the budget, or single
weights above one threshold. Fine-tuning is the training that goes on after ``compact``.

One shot by default. With ``rounds`` above one, pruning and training take turns, as Han et al. advise: round k of n keeps the
share budget ** (k / n) of what all weights cost, so that each round removes the same part of what is left. What is removed
stays so, unless ranks are refreshed (:class:`SearchConfig`'s ``warm_up``): a row has the columns of the block it moves to.

Which weights are small? Han et al. prune each layer by a threshold of its own, a hand-tuned factor times the standard
deviation of its weights. With one factor for all tables that is one threshold for weights that were divided by it
(``relative``; here by the root mean square, as means are near zero). By default weights are compared as they are. Where tables
differ in worth, the size of their weights says so; where rows are trained unequally often, it does not, and a budget may cost
one table everything. Try both.

Differences from Han et al.:
    * Embedding tables only.
    * What is kept is chosen by one exact allocation, or one threshold, over all tables within a budget.
    * (Row block, column) pairs by default; ``fine_grained`` prunes single weights as they do.
    * Fine-tuning keeps the learning rate of the training, where they lower it; a recipe's ``tune`` tries several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.pruning import kept_pairs, kept_weights, prune_pairs, prune_weights
from embsearch_plugin.budget import Budget
from embsearch_plugin.costs import Unit
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, at_least
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.ranges import Ranges

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Magnitude(SearchConfig):
    """Settings of magnitude pruning.

    Args:
        fine_grained: prune single weights instead of (block, column) pairs; in rounds only where tables are plain parameters.
        relative: whether weights are divided by their table's root mean square, removed ones counting as zeros, before they
            are compared.
        threshold: the smallest magnitude that is kept where no budget is (``derive(strict=False)``); where weights are
            ``relative``, in root mean squares of their table.
        rounds: prune so many times, ``every`` weight steps apart, the first time after ``warm_up`` weight steps. What is left
            recovers in between, so set ``every`` to some hundred steps.
    """

    name: ClassVar[str] = "magnitude"
    ranges: ClassVar[Ranges] = {"relative": (False, True)}
    limits: ClassVar[Limits] = {"threshold": at_least(0), "rounds": at_least(1)}
    starts_from: ClassVar[Literal["scratch", "dense"]] = "dense"
    fine_grained: bool = False
    relative: bool = False
    threshold: float = 0.01
    rounds: int = 1

    @property
    def cuts_rows(self) -> bool:
        """Single weights stand in no blocks."""
        return not self.fine_grained

    @property
    def cuts_columns(self) -> bool:
        """Single weights stand in no chunks."""
        return not self.fine_grained

    @property
    def trains(self) -> bool:
        """One shot needs the trained weights only."""
        return self.rounds > 1

    @property
    def searches_within_budget(self) -> bool:
        """Every round's share follows from the budget."""
        return self.rounds > 1

    @property
    def least_search_steps(self) -> int:
        """A plan is what is left after the last round."""
        return self.rounds

    def build(self) -> "MagnitudeSearch":
        """Return the algorithm of one session."""
        return MagnitudeSearch(self)


class MagnitudeSearch:
    """Magnitude pruning in one session. In one shot all stays as it is; in rounds what is removed stays removed."""

    def __init__(self, config: Magnitude) -> None:
        self.config = config

    @hookimpl
    def embsearch_search_step(self, session: "Session") -> Mapping[str, float]:
        """Remove what this round removes; with one round there is nothing to do before the end."""
        done = session.search_steps + 1
        if self.config.rounds == 1 or done > self.config.rounds:
            return {}
        ceiling = _ceiling(session, done / self.config.rounds, self.config.fine_grained)
        if self.config.fine_grained:
            masks = kept_weights(session, ceiling, relative=self.config.relative)
            session.keep_weights(masks)
            return {"weights_kept": sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)}
        left = kept_pairs(session, ceiling, relative=self.config.relative)
        gates = [gate * kept for gate, kept in zip(session.gates, left, strict=True)]
        session.set_gates(gates)
        return {"gates_open": sum(float(gate.sum()) for gate in gates) / sum(gate.numel() for gate in gates)}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Keep what is large."""
        prune = prune_weights if self.config.fine_grained else prune_pairs
        return prune(session, budget, self.config.threshold, relative=self.config.relative)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the weights, and the session's gates and kept weights, say it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""


def _ceiling(session: "Session", part: float, fine_grained: bool) -> Budget:
    """Return the budget of a round: from what all weights cost (``part`` 0) to the session's budget (1), in equal ratios."""
    unit = session.budget.unit
    whole = sum(unit.weights(spec, spec.n_params) for spec in session.specs)
    if fine_grained:  # single weights are stored with their places
        whole += sum(unit.fine_index(spec, spec.n_params) for spec in session.specs)
    share = min(session.budget.limit(session.original_bytes) / whole, 1)
    if part == 1 or share == 0:
        return session.budget
    amount = max(round(whole * share**part), 1)
    return Budget(params=amount) if unit is Unit.PARAMETERS else Budget(bytes=amount)


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register magnitude pruning."""
    return [Magnitude]
