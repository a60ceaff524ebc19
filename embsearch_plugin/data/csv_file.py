"""CSV files of any size, read a chunk at a time, plain or gzip; an error names file, line and column.

The text is polars' to parse; lines are counted and looked at one by one only where something is wrong with them.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl

from embsearch_plugin.data.dataset import malformed, require_file
from embsearch_plugin.errors import DataError

BLOCK = 1 << 24  # bytes of text read at once
LONGEST = 1 << 27  # bytes after which a quote is taken as never closed


@dataclass(frozen=True)
class Chunk:
    """Some lines of a file. ``text`` holds the wanted columns as text, null where a value is empty."""

    path: Path
    first: int  # the number of the first line, from 1
    block: bytes
    text: pl.DataFrame

    def require(self, column: str, parse: pl.Expr | pl.Series, must: str) -> pl.Series:
        """Return what ``parse`` makes of a column, unless it is null somewhere.

        Raises:
            DataError: naming the first line where it is, what the value must be, and what it is.
        """
        parsed = self.text.select(parse).to_series()
        if parsed.null_count():
            row = parsed.is_null().arg_max() or 0
            line = next(line for at, (line, _) in enumerate(_records(self.path, self.first, self.block)) if at == row)
            raise malformed(self.path, line, column, must, self.text[column][row] or "")
        return parsed


def read_chunks(path: Path, columns: Sequence[str], source: str) -> Iterator[Chunk]:
    """Yield the lines below the header, with the columns wanted; others are left out.

    Args:
        path: the file, in UTF-8.
        columns: those wanted; the header says where they are.
        source: where its owner's data comes from, for the error where the file is missing.

    Raises:
        DataError: the file is missing, damaged or empty, lacks a column, or a line has more or fewer values than the header.
    """
    first = 2
    with opened(path, source) as stream:
        header = _header(path, stream.readline(), columns)
        for block in _blocks(stream):
            yield Chunk(path, first, block, _parse(path, first, block, header, columns))
            first += block.count(b"\n") + (not block.endswith(b"\n"))
    if first == 2:
        raise DataError(f"{path} must hold at least one line below its header, but has none. Try: download it again.")


@contextmanager
def opened(path: Path, source: str) -> Iterator[BinaryIO]:
    """Open a data file, plain or gzip, whatever its name.

    Raises:
        DataError: there is no such file; or, while it is read, the gzip file is damaged.
    """
    require_file(path, source)
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if compressed else file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} must be a whole gzip file, but got: {error}. Try: download it again.") from error


def _header(path: Path, line: bytes, columns: Sequence[str]) -> list[str]:
    header = next(csv.reader([line.decode("utf-8-sig", "replace")]), [])
    for column in columns:
        if column not in header:
            raise malformed(path, 1, column, f"in the header, beside {','.join(columns)}", ",".join(header))
    return header


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield whole records: a newline within quotes ends none."""
    rest = b""
    while more := stream.read(BLOCK):
        rest += more
        end = rest.rfind(b"\n") + 1
        if end and (rest.count(b'"', 0, end) % 2 == 0 or end > LONGEST):
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _parse(path: Path, first: int, block: bytes, header: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """Return the columns as text. All are parsed, as polars checks no others; it fills up short lines with nulls."""
    names = [f"column_{at}" for at in range(len(header))]
    try:
        text = pl.read_csv(",".join(names).encode() + b"\n" + block, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        _check_records(path, first, block, header)
        raise DataError(f"{path}, from line {first}: must be CSV, got: {error}. Try: download it again.") from error
    if text[names[-1]].null_count():
        _check_records(path, first, block, header)
    return text.select(pl.col(names[header.index(column)]).alias(column) for column in columns)


def _check_records(path: Path, first: int, block: bytes, header: Sequence[str]) -> None:
    """Raise a DataError for the first record that is not UTF-8, or has more or fewer values than the header."""
    for line, record in _records(path, first, block):
        if len(record) != len(header):
            column = header[min(len(record), len(header) - 1)]
            must = f"one of {len(header)} values separated by commas"
            raise malformed(path, line, column, must, f"{len(record)} values")
        for column, value in zip(header, record, strict=True):
            raw = value.encode("utf-8", "surrogateescape")
            if raw.decode("utf-8", "replace") != value:
                raise malformed(path, line, column, "text in UTF-8", raw)


def _records(path: Path, first: int, block: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the number of the line it begins on; one may span lines, within quotes."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(block), "utf-8", "surrogateescape", newline=""), strict=True)
    while True:
        line = first + reader.line_num
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: must be CSV, its quotes in pairs, got: {error}. "
                "Try: download the file again, or mend or delete the line."
            ) from error
        yield line, record
