"""Criteo's display advertising logs, read as a stream.

A line has 40 values separated by tabs: the label (0 or 1), 13 integers and 26 hexadecimal numbers, each of which may be
missing. Files of any size are read in chunks of lines, so memory does not grow with the file.
"""

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.csv_file import opened
from embsearch_plugin.data.dataset import Batches, Collate, Dataset, Field, Schema, Split, malformed
from embsearch_plugin.errors import DataError

INTEGERS = tuple(f"int_{i}" for i in range(13))
CATEGORIES = tuple(f"cat_{i}" for i in range(26))
COLUMNS = ("label", *INTEGERS, *CATEGORIES)
CHUNK = 65_536  # lines held, and shuffled, at once
TENTHS: dict[Split, range] = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}


@dataclass(frozen=True)
class Criteo:
    """Will an advertisement be clicked? ``path`` is one file of the log, plain or gzip.

    Dense, 13 numbers: log(1 + max(x, 0)); 0 where missing. Categorical, 26 fields with ``rows`` ids each: id 0 where
    missing, otherwise 1 + x modulo (rows - 1), as the log's numbers are hashes already.

    Of each ten lines the ninth is for validation, the tenth for test and the others for training; so every split can be
    read at once, without a pass over the file first. With a seed, the examples of each chunk of 65,536 lines are
    shuffled among themselves; the chunks keep their order.

    Args:
        path: one file of the log.
        rows: ids of each field.
    """

    name: ClassVar[str] = "criteo"

    path: str
    rows: int = 100_000

    def load(self) -> "CriteoDataset":
        """Check the first chunk of the file; the rest is read, and checked, while batches are taken.

        Raises:
            DataError: the file is missing, empty or malformed, or ``rows`` is below 2.
        """
        if self.rows < 2:
            raise DataError(f"rows must be at least 2 (id 0 means missing), got {self.rows}. Try: 100000.")
        data = CriteoDataset(Path(self.path), self.rows)
        next(data.chunks("train"))
        return data


class CriteoDataset(Dataset):
    """A file of the log; nothing of it is kept in memory."""

    def __init__(self, path: Path, rows: int) -> None:
        self.schema = Schema(tuple(Field(name, rows) for name in CATEGORIES), INTEGERS)
        self._path = path
        self._rows = rows

    def fingerprint(self) -> str:
        """Return the file's size and time of change: a hash would take a pass over all of it."""
        found = self._path.stat()
        return f"{self._rows} rows, {found.st_size} bytes, changed at {found.st_mtime_ns}"

    def batches(self, split: Split, batch_size: int, *, seed: int | None = None) -> "CriteoBatches":
        """Return one split in batches, read from the file each time; their number is not known beforehand.

        Raises:
            DataError: while iterating: a line is malformed, or a gzip file is damaged.
        """
        return CriteoBatches(self, split, batch_size, seed)

    def chunks(self, split: Split) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the split's share of each chunk of lines: dense (n, 13), ids (n, 26), labels (n,)."""
        tenths = TENTHS[split]
        for start, lines in _read(self._path):
            numbers = [number for number in range(start, start + len(lines)) if number % 10 in tenths]
            if numbers:
                yield _parse(self._path, numbers, [lines[number - start] for number in numbers], self._rows)


class CriteoBatches(Batches):
    """Batches of a file; a batch may span chunks."""

    def __init__(self, data: CriteoDataset, split: Split, batch_size: int, seed: int | None) -> None:
        super().__init__(seed)
        self._data = data
        self._split = split
        self._batch_size = batch_size
        self._collate = Collate(data.schema, batch_size)

    def _cut(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        rest: list[Tensor] = []
        for chunk in self._data.chunks(self._split):
            order = np.arange(len(chunk[0])) if shuffle is None else shuffle.permutation(len(chunk[0]))
            examples = [column[torch.from_numpy(order)] for column in chunk]
            if rest:
                examples = [torch.cat(pair) for pair in zip(rest, examples, strict=True)]
            whole = len(examples[0]) // self._batch_size * self._batch_size
            for at in range(0, whole, self._batch_size):
                yield self._collate(*(column[at : at + self._batch_size] for column in examples))
            rest = [column[whole:] for column in examples]
        if rest and len(rest[0]):
            yield self._collate(*rest)


def _read(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Yield chunks of lines, each with the number of its first line, from 0."""
    start = 0
    with opened(path, "one of Criteo's logs, and give it as 'path', plain or gzip") as stream:
        while lines := list(islice(stream, CHUNK)):
            yield start, lines
            start += len(lines)
    if not start:
        raise DataError(f"{path} must hold at least one line, but is empty. Try: download it again.")


def _parse(path: Path, numbers: Sequence[int], lines: Sequence[bytes], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dense (n, 13), ids (n, 26) and labels (n,) of n lines with the given numbers, from 0."""
    for number, line in zip(numbers, lines, strict=True):
        tabs = line.count(b"\t")
        if tabs != len(COLUMNS) - 1:
            column = COLUMNS[min(tabs + 1, len(COLUMNS) - 1)]
            raise malformed(path, number + 1, column, "one of 40 values separated by tabs", f"{tabs + 1} values")
        if line[:2] not in (b"0\t", b"1\t"):
            raise malformed(path, number + 1, "label", "0 or 1", line.split(b"\t")[0].decode("latin-1"))
    schema = dict.fromkeys(COLUMNS, pl.String)
    text = pl.read_csv(b"".join(lines), separator="\t", has_header=False, quote_char=None, encoding="utf8-lossy", schema=schema)
    integers = text.select(pl.col(INTEGERS).cast(pl.Int64, strict=False))
    _require(path, numbers, text, integers, "an integer or empty")
    hashes = text.select(pl.col(CATEGORIES).str.to_integer(base=16, strict=False))
    hashes = hashes.select(pl.when(pl.all() >= 0).then(pl.all()))
    _require(path, numbers, text, hashes, "a hexadecimal number or empty")

    dense = integers.select(pl.all().clip(lower_bound=0).log1p().fill_null(0).cast(pl.Float32))
    ids = hashes.select((pl.all() % (rows - 1) + 1).fill_null(0).cast(pl.Int32))
    return _tensor(dense), _tensor(ids), torch.tensor([line[:1] == b"1" for line in lines], dtype=torch.float32)


def _require(path: Path, numbers: Sequence[int], text: pl.DataFrame, parsed: pl.DataFrame, must: str) -> None:
    """Raise a DataError if a value is there in ``text``, and not in ``parsed``."""
    for column in parsed.columns:
        bad = parsed[column].is_null() & text[column].is_not_null()
        if bad.any():
            line = bad.arg_max() or 0
            raise malformed(path, numbers[line] + 1, column, must, text[column][line])


def _tensor(frame: pl.DataFrame) -> Tensor:
    return torch.from_numpy(frame.to_numpy(order="c", writable=True))


def write_sample(path: str | Path, *, rows: int = 20_000, seed: int = 0) -> None:
    """Write generated lines in Criteo's format, as gzip if the name ends in ``.gz``.

    There is something to learn: each of a field's hundred values makes clicks likelier, or less likely.
    """
    rng = np.random.default_rng(seed)
    values = rng.integers(2**32, size=(100, 26))
    effects = 0.4 * rng.standard_normal((100, 26))
    choice = rng.geometric(0.05, (rows, 26)) % 100
    chance = 1 / (1 + np.exp(1 - np.take_along_axis(effects, choice, axis=0).sum(1)))
    clicks = (rng.random(rows) < chance).astype(int).astype(str)
    integers = (rng.geometric(0.02, (rows, 13)) - 3).astype(str)
    integers[rng.random((rows, 13)) < 0.1] = ""
    categories = np.take_along_axis(np.char.mod("%08x", values), choice, axis=0)
    categories[rng.random((rows, 26)) < 0.1] = ""
    table = np.column_stack([clicks, integers, categories]).tolist()
    text = "".join("\t".join(row) + "\n" for row in table).encode()
    Path(path).write_bytes(gzip.compress(text) if Path(path).suffix == ".gz" else text)
