"""Bags of ids: what a field has that holds several values, one or none."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bags:
    """Bags end to end: bag b holds ``values[offsets[b] : offsets[b + 1]]``.

    What many examples share (the composers of a song, the genres of a movie) is kept once; an example says which bag it has.
    Shapes: values (n,) int32; offsets (number of bags + 1,) int64, from 0 to n.
    """

    values: Tensor
    offsets: Tensor

    def take(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of the bags numbered ``which`` (B,), end to end, and the bags' lengths, (B,) int64."""
        starts = self.offsets[which]
        lengths = self.offsets[which + 1] - starts
        shifts = torch.repeat_interleave(starts - lengths.cumsum(0) + lengths, lengths)
        return self.values[shifts + torch.arange(len(shifts))], lengths
