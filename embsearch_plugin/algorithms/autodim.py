"""AutoDim: Memory-efficient Embedding for Recommendations (Zhao et al., 2020).

Each table has candidate dims. Its output is their sum (Eq. 7), weighed by samples p of a Gumbel-softmax (Eq. 6) of the
selection probabilities alpha, a softmax over a trained vector (III.B). The weights descend the training loss, alpha every
``every`` steps the validation loss (Algorithm 1). The candidate of the largest alpha is the table's dim (Eq. 13), and a
model of these dims is trained from scratch (II.D).

=============  =========  ==========
III.E          lookup     transform
=============  =========  ==========
AutoDim-1      shared     padding     the default: the best and smallest there on MovieLens-1M (Fig. 6)
AutoDim-2      shared     linear
AutoDim-3      separate   padding
AutoDim-4      separate   linear
=============  =========  ==========

Models that need one width, such as factorization machines, keep it: tables are padded to it outside the lookup. III.H advises
against padding there, and to train a linear map per table with the network: ``maps=True``. The plan's tables then have a
projection, as those of a search by ``transform="linear"`` always do, and it is retrained with the table, from the identity.

Differences from the paper:
    * Candidates are transformed to the table's width D, where the paper has d_N, the largest candidate. The network is the
      user's and stays as it is, in retraining too; there the paper narrows its first layer.
    * Eq. 1 has a fully connected layer for each dim; ``transform="linear"`` has them for each table, as III.H has.
    * Algorithm 1 begins with a step of alpha; here the first follows ``every`` weight steps.
    * Candidates that are wider than a table are left out for it. Where all are, it keeps its dim, with neither batch norm nor
      bias: the weights per id of a factorization machine or of Wide&Deep, for instance.
    * A dim is stored, and counted, as the next multiple of the space's ``align``. The largest candidate that is stored in so
      many columns stands for the plan's dim. A stored column that it does not read adds nothing right after ``compact``, and is
      trained from then on.
    * Batch norm acts on bags, after pooling, and on all features of a table together. Epsilon and momentum are not in the
      paper: torch's.
    * A plan adds a bias to each table (float32, counted): the shift of batch norm, so that the compact model computes what
      the searched one did. Retrained, it starts at zero, and there is no batch norm.
    * The optimizer of alpha is not named: Adam with torch's betas (DARTS has 0.5 and 0.999, and weight decay).
    * Eq. 6 is called straight-through there, but p is used as it is in Eq. 7, and here.
    * Evaluation weighs candidates by alpha, the mean of what Eq. 5 draws. The paper evaluates retrained models only.
    * The validation step draws p once; with ``xi`` above zero the virtual weight step has the same p. Second-order gradients
      are exact, as DNIS's are.
    * When the search ends is the loop's business, where Algorithm 1 runs until it has converged. ``embsearch run`` stops at the
      best validation loss of the searched model, and derives from alpha as it was then.
    * A byte budget: see ``embsearch_derive``. The paper has none; ``derive(strict=False)`` is Eq. 13.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.selection import CandidateDims, CandidateSearch
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, at_least

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class AutoDim(CandidateDims):
    """Settings of AutoDim. The paper's: an alpha step after every 10 weight steps (III.F), no warm-up.

    Args:
        xi: learning rate of the virtual weight step (Eq. 12); 0 is the first-order approximation.
    """

    name: ClassVar[str] = "autodim"
    limits: ClassVar[Limits] = {"xi": at_least(0)}
    every: int = 10
    xi: float = 0.0

    def build(self) -> "AutoDimSearch":
        """Return a new search."""
        return AutoDimSearch(self)


class AutoDimSearch(CandidateSearch):
    """One search by AutoDim."""

    def __init__(self, config: AutoDim) -> None:
        super().__init__(config)
        self.xi = config.xi

    @hookimpl
    def embsearch_before_forward(self, session: "Session", step: int) -> None:
        """Line 5 of Algorithm 1: weigh the candidates by a new sample."""
        self._begin(session)
        with torch.no_grad():
            session.use_gates(self._gates(session, self.sample(step)))

    @hookimpl
    def embsearch_search_step(self, session: "Session", step: int, batch: Any) -> Mapping[str, float]:
        """Lines 2 and 3 of Algorithm 1: alpha descends the validation loss."""
        gates = self._gates(session, self.sample(step))
        loss, (self.vectors.grad,) = session.probe.gate_gradients(batch, gates, [self.vectors], self.xi)
        return {"loss": loss, **self._descend(session, step)}


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register AutoDim."""
    return [AutoDim]
