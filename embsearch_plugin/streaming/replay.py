"""Batches of the past, for a loop of one's own."""

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

from embsearch_plugin.errors import SettingsError


class Replay:
    """A stream's batches as they come, some of which are remembered: each batch so far is as likely as the other.

    Example::

        stream = es.Replay(loader, capacity=200)
        search.attach(optimizer, validation=stream.past)
        for batch in stream: ...

    Args:
        batches: the stream.
        capacity: how many batches are remembered at most.
        seed: of the draws.
    """

    def __init__(self, batches: Iterable[Any], capacity: int = 200, seed: int = 0) -> None:
        if capacity < 1:
            raise SettingsError(f"capacity must be at least 1; got {capacity}")
        self._batches, self._capacity, self._random = batches, capacity, Random(seed)
        self._kept: list[Any] = []
        self._seen = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            self._remember(batch)

    @property
    def past(self) -> "Past":
        """An iterable each of whose iterations is one batch, drawn from those that are remembered; empty before the first."""
        return Past(self._kept, self._random)

    def _remember(self, batch: Any) -> None:
        """Keep a batch, in the place of another one where there are enough (reservoir sampling)."""
        self._seen += 1
        if len(self._kept) < self._capacity:
            self._kept.append(batch)
        elif (place := self._random.randrange(self._seen)) < self._capacity:
            self._kept[place] = batch


class Past:
    """Draws from a list of batches that grows."""

    def __init__(self, kept: list[Any], random: Random) -> None:
        self._kept, self._random = kept, random

    def __iter__(self) -> Iterator[Any]:
        if self._kept:
            yield self._random.choice(self._kept)
