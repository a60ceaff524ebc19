"""DARTS on a stream: rows of all candidate sizes, mixed by weights that each id has of its own (esapn.txt, 3.3).

Every id has a row of each size and a logit for each; what the softmax of the logits weighs is that of
:class:`~embsearch_plugin.algorithms.parts.mixture.Mixture`. Before a batch of the stream is learned from, the logits of the
ids in a batch of the past descend its loss; rows and model descend that of the stream (Liu, Simonyan, Yang, 2019).

Differences:
    * First order: the loss on the past is that of the model as it is, not after a virtual step.
    * Adam for the logits touches the ids of the batch only, as it does for rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.algorithms.parts.mixture import Mixture, SoftConfig, SoftSearch
from embsearch_plugin.algorithms.parts.row_sizes import widths_within
from embsearch_plugin.collection import Table
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.streaming.forms import Entries
from embsearch_plugin.streaming.row_optimizers import RowAdam
from embsearch_plugin.streaming.table import GrowingTable

if TYPE_CHECKING:
    from embsearch_plugin.streaming.session import StreamSession

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Darts(SoftConfig):
    """Settings of DARTS."""

    name: ClassVar[str] = "darts"

    def extras(self, table: Table) -> dict[str, tuple[int, ...]]:
        """Return that of the logits and their moments."""
        return dict.fromkeys(("logits", *MOMENTS), (len(widths_within(self.candidates, table.dim)),))

    def build(self) -> "DartsSearch":
        """Return the algorithm of one session."""
        return DartsSearch(self)


class DartsSearch(SoftSearch):
    """DARTS in one session."""

    def __init__(self, config: Darts) -> None:
        self._optimizer, self._steps = RowAdam(config.lr), 0
        self._read: list[_Read] = []

    def start(self, session: "StreamSession") -> None:
        """Let every table's form read the logits."""
        for table in session.tables:
            assert isinstance(table.form, Mixture)
            table.form.weigh = partial(self._weights, table)

    def _weights(self, table: GrowingTable, entries: Entries) -> Tensor:
        """Return the softmax of the ids' logits; equal weights for an id that is not there."""
        logits, known = table.extras["logits"].values, entries.numbers >= 0
        own = torch.zeros(len(known), logits.shape[1])
        own[known] = logits[entries.numbers[known]]
        if entries.searching:
            self._read.append(_Read(table, entries.numbers, own.requires_grad_()))
        return own.softmax(1)

    def search_step(self, session: "StreamSession", batch: Any) -> Mapping[str, float]:
        """Let the logits of the batch's ids descend its loss."""
        self._steps, self._read = self._steps + 1, []
        loss, gradients = session.gradients(batch, lambda: [each.logits for each in self._read])
        for each, gradient in zip(self._read, gradients, strict=True):
            known = each.entries >= 0
            self._update(each.table, each.entries[known], gradient[known])
        return {"validation_loss": loss}

    def _update(self, table: GrowingTable, entries: Tensor, gradient: Tensor) -> None:
        state = {name: table.extras[name].values[entries] for name in MOMENTS}
        logits = table.extras["logits"].values
        logits[entries] = self._optimizer.update(logits[entries], gradient, state, self._steps)
        for name, values in state.items():
            table.extras[name].values[entries] = values

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps; logits are the tables'."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._steps = state["steps"]


@dataclass(frozen=True)
class _Read:
    """The logits (n, N) that a search step's forward pass read for the entries (n,) of a table."""

    table: GrowingTable
    entries: Tensor
    logits: Tensor


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register DARTS."""
    return [Darts]
