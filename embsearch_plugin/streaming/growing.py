"""Tensors that grow and shrink at their end, with a bounded slack."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

SLACK = 1.25  # bytes held over bytes used, at most


class GrowingTensor:
    """The first ``len`` rows of a tensor that has room for some more.

    Room is made for an eighth more than is needed, and given back where it exceeds a quarter. So a row costs a constant number
    of copies on the average, whatever the number of rows, and at rest no more than 25 % is held beyond what is used. While the
    tensor moves to its new place, the old one is there too.

    Args:
        shape: of one row.
        dtype: of its numbers.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self._used = tuple(shape), 0
        self._held = torch.empty(0, *shape, dtype=dtype, device="cpu")

    def __len__(self) -> int:
        return self._used

    @property
    def values(self) -> Tensor:
        """The rows in use, (len, *shape): a view, until the next ``resize``."""
        return self._held[: self._used]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._held.itemsize * prod(self.shape)

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows in use."""
        return self.values.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of memory."""
        return self._held.untyped_storage().nbytes()

    def resize(self, rows: int) -> None:
        """Have so many rows: new ones at the end, or the last ones dropped."""
        capacity = len(self._held)
        if not rows <= capacity <= SLACK * rows:
            held = self._held.new_empty(rows + rows // 8, *self.shape)
            kept = min(rows, self._used)
            held[:kept] = self._held[:kept]
            self._held = held
        if rows > self._used:
            self._held[self._used : rows] = 0
        self._used = rows

    def state_dict(self) -> dict[str, Any]:
        """Return the rows in use, and for how many there is room."""
        return {"values": self.values.clone(), "capacity": len(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._used = len(state["values"])
        self._held = self._held.new_empty(state["capacity"], *self.shape)
        self.values.copy_(state["values"])
