"""SAM: the Supervised Attention Model, AutoDim's counterpart that learns from training batches alone (autodim.txt, III.D).

It has AutoDim's supernet, and updates the candidates' weights, which can be viewed as attention scores, together with the
model's on the same batch, by the same backward pass. The paper names this one difference, so the Gumbel noise (Eq. 6) stays.

Alpha descends whatever the loop's loss holds: a penalty on what is looked up, too, which after batch norm is least for the
smallest dims.

Differences from the paper: those of :mod:`embsearch_plugin.algorithms.autodim`. To meet a budget, ``derive`` looks at
validation batches, which the search does not learn from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from embsearch_plugin import distributed
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.selection import CandidateDims, CandidateSearch
from embsearch_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


@dataclass(frozen=True, kw_only=True)
class Sam(CandidateDims):
    """Settings of SAM: those of AutoDim, without a virtual step; alpha is updated with each ``every``-th weight step."""

    name: ClassVar[str] = "sam"

    def build(self) -> "SamSearch":
        """Return a new search."""
        return SamSearch(self)


class SamSearch(CandidateSearch):
    """One search by SAM."""

    def __init__(self, config: Sam) -> None:
        super().__init__(config)
        self._step = -1  # the weight step that the gradient belongs to

    @hookimpl
    def embsearch_before_forward(self, session: "Session", step: int) -> None:
        """Weigh the candidates by a new sample, through which the loop's backward reaches alpha."""
        self._begin(session)
        if step != self._step:  # otherwise the loop adds up the gradients of several batches
            self._step, self.vectors.grad = step, None
        session.use_gates(self._gates(session, self.sample(step)))

    @hookimpl
    def embsearch_search_step(self, session: "Session", step: int) -> Mapping[str, float]:
        """Descend the training loss along the gradient that the loop's backward left; not where a scaled loss overflowed."""
        if self.vectors.grad is None:
            return {}
        (self.vectors.grad,) = distributed.mean([self.vectors.grad])
        return self._descend(session, step) if bool(self.vectors.grad.isfinite().all()) else {}


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register SAM."""
    return [Sam]
