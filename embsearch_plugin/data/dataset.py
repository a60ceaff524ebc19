"""What a data set is: its fields, its three splits, and batches in TorchRec's form."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.data.bags import Bags
from embsearch_plugin.errors import DataError, SettingsError
from embsearch_plugin.tasks import CLICK, Task

Split = Literal["train", "validation", "test"]
SplitBy = Literal["random", "time"]


@dataclass(frozen=True)
class Field:
    """One categorical input: the feature's name, and the rows its embedding table needs (ids are ``0 .. rows - 1``).

    ``multiple``: an example may have several values, or none. Their embeddings are averaged; none give zeros.
    """

    name: str
    rows: int
    multiple: bool = False


@dataclass(frozen=True)
class Schema:
    """The inputs of one example, and what a model is asked about it.

    Args:
        fields: an id, or a bag of ids, for each of F fields.
        dense: the names of the numbers.
        items: the names of those fields that describe the item, where the others describe its user.
        task: what a model is asked.
    """

    fields: tuple[Field, ...]
    dense: tuple[str, ...]
    items: tuple[str, ...] = ()
    task: Task = CLICK


class Batches(ABC):
    """One split in batches, to be iterated as often as wanted; the last batch may be smaller.

    With a seed the examples are shuffled, and their order depends on the seed and ``epoch`` alone. ``epoch`` grows by
    one whenever an iteration reaches the end; a resumed run sets it, and sees the order it would have seen.
    """

    def __init__(self, seed: int | None) -> None:
        self.epoch = 0
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        yield from self._cut(None if self._seed is None else np.random.default_rng((self._seed, epoch)))
        self.epoch = epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, as for PyTorch's DistributedSampler."""
        self.epoch = epoch

    @abstractmethod
    def _cut(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        """Yield the batches of one epoch: shuffled by the generator, or in the data's own order."""


class Dataset(ABC):
    """Examples in three splits. A config (``Planted``, ``MovieLens1M``, ``Criteo``) loads one."""

    schema: Schema

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the data does: a run that is resumed must go on with the same."""

    @abstractmethod
    def batches(self, split: Split, batch_size: int, *, seed: int | None = None) -> Batches:
        """Return one split in batches of ``batch_size`` examples, shuffled if a seed (0 or more) is given."""

    def apart(self) -> "Dataset":
        """Return the same data in batches whose examples share no bag, for what is estimated example by example.

        By default, these: no two examples share one.
        """
        return self


class Collate:
    """Makes a TorchRec ``Batch`` out of rows that hold one id per field, or the number of one of the field's ``bags``.

    Where every bag holds one id, lengths and offsets are the same for all batches: they are made once, and shared.
    """

    def __init__(self, schema: Schema, batch_size: int, bags: Mapping[str, Bags] | None = None) -> None:
        self._keys = [field.name for field in schema.fields]
        self._bags = bags or {}
        self._lengths = torch.ones(batch_size * len(self._keys), dtype=torch.int64)
        self._offsets = torch.arange(batch_size * len(self._keys) + 1)

    def __call__(self, dense: Tensor, ids: Tensor, labels: Tensor) -> Batch:
        """Take dense (B, n_dense), ids (B, F) of any integer type and labels (B,); B is at most the batch size."""
        sparse = self._jagged(ids) if self._bags else self._single(ids)
        return Batch(dense_features=dense, sparse_features=sparse, labels=labels)

    def _single(self, ids: Tensor) -> KeyedJaggedTensor:
        size, bags = len(ids), ids.numel()
        return KeyedJaggedTensor(
            keys=self._keys,
            values=ids.to(torch.int64).t().reshape(-1),  # bags lie field by field
            lengths=self._lengths[:bags],
            offsets=self._offsets[: bags + 1],
            stride=size,
            length_per_key=[size] * len(self._keys),  # otherwise TorchRec sums the lengths, and a GPU waits for it
        )

    def _jagged(self, ids: Tensor) -> KeyedJaggedTensor:
        size = len(ids)
        ones = self._lengths[:size]
        columns = dict(zip(self._keys, ids.to(torch.int64).unbind(1), strict=True))
        parts = [self._bags[key].take(ids) if key in self._bags else (ids, ones) for key, ids in columns.items()]
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat([values for values, _ in parts]).to(torch.int64),
            lengths=torch.cat([lengths for _, lengths in parts]),
            stride=size,
            length_per_key=[len(values) for values, _ in parts],
        )


class TabularDataset(Dataset):
    """A data set in memory.

    Shapes: dense (N, n_dense) float32; ids (N, F) int32, where column f holds ids of ``schema.fields[f]``, or, where the
    field may have several values, the numbers of ``bags[field.name]``; labels (N,) float32, 0 or 1; splits: for each split
    the positions of its examples, int64.
    """

    def __init__(
        self,
        schema: Schema,
        dense: Tensor,
        ids: Tensor,
        labels: Tensor,
        splits: Mapping[Split, Tensor],
        bags: Mapping[str, Bags] | None = None,
    ) -> None:
        self.schema = schema
        self.dense = dense
        self.ids = ids
        self.labels = labels
        self.splits = splits
        self.bags = bags or {}

    def fingerprint(self) -> str:
        """Return a hash of everything, splits included."""
        digest = sha256(repr(self.schema).encode())
        bags = [tensor for name in sorted(self.bags) for tensor in (self.bags[name].values, self.bags[name].offsets)]
        for tensor in (self.dense, self.ids, self.labels, *(self.splits[split] for split in sorted(self.splits)), *bags):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()

    def batches(self, split: Split, batch_size: int, *, seed: int | None = None) -> "TabularBatches":
        """Return one split in batches; their ``len()`` is known."""
        return TabularBatches(self, self.splits[split], batch_size, seed)


class TabularBatches(Batches):
    """Batches of a data set in memory."""

    def __init__(self, data: TabularDataset, positions: Tensor, batch_size: int, seed: int | None) -> None:
        super().__init__(seed)
        self._data = data
        self._positions = positions
        self._batch_size = batch_size
        self._collate = Collate(data.schema, batch_size, data.bags)

    def __len__(self) -> int:
        return math.ceil(len(self._positions) / self._batch_size)

    def _cut(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        data, positions = self._data, self._positions
        if shuffle is not None:
            positions = positions[torch.from_numpy(shuffle.permutation(len(positions)))]
        for rows in positions.split(self._batch_size):
            dense, ids, labels = (x.index_select(0, rows) for x in (data.dense, data.ids, data.labels))
            yield self._collate(dense, ids, labels)


def check_split(split: tuple[float, float, float], seed: int, split_by: str = "random") -> None:
    """Raise a SettingsError where a data set cannot be split so, whatever is in it."""
    _check_fractions(split)
    if seed < 0:
        raise SettingsError(f"seed must be 0 or more; got {seed}")
    if split_by not in get_args(SplitBy):
        raise SettingsError(f"split_by must be one of {', '.join(get_args(SplitBy))}; got {split_by!r}")


def split_of(
    times: NDArray[np.int64], fractions: tuple[float, float, float], split_by: SplitBy, seed: int
) -> dict[Split, Tensor]:
    """Deal positions by time or at random, as ``split_by`` says."""
    return time_split(times, fractions) if split_by == "time" else random_split(len(times), fractions, seed)


def random_split(n: int, fractions: tuple[float, float, float], seed: int) -> dict[Split, Tensor]:
    """Deal the positions ``0 .. n - 1`` at random to train, validation and test; each part is in ascending order.

    Raises:
        SettingsError: the fractions are negative or do not add up to one.
    """
    parts = _cut(np.random.default_rng(seed).permutation(n), fractions)
    return {split: torch.from_numpy(np.sort(part)) for split, part in parts.items()}


def time_split(times: NDArray[np.int64], fractions: tuple[float, float, float]) -> dict[Split, Tensor]:
    """Deal positions by time: the earliest to train, the next to validation, the latest to test; each part is in time order.

    What happened at the same time keeps its order, and may be cut apart.

    Raises:
        SettingsError: the fractions are negative or do not add up to one.
    """
    return {split: torch.from_numpy(part) for split, part in _cut(np.argsort(times, kind="stable"), fractions).items()}


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or not min(fractions) >= 0 or not abs(sum(fractions) - 1) <= 1e-6:  # nor may one be NaN
        raise SettingsError(f"split must be three fractions that add up to 1, got {fractions}. Try: (0.8, 0.1, 0.1).")


def _cut(positions: NDArray[np.int64], fractions: tuple[float, float, float]) -> dict[Split, NDArray[np.int64]]:
    _check_fractions(fractions)
    n = len(positions)
    ends = [round(n * fractions[0]), round(n * (fractions[0] + fractions[1]))]
    train, validation, test = np.split(positions, ends)
    return {"train": train, "validation": validation, "test": test}


def require_file(path: Path, source: str) -> None:
    """Raise a DataError unless ``path`` is a file; ``source`` says where its owner's data comes from."""
    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} must be a file, but {got}. Try: download {source}.")


def malformed(path: Path, line: int, column: str, must: str, got: object) -> DataError:
    """Return the error about one value of a data file; ``line`` counts from 1."""
    return DataError(
        f"{path}, line {line}, column {column!r}: must be {must}, got {got!r}. "
        "Try: download the file again, or mend or delete the line."
    )
