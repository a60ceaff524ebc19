"""DNIS: Differentiable Neural Input Search (Cheng, Shen, Huang, 2020).

A soft selection layer alpha, one row per row block and one column per embedding dimension, multiplies the embeddings
(Eq. 4). It starts at one, descends the validation loss with an Adam of its own, and is clipped to [0, 1] (Algorithm 1).
Afterwards it is merged into the embeddings, and what is small there is pruned (2.5).

Differences from the paper:
    * The number of blocks is the space's, by default six at most, the smallest of frequent rows; L is 10 for MovieLens and 6
      for Criteo there (3.1).
    * Rows are cut per table by default; ``SearchSpace(scope="global")`` sorts the features of all tables in one list, as
      in 2.3.
    * The pruning threshold of Eq. 9 is tuned by hand there; here it follows from the budget.
    * The default plan keeps whole (block, column) pairs, which kernels can read. A pair's worth is the energy (sum of squares)
      of its merged weights: keeping the largest elements of a matrix, Eq. 9, is keeping most of its energy. The columns of a
      table share one order of worth, so that each block keeps a prefix of it.
    * ``fine_grained=True`` is Eq. 9 itself, with compressed sparse rows in place of COO: their indices are smaller.
    * Alpha rests for the first ``warm_up`` weight steps, while rows are counted to be ranked, and stops by ``patience`` of its
      own; Algorithm 1 has neither, and ends when the validation loss has converged.
    * In runs the pruned model is trained on (fine-tuned); there it is what the search left (2.5).
    * Second-order gradients (Eq. 7) differentiate the virtual step exactly, where DARTS takes finite differences; ``xi`` is
      a plain SGD step there whatever optimizer the user has, as in Eq. 6.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.pruning import prune_pairs, prune_weights
from embsearch_plugin.budget import Budget
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, above, at_least
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.ranges import Range, Ranges

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Dnis(SearchConfig):
    """Settings of DNIS.

    Args:
        lr: learning rate of Adam for alpha (3.1).
        xi: learning rate of the virtual weight step (Eq. 6); 0 is the first-order approximation.
        fine_grained: prune single weights (Eq. 9) instead of (block, column) pairs.
        threshold: epsilon of Eq. 9, used where no budget is kept (``derive(strict=False)``): the least magnitude of a weight
            that is kept, or the least root mean square of a pair.
        epsilon: of Eq. 8, against division by zero.
        patience: stop searching when the mean validation loss of ``window`` search steps has not improved for so many
            windows; alpha then stays as it is.
        window: search steps over which the loss is averaged.
    """

    name: ClassVar[str] = "dnis"
    limits: ClassVar[Limits] = {
        "lr": above(0),
        "xi": at_least(0),
        "threshold": at_least(0),
        "epsilon": above(0),
        "patience": at_least(1),
        "window": at_least(1),
    }
    ranges: ClassVar[Ranges] = {
        "lr": Range(1e-3, 0.1, log=True),
        "warm_up": Range(10, 1000, log=True),
        "every": (1, 2, 4),
    }
    lr: float = 0.01
    xi: float = 0.0
    fine_grained: bool = False
    threshold: float = 0.01
    epsilon: float = 1e-7
    patience: int = 10
    window: int = 100

    @property
    def cuts_columns(self) -> bool:
        """Single weights stand in no chunks."""
        return not self.fine_grained

    def build(self) -> "DnisSearch":
        """Return a new search."""
        return DnisSearch(self)


class DnisSearch:
    """One search by DNIS."""

    def __init__(self, config: Dnis) -> None:
        self.config = config
        self.alpha: list[Tensor] = []  # per table (S, D); one for all tables where blocks are global
        self._optimizer: torch.optim.Adam | None = None
        self._stop = _EarlyStop(config.patience, config.window)

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """Alpha starts as an all-one matrix (Algorithm 1, line 4)."""
        self._set_alpha([torch.ones_like(gate) for gate in self._shared(session, session.gates)])

    @hookimpl
    def embsearch_search_step(self, session: "Session", step: int, batch: Any) -> Mapping[str, float]:
        """Lines 7 to 9 of Algorithm 1: gradient, normalization, descent and clipping."""
        if self._stop.stopped:
            return {}
        assert self._optimizer is not None
        loss, gradients = session.probe.gate_gradients(batch, self._gates(session, self.alpha), self.alpha, self.config.xi)
        for alpha, gradient in zip(self.alpha, gradients, strict=True):
            alpha.grad = normalized(gradient, self.config.epsilon)
        self._optimizer.step()
        with torch.no_grad():
            for alpha in self.alpha:
                alpha.clamp_(0, 1)
        session.set_gates(self._gates(session, self.alpha))
        self._stop.saw(loss)
        return {"loss": loss, **self._summary()}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Merge alpha into the embeddings and prune (2.5)."""
        if self.config.fine_grained:
            return prune_weights(session, budget, self.config.threshold)
        return prune_pairs(session, budget, self.config.threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return alpha, its Adam's state, and what early stopping has seen."""
        optimizer = self._optimizer.state_dict() if self._optimizer else None
        return {
            "alpha": [alpha.detach() for alpha in self.alpha],
            "optimizer": optimizer,
            "stop": vars(self._stop).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._set_alpha(list(state["alpha"]))
        if self._optimizer is not None and state["optimizer"]:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors
        vars(self._stop).update(state["stop"])

    def _set_alpha(self, values: Sequence[Tensor]) -> None:
        self.alpha = [value.clone().requires_grad_() for value in values]
        self._optimizer = torch.optim.Adam(self.alpha, lr=self.config.lr) if self.alpha else None

    def _shared(self, session: "Session", gates: Sequence[Tensor]) -> list[Tensor]:
        if session.space.scope == "table":
            return list(gates)
        return [max(gates, key=lambda gate: gate.shape[1])]

    def _gates(self, session: "Session", alpha: Sequence[Tensor]) -> list[Tensor]:
        """Return each table's rows and columns of alpha."""
        if session.space.scope == "table":
            return list(alpha)
        return [alpha[0][:, : table.spec.dim] for table in session.tables]

    def _summary(self) -> dict[str, float]:
        values = torch.cat([alpha.detach().flatten() for alpha in self.alpha])
        return {"alpha_mean": float(values.mean()), "alpha_below_half": float((values < 0.5).float().mean())}


def normalized(gradient: Tensor, epsilon: float) -> Tensor:
    """Divide each row of a gradient (S, D) by the mean of its absolute values (Eq. 8)."""
    return gradient / (gradient.abs().mean(dim=1, keepdim=True) + epsilon)


class _EarlyStop:
    """Says when a loss, averaged over windows of steps, has stopped improving."""

    def __init__(self, patience: int, window: int) -> None:
        self.patience, self.window = patience, window
        self.total, self.seen, self.best, self.bad = 0.0, 0, float("inf"), 0

    @property
    def stopped(self) -> bool:
        return self.bad >= self.patience

    def saw(self, loss: float) -> None:
        self.total, self.seen = self.total + loss, self.seen + 1
        if self.seen == self.window:
            mean = self.total / self.window
            self.best, self.bad = (mean, 0) if mean < self.best else (self.best, self.bad + 1)
            self.total, self.seen = 0.0, 0


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register DNIS."""
    return [Dnis]
