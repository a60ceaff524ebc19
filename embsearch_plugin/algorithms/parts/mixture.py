"""Soft selection on a stream: every id has rows of all candidate sizes, and weights for them (DARTS and AutoEmb)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embsearch_plugin.algorithms.parts.row_sizes import check_candidates, widths_within
from embsearch_plugin.collection import Table
from embsearch_plugin.limits import Limits, above
from embsearch_plugin.streaming.base import StreamAlgorithm, StreamConfig
from embsearch_plugin.streaming.forms import Entries, RowForm
from embsearch_plugin.streaming.rows import Piece


@dataclass(frozen=True, kw_only=True)
class SoftConfig(StreamConfig):
    """Settings of both.

    Args:
        candidates: the sizes that are mixed, ascending.
        lr: learning rate of Adam for what makes the weights.
    """

    limits: ClassVar[Limits] = {"lr": above(0)}
    candidates: tuple[int, ...] = (2, 4, 8, 16, 64, 128)
    lr: float = 0.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_candidates(self.candidates)

    def row_form(self, table: Table) -> "Mixture":
        """Return a mixture."""
        return Mixture(widths_within(self.candidates, table.dim))


class Mixture(RowForm):
    """The weighted sum over sizes n of tanh(batch norm(W_n e_n + b_n)), each D wide.

    An id's rows of all sizes lie side by side. Each size has a batch norm of its own: the authors' code shares one, and always
    uses the batch's statistics; running ones over all sizes would fit none of them in evaluation mode.

    Args:
        sizes: those that are mixed, ascending; the last is D.

    Attributes:
        weigh: from the entries of a batch to the weights of the sizes, (n, N): the algorithm's, which puts it here. In a search
            step they have a graph.
    """

    weigh: Callable[[Entries], Tensor]

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.widths = list(sizes), (sum(sizes),)
        self.maps = nn.ModuleList(nn.Linear(size, sizes[-1]) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(sizes[-1]) for _ in sizes)

    def forward(self, pieces: Sequence[Piece], entries: Entries) -> Tensor:
        """Return the weighted sums."""
        weights = self.weigh(entries).to(pieces[0].rows.device)
        weights = weights if entries.searching else weights.detach()
        parts = pieces[0].rows.split(self.sizes, dim=1)
        steps = zip(self.maps, self.norms, parts, strict=True)
        mapped = [torch.tanh(_normed(norm, step(part))) for step, norm, part in steps]
        return torch.stack([weight[:, None] * each for weight, each in zip(weights.unbind(1), mapped, strict=True)]).sum(0)


def _normed(norm: nn.Module, mapped: Tensor) -> Tensor:
    """Normalize over the ids of the batch, (n, D); fewer than two teach nothing, and what was learned so far serves them."""
    assert isinstance(norm, nn.BatchNorm1d)
    if len(mapped) < 2:
        return F.batch_norm(mapped, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    normed: Tensor = norm(mapped)
    return normed


class SoftSearch(StreamAlgorithm):
    """What both do in one session: descend the loss on batches of the past."""

    @property
    def searches(self) -> bool:
        """Weights learn from past batches."""
        return True
