"""Ratings as a stream: one transaction after the other, in order of time (esapn.txt, 3.2)."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch

from embsearch_plugin.data import movielens, movielens_csv
from embsearch_plugin.data.dataset import Collate, Field, Schema
from embsearch_plugin.errors import DataError
from embsearch_plugin.tasks import PREFERENCE, STARS, Task

log = logging.getLogger(__name__)
KEYS = ("user", "item")
LIKED = 4  # stars or more


class Stream:
    """Transactions of a user and an item, in the order in which they are processed.

    Attributes:
        schema: two fields, user and item; ids are the owner's own, and rows are one more than the largest.
        frequencies: for each transaction the how many-th of its user and of its item it is, int64 (N, 2), from 1.
    """

    def __init__(self, ids: NDArray[np.int64], labels: NDArray[np.float32], task: Task) -> None:
        fields = tuple(Field(key, int(column.max()) + 1) for key, column in zip(KEYS, ids.T, strict=True))
        self.schema = Schema(fields, (), ("item",), task)
        self._ids, self._labels = torch.from_numpy(ids), torch.from_numpy(labels)
        self.frequencies = torch.from_numpy(np.column_stack([_occurrence(column) for column in ids.T]))

    def __len__(self) -> int:
        return len(self._labels)

    def fingerprint(self) -> str:
        """Return a hash of everything."""
        digest = sha256(repr(self.schema).encode())
        for tensor in (self._ids, self._labels):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()

    def batch(self, positions: Tensor) -> Batch:
        """Return these transactions, int64 (B,)."""
        collate = Collate(self.schema, len(positions))
        return collate(torch.empty(len(positions), 0), self._ids[positions], self._labels[positions])


class Past:
    """What has flowed by: every iteration is one batch drawn from it, each transaction as likely as the other.

    Args:
        stream: where they are drawn from.
        size: of a batch.
        seed: of the draws.

    Attributes:
        seen: how many transactions have flowed by. A draw depends on that and the seed alone.
    """

    def __init__(self, stream: Stream, size: int, seed: int) -> None:
        self._stream, self._size, self._seed = stream, size, seed
        self.seen = 0

    def __iter__(self) -> Iterator[Batch]:
        random = np.random.default_rng((self._seed, self.seen))
        if self.seen:
            yield self._stream.batch(torch.from_numpy(random.integers(self.seen, size=self._size)))


@dataclass(frozen=True)
class MovieLensCsvStream:
    """A ``ratings.csv`` in MovieLens-20M's layout (``userId,movieId,rating,timestamp``); ``path`` is its folder.

    ``preference``: 4 stars or more, or fewer. ``stars``: five classes; a half star belongs to the next whole one.

    Where times are not in order, that is said once, and ratings come in the file's order; with ``sort`` in that of time.

    Args:
        path: the folder of the file.
        task: what is asked.
        sort: by time; otherwise the file's own order.
        first: so many transactions and no more; by default all.
    """

    name: ClassVar[str] = "movielens-csv-stream"

    path: str
    task: Literal["preference", "stars"] = "preference"
    sort: bool = False
    first: int | None = None

    def load(self) -> Stream:
        """Read the file.

        Raises:
            DataError: where it is missing, empty or malformed.
        """
        path = Path(self.path) / "ratings.csv"
        ratings = movielens_csv.read_ratings(path)
        return _stream(path, ratings, self.task, self.sort, self.first)


@dataclass(frozen=True)
class MovieLens1MStream:
    """MovieLens-1M's ``ratings.dat``; ``path`` is the folder. Otherwise as :class:`MovieLensCsvStream`.

    ``users``: those up to this number take part. ``sort`` is on, since the file is ordered by user.

    Args:
        path: the folder of the file.
        task: what is asked.
        sort: by time; otherwise the file's own order.
        users: how many, the first ones by their number.
        first: so many transactions and no more; by default all.
    """

    name: ClassVar[str] = "movielens-1m-stream"

    path: str
    task: Literal["preference", "stars"] = "preference"
    sort: bool = True
    users: int = 6040
    first: int | None = None

    def load(self) -> Stream:
        """Read the file.

        Raises:
            DataError: where it is missing, empty or malformed, or none of the users is in it.
        """
        path = Path(self.path) / "ratings.dat"
        ratings = movielens.read_rating_lines(path)
        return _stream(path, ratings.filter(pl.col("userId") <= self.users), self.task, self.sort, self.first)


StreamData = MovieLensCsvStream | MovieLens1MStream
CONFIGS: tuple[type[StreamData], ...] = (MovieLensCsvStream, MovieLens1MStream)


def _stream(path: Path, ratings: pl.DataFrame, task: str, sort: bool, first: int | None) -> Stream:
    """Make a stream of ``userId``, ``movieId``, ``rating`` and ``timestamp``."""
    if first is not None and first < 1:
        raise DataError(f"first must be at least 1; got {first}.")
    if not len(ratings):
        raise DataError(f"{path} must hold ratings to be streamed; none are left. Try: more users.")
    if sort:
        ratings = ratings.sort("timestamp", maintain_order=True)
    elif late := int((ratings["timestamp"].diff() < 0).sum()):
        log.warning("%s: %d ratings are older than the one before; they are processed as they come (sort: true)", path, late)
    if first is not None:
        ratings = ratings.head(first)
    stars = ratings["rating"].to_numpy()
    labels = stars >= LIKED if task == "preference" else np.ceil(stars).clip(1) - 1
    ids = ratings.select("userId", "movieId").to_numpy().astype(np.int64)
    return Stream(ids, labels.astype(np.float32), PREFERENCE if task == "preference" else STARS)


def _occurrence(column: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each value has come, itself included."""
    frame = pl.DataFrame({"id": column})
    counts: NDArray[np.int64] = frame.select(pl.int_range(1, pl.len() + 1).over("id")).to_series().to_numpy().astype(np.int64)
    return counts
