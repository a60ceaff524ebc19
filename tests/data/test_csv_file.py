import csv
import gzip
import io
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embsearch_plugin.data import csv_file
from embsearch_plugin.data.csv_file import read_chunks
from embsearch_plugin.errors import DataError

HEADER = "a,b,c\n"
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "BLOCK", 16)


def read(path: Path, content: str | bytes, columns: tuple[str, ...] = ("a", "c")) -> list[tuple]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [row for chunk in read_chunks(path, columns, "it") for row in chunk.text.rows()]


def error(path: Path, content: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(path, content)
    return str(caught.value)


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=20),
    block=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_records_equal_the_standard_librarys(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], block: int, end: str
) -> None:
    """Commas, quotes and newlines within values, blocks that end anywhere, and both ends of lines."""
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([("a", "b", "c"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_file, "BLOCK", block)
        got = read(tmp_path_factory.mktemp("csv") / "x.csv", stream.getvalue(), ("c", "b", "a"))
    assert got == [row[::-1] for row in rows]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_the_end_of_lines_does_not_matter(tmp_path: Path, end: str, last: bool) -> None:
    content = end.join(["a,b,c", "1,2,3", '"4,4",,6']) + end * last
    assert read(tmp_path / "x", content, ("a", "b", "c")) == [("1", "2", "3"), ("4,4", None, "6")]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_file_may_be_gzip_whatever_its_name(tmp_path: Path, compress: type[bytes]) -> None:
    content = HEADER + "".join(f"{i},x,{2 * i}\n" for i in range(200))
    assert read(tmp_path / "x", compress(content.encode())) == [(str(i), str(2 * i)) for i in range(200)]


def test_lines_that_are_looked_at_one_by_one_may_hold_any_character(tmp_path: Path) -> None:
    assert read(tmp_path / "x", HEADER + "\ufffd 周\U0001f600,2,\n") == [("\ufffd 周\U0001f600", None)]


def test_a_mark_of_byte_order_belongs_to_no_name(tmp_path: Path) -> None:
    assert read(tmp_path / "x", "\ufeff" + HEADER + "1,2,3\n") == [("1", "3")]


@pytest.mark.usefixtures("small_blocks")
def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(HEADER + "1,2,3\n" * 20 + "1,2\n")
    chunks = read_chunks(tmp_path / "x", ("a",), "it")
    assert next(chunks).text.height < 5
    with pytest.raises(DataError, match="line 22"):
        list(chunks)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("bad", "column", "got"),
    [
        ("1,2", "c", "2 values"),
        ("1", "b", "1 values"),
        ("", "a", "0 values"),
        ("1,2,3,4", "c", "4 values"),
        ("1,2,,", "c", "4 values"),
        (b"1,\xffx,3", "b", b"\xffx"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 29])
def test_a_malformed_line_is_named(tmp_path: Path, bad: str | bytes, column: str, got: object, place: int) -> None:
    lines = [b"1,\xc3\xa4,3", b'"x\ny",2,""'] * 15  # line 2, lines 3 and 4, line 5, ...
    lines[place] = bad if isinstance(bad, bytes) else bad.encode()
    message = error(tmp_path / "x", HEADER.encode() + b"\n".join(lines) + b"\n")
    line = 2 + sum(1 + (at % 2) for at in range(place))
    assert message.startswith(f"{tmp_path / 'x'}, line {line}, column {column!r}: must be ")
    assert f"got {got!r}" in message
    assert "Try: " in message


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bad", ['1,"2"x,3', '1,"2,3', '1,2,"3'])
@pytest.mark.parametrize("place", [0, 1, 29])
def test_a_line_whose_quotes_are_in_no_pairs_is_named(tmp_path: Path, bad: str, place: int) -> None:
    lines = ["1,2,3", '"4",5,6'] * 15
    lines[place] = bad
    message = error(tmp_path / "x", HEADER + "\n".join(lines) + "\n")
    assert message.startswith(f"{tmp_path / 'x'}, line {place + 2}: must be CSV, its quotes in pairs, got: ")


@pytest.mark.usefixtures("small_blocks")
def test_a_value_that_does_not_parse_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(HEADER + '1,"2\n2",3\n' * 7 + "x,,3\n")
    with pytest.raises(DataError) as caught:
        for chunk in read_chunks(tmp_path / "x", ("a", "b"), "it"):
            chunk.require("a", pl.col("a").cast(pl.Int64, strict=False), "an integer")
    assert f"{tmp_path / 'x'}, line 16, column 'a': must be an integer, got 'x'." in str(caught.value)
    with pytest.raises(DataError, match="line 16, column 'b': must be there, got ''"):
        for chunk in read_chunks(tmp_path / "x", ("a", "b"), "it"):
            chunk.require("b", pl.col("b"), "there")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1, column 'a': must be in the header, beside a,c, got ''"),
        ("a,b\n1,2\n", "line 1, column 'c': must be in the header"),
        ("1,2,3\n", "line 1, column 'a': must be in the header, beside a,c, got '1,2,3'"),
        (b"\xff\n", "line 1, column 'a': must be in the header"),
        (HEADER, "must hold at least one line below its header"),
        ("a,b,c", "must hold at least one line below its header"),
        (gzip.compress(HEADER.encode() + b"1,2,3\n" * 999)[:-9], "must be a whole gzip file"),
    ],
)
def test_files_that_are_none_of_the_owners(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in error(tmp_path / "x", content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x must be a file, but does not exist\. Try: download it\."):
        list(read_chunks(tmp_path / "x", ("a",), "it"))
