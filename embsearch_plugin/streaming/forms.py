"""What makes a table's output of rows of several widths. An algorithm has one form per table."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from embsearch_plugin.streaming.rows import Piece


@dataclass(frozen=True)
class Entries:
    """The entries of a batch, each once.

    Args:
        numbers: int64 (n,), -1 for an id that is not there.
        counts: how often each was looked up in training, int64 (n,).
        searching: whether this is a search step, which differentiates architecture parameters and no rows.
    """

    numbers: Tensor
    counts: Tensor
    searching: bool


class RowForm(nn.Module):
    """From rows to outputs of one width. Its parameters are trained by the loop's optimizer.

    Attributes:
        widths: those that rows may have, ascending; new ids get the first.
    """

    widths: tuple[int, ...]

    def forward(self, pieces: Sequence[Piece], entries: Entries) -> Tensor:
        """Return the output of each entry, (n, D); ``pieces`` are all its rows, by width."""
        raise NotImplementedError

    def base(self) -> Tensor | None:
        """Return the output of an id that is not there, (D,); ``None`` for zeros.

        A bag is its base and the sum (or the mean) of how far its ids' outputs are from it.
        """
        return None

    def widened(self, size: int, rows: Tensor) -> Tensor:
        """Return the first rows (n, widths[size]) of entries that had ``rows`` (n, widths[size - 1]); both on the host."""
        raise NotImplementedError


class Plain(RowForm):
    """Rows of one width, which are the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths = (width,)

    def forward(self, pieces: Sequence[Piece], entries: Entries) -> Tensor:
        """Return the rows."""
        return pieces[0].rows


class Chain(RowForm):
    """A learned linear map from each width to the next, up to the table's own (esapn.txt, Eq. 1).

    A row that grows starts as the map of what it was, so that its output stays the same.

    Maps start as ones that keep angles and the size of a number, without bias: a row of the smallest width then differs from
    another as much as one of the largest. (PyTorch's own start shrinks it at every map, beside biases that are alike for all;
    the paper does not say how maps start.)

    Args:
        widths: ascending; the last is the table's own.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.maps = nn.ModuleList(_keeping_size(narrow, wide) for narrow, wide in pairwise(widths))

    def forward(self, pieces: Sequence[Piece], entries: Entries) -> Tensor:
        """Return the rows, each mapped as often as it takes."""
        rows = pieces[0].rows
        for step, piece in zip(self.linear_maps, pieces[1:], strict=True):
            rows = torch.cat([step(rows), piece.rows])
        positions = torch.cat([piece.positions for piece in pieces])
        return torch.empty_like(rows).index_copy(0, positions, rows)

    def base(self) -> Tensor | None:
        """Return what zeros of the first width become."""
        output: Tensor | None = None
        for step in self.linear_maps:
            output = step.bias if output is None else step(output)
        return output

    def widened(self, size: int, rows: Tensor) -> Tensor:
        """Return the rows, mapped once."""
        step = self.linear_maps[size - 1]
        mapped: Tensor = step(rows.to(step.weight.device)).cpu()
        return mapped

    @property
    def linear_maps(self) -> list[nn.Linear]:
        """The maps, the one from the first width first."""
        return [step for step in self.maps if isinstance(step, nn.Linear)]


def _keeping_size(narrow: int, wide: int) -> nn.Linear:
    step = nn.Linear(narrow, wide)
    nn.init.orthogonal_(step.weight, gain=(wide / narrow) ** 0.5)
    nn.init.zeros_(step.bias)
    return step
