"""Where in one matrix the gate rows of an output's columns are."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from embsearch_plugin.lookup.slots import Slot


class Pieces:
    """Finds the gate rows of tables of any widths, so that one ``index_select`` gathers them.

    Gates are cut into pieces of the widths' greatest common divisor (the width itself, where all are equal), which lie
    in one (rows, piece) matrix; a slot of width D reads D / piece of them.
    """

    def __init__(self, slots: Sequence[Slot], sizes: Sequence[int]) -> None:
        self.width = gcd(*(slot.dim for slot in slots))
        dims = {slot.table: slot.dim for slot in slots}
        starts, start = {}, 0
        for table, size in enumerate(sizes):
            starts[table] = start
            start += size * dims[table] // self.width
        pieces = [(index, piece) for index, slot in enumerate(slots) for piece in range(slot.dim // self.width)]
        self._slot = torch.tensor([index for index, _ in pieces])
        self._step = torch.tensor([[slots[index].dim // self.width] for index, _ in pieces])
        self._start = torch.tensor([[starts[slots[index].table]] for index, _ in pieces])
        self._piece = torch.tensor([[piece] for _, piece in pieces])
        self._sizes = torch.tensor([[sizes[slot.table]] for slot in slots])

    def table(self, gates: Sequence[Tensor]) -> Tensor:
        """Return all gates, of one group after the other, as one matrix of pieces, (R, width)."""
        return torch.cat([gate.reshape(-1, self.width) for gate in gates])

    def rows(self, blocks: Tensor, groups: Tensor | None = None, n_groups: int = 1) -> Tensor:
        """Return the row of each piece of the output, (B, pieces).

        Args:
            blocks: the block of each slot's id, (slots, B).
            groups: the group of each example, (B,), where groups have gates of their own.
            n_groups: N, how many there are.
        """
        if self._slot.device != blocks.device:
            self._move(blocks.device)
        rows = blocks.long()
        if groups is not None:
            rows = rows + groups * self._sizes
        if len(self._slot) != rows.shape[0]:
            rows = rows.index_select(0, self._slot)
        start = self._start if groups is None else self._start * n_groups
        return (rows * self._step + (start + self._piece)).t()

    def _move(self, device: torch.device) -> None:
        """Move what it knows to where blocks are: a GPU would wait for every copy."""
        for name in ("_slot", "_step", "_start", "_piece", "_sizes"):
            setattr(self, name, getattr(self, name).to(device))
