"""Rows of several widths, densely stored, that can be added, widened, read and trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embsearch_plugin.streaming.growing import GrowingTensor
from embsearch_plugin.streaming.row_optimizers import RowOptimizer, kept_state


@dataclass(frozen=True)
class Piece:
    """Those rows of a batch that have one width.

    Args:
        size: which width it is, by number.
        positions: their positions in the batch, int64 (n,).
        rows: (n, width).
    """

    size: int
    positions: Tensor
    rows: Tensor


class _Arena:
    """All rows of one width, one after the other, each with its optimizer's state and its owner's number."""

    def __init__(self, width: int, optimizer: RowOptimizer) -> None:
        self.width = width
        self.rows = GrowingTensor((width,), torch.float32)
        self.state = {name: GrowingTensor(shape, torch.float32) for name, shape in optimizer.shapes(width).items()}
        self.owners = GrowingTensor((), torch.int32)

    @property
    def tensors(self) -> dict[str, GrowingTensor]:
        return {"rows": self.rows, "owners": self.owners, **self.state}

    def append(self, owners: Tensor, rows: Tensor) -> Tensor:
        """Add rows whose state is zero; return their places."""
        first = len(self.rows)
        for tensor in self.tensors.values():
            tensor.resize(first + len(owners))
        self.rows.values[first:], self.owners.values[first:] = rows, owners.int()
        return torch.arange(first, first + len(owners))

    def remove(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Take rows out, and fill the gaps with the last rows; return the new places of these, and their owners."""
        left = len(self.rows) - len(places)
        leaving = torch.zeros(len(places), dtype=torch.bool)  # of the rows behind those that are left
        leaving[places[places >= left] - left] = True
        movers, gaps = (~leaving).nonzero().flatten() + left, places[places < left]
        for tensor in self.tensors.values():
            tensor.values[gaps] = tensor.values[movers]
            tensor.resize(left)
        return gaps, self.owners.values[gaps].long()


class Rows:
    """The rows of one table: entry e has one row, of one of some widths.

    Rows of a width lie together without gaps, so memory follows what is used within the slack of
    :class:`~embsearch_plugin.streaming.growing.GrowingTensor`, and every change costs as much as the rows it is about.

    Args:
        widths: ascending; new entries have the first.
        optimizer: what trains them.

    Attributes:
        steps: of the optimizer, so far.
    """

    def __init__(self, widths: Sequence[int], optimizer: RowOptimizer) -> None:
        self.widths, self.optimizer, self.steps = tuple(widths), optimizer, 0
        self._arenas = [_Arena(width, optimizer) for width in widths]
        self._sizes = GrowingTensor((), torch.uint8)
        self._places = GrowingTensor((), torch.int32)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def used_bytes(self) -> int:
        """Bytes of rows, optimizer state and indices."""
        return sum(tensor.used_bytes for tensor in self._tensors())

    @property
    def held_bytes(self) -> int:
        """Bytes of memory."""
        return sum(tensor.held_bytes for tensor in self._tensors())

    @property
    def row_counts(self) -> list[int]:
        """The number of rows of each width."""
        return [len(arena.rows) for arena in self._arenas]

    def entry_bytes(self, size: int) -> int:
        """Bytes that one entry of a width takes."""
        return sum(tensor.row_bytes for tensor in [*self._arenas[size].tensors.values(), self._sizes, self._places])

    def sizes(self, entries: Tensor) -> Tensor:
        """Return which width each entry has, by number: int64 (n,)."""
        return self._sizes.values[entries].long()

    def add(self, rows: Tensor) -> None:
        """Add entries, with rows (n, first width)."""
        first = len(self)
        self._sizes.resize(first + len(rows))
        self._places.resize(first + len(rows))
        self._places.values[first:] = self._arenas[0].append(torch.arange(first, len(self)), rows).int()

    def widen(self, entries: Tensor, size: int, rows: Tensor) -> None:
        """Give entries of the width before ``size`` rows (n, width) of that one, in place of their own."""
        narrow, wide = self._arenas[size - 1], self._arenas[size]
        places = self._places.values[entries].long()
        kept = {name: kept_state(state.values[places], wide.state[name].shape) for name, state in narrow.state.items()}
        gaps, movers = narrow.remove(places)
        self._places.values[movers] = gaps.int()
        new = wide.append(entries, rows)
        for name, values in kept.items():
            wide.state[name].values[new] = values
        self._places.values[entries], self._sizes.values[entries] = new.int(), size

    def read(self, entries: Tensor) -> list[Piece]:
        """Return copies of the entries' rows, by width; an entry of -1 has zeros, of the first width."""
        known = entries >= 0
        sizes = torch.where(known, self._sizes.values[entries.clamp(min=0)].long() if len(self) else 0, 0)
        pieces = []
        for size, arena in enumerate(self._arenas):
            positions = (sizes == size).nonzero().flatten()
            rows = torch.zeros(len(positions), arena.width)
            there = known[positions]
            rows[there] = arena.rows.values[self._places.values[entries[positions[there]]].long()]
            pieces.append(Piece(size, positions, rows))
        return pieces

    def train(self, entries: Tensor, size: int, gradients: Tensor, step: int) -> None:
        """Take a step of the optimizer with gradients (n, width); entries of another width by now are left out.

        Args:
            entries: each of them once; those of -1 are left out.
            size: the width that they had when they were read.
            gradients: of their rows.
            step: which step it is, from 1; rows of several widths may be trained in one.
        """
        self.steps = max(self.steps, step)
        still = (entries >= 0).nonzero().flatten()
        still = still[self.sizes(entries[still]) == size]
        arena, places = self._arenas[size], self._places.values[entries[still]].long()
        state = {name: tensor.values[places] for name, tensor in arena.state.items()}
        arena.rows.values[places] = self.optimizer.update(arena.rows.values[places], gradients[still], state, step)
        for name, values in state.items():
            arena.state[name].values[places] = values

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        arenas = [{name: tensor.state_dict() for name, tensor in arena.tensors.items()} for arena in self._arenas]
        entries = {"sizes": self._sizes.state_dict(), "places": self._places.state_dict()}
        return {"steps": self.steps, "arenas": arenas, **entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.steps = state["steps"]
        self._sizes.load_state_dict(state["sizes"])
        self._places.load_state_dict(state["places"])
        for arena, values in zip(self._arenas, state["arenas"], strict=True):
            for name, tensor in arena.tensors.items():
                tensor.load_state_dict(values[name])

    def _tensors(self) -> Iterator[GrowingTensor]:
        yield from (self._sizes, self._places)
        for arena in self._arenas:
            yield from arena.tensors.values()
