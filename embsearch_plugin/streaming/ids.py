"""A map from ids, any 64-bit integers, to entry numbers 0, 1, 2, ... in the order in which they came."""

from collections.abc import Mapping
from itertools import count
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from embsearch_plugin.streaming.growing import GrowingTensor

_FREE = -1
_FULLEST = 0.85  # of the slots in use; then they are dealt anew, with at most half as many again as entries


class IdMap:
    """A hash table with open addressing, looked up for a whole batch at a time.

    A slot holds an entry number, int32; the ids themselves are kept once, in the order of the entries. A lookup takes a
    constant number of probes on the average; what is dealt anew as the map grows is a constant number of slots per id.
    """

    def __init__(self) -> None:
        self._ids = GrowingTensor((), torch.int64)
        self._slots = _free(_prime(11))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        """The ids, in the order of their entries, int64 (entries,)."""
        return self._ids.values

    @property
    def entry_bytes(self) -> int:
        """Bytes of one id and its slot."""
        return self._ids.row_bytes + self._slots.itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of the ids, and of a slot for each."""
        return len(self) * self.entry_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of memory."""
        return self._ids.held_bytes + self._slots.nbytes

    def find(self, ids: Tensor) -> Tensor:
        """Return the entry of each id, int64 (n,); -1 for those that are not there."""
        return self._probe(ids.long())

    def admit(self, ids: Tensor) -> Tensor:
        """Return the entry of each id, int64 (n,); those that are not there become entries, in their order.

        Args:
            ids: integers (n,), each of them once.
        """
        ids = ids.long()
        entries = self._probe(ids)
        new = (entries < 0).nonzero().flatten()
        if len(new):
            first = len(self)
            self._ids.resize(first + len(new))
            self._ids.values[first:] = ids[new]
            entries[new] = torch.arange(first, len(self))
            self._enter(first)
        return entries

    def state_dict(self) -> dict[str, Any]:
        """Return the ids in their order, and how many slots there are."""
        return {"ids": self._ids.state_dict(), "slots": len(self._slots)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._ids.load_state_dict(state["ids"])
        self._deal(state["slots"])

    def _enter(self, first: int) -> None:
        """Give the entries from ``first`` on their slots."""
        if len(self) > _FULLEST * len(self._slots):
            self._deal(_prime(max(3 * len(self) // 2, 11)))
        else:
            self._place(torch.arange(first, len(self)))

    def _deal(self, slots: int) -> None:
        """Give all entries their slots anew."""
        self._slots = _free(slots)
        self._place(torch.arange(len(self)))

    def _probe(self, ids: Tensor) -> Tensor:
        """Return the entry of each id, or -1: the slots of its sequence are read until it, or a free one, is found."""
        found, open_ = torch.full_like(ids, _FREE), torch.arange(len(ids))
        slots, steps = self._sequence(ids)
        while len(open_):
            entries = self._slots[slots].long()
            taken = entries != _FREE
            same = taken & (self.ids[entries.clamp(min=0)] == ids[open_]) if len(self) else taken
            found[open_[same]] = entries[same]
            left = (taken & ~same).nonzero().flatten()
            open_, steps = open_[left], steps[left]
            slots = (slots[left] + steps) % len(self._slots)
        return found

    def _place(self, entries: Tensor) -> None:
        """Write each entry to the first free slot of its sequence; where two meet, one of them goes on."""
        slots, steps = self._sequence(self.ids[entries])
        while len(entries):
            free = self._slots[slots] == _FREE
            self._slots[slots[free]] = entries[free].int()
            left = (self._slots[slots] != entries).nonzero().flatten()
            entries, steps = entries[left], steps[left]
            slots = (slots[left] + steps) % len(self._slots)

    def _sequence(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first slot of each id, and the step to the next ones: their number is prime, so all are reached."""
        slots = len(self._slots)
        return _mixed(ids) % slots, 1 + _mixed(~ids) % (slots - 1)


def _free(slots: int) -> Tensor:
    """Return slots with nothing in them, on the host."""
    return torch.full((slots,), _FREE, dtype=torch.int32, device="cpu")


def _mixed(x: Tensor) -> Tensor:
    """Return the bits of integers thoroughly mixed: the end of SplitMix64."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros, as for unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """Return 64 bits as a signed number."""
    return (x + 2**63) % 2**64 - 2**63


def _prime(most: int) -> int:
    """Return the largest prime that is at most this, so that no more is held than the slack allows."""
    return next(n for n in count(most, -1) if all(n % d for d in range(2, isqrt(n) + 1)))
