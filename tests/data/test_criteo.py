import gzip
import math
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embsearch_plugin.data import criteo
from embsearch_plugin.data.criteo import CATEGORIES, COLUMNS, INTEGERS, Criteo, write_sample
from embsearch_plugin.data.dataset import Batches, Split
from embsearch_plugin.errors import DataError

TENTHS = {"train": range(8), "validation": [8], "test": [9]}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "CHUNK", 16)


def line(label: str = "1", **values: str) -> str:
    return "\t".join([label, *(values.get(name, "") for name in (*INTEGERS, *CATEGORIES))])


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def examples(batches: Batches) -> list[tuple]:
    """Return (label, numbers, ids) of each example, unpacked the long way."""
    return [
        (
            batch.labels[i].item(),
            tuple(batch.dense_features[i].tolist()),
            tuple(int(batch.sparse_features[key].values()[i]) for key in CATEGORIES),
        )
        for batch in batches
        for i in range(len(batch.labels))
    ]


def reference(text: str, rows: int, split: str) -> list[tuple]:
    expected = []
    for number, record in enumerate(text.splitlines()):
        label, *values = record.split("\t")
        numbers = [math.log1p(max(int(value), 0)) if value else 0 for value in values[:13]]
        ids = [int(value, 16) % (rows - 1) + 1 if value else 0 for value in values[13:]]
        if number % 10 in TENTHS[split]:
            expected.append((float(label), tuple(torch.tensor(numbers).tolist()), tuple(ids)))
    return expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("split", list(TENTHS))
@pytest.mark.parametrize("name", ["day.tsv", "day.gz", "compressed_without_saying_so"])
def test_examples_equal_a_slow_reference(tmp_path: Path, name: str, split: Split) -> None:
    write_sample(tmp_path / "plain", rows=77)
    text = (tmp_path / "plain").read_text()
    (tmp_path / name).write_bytes(text.encode() if name.endswith("tsv") else gzip.compress(text.encode()))
    got = examples(Criteo(str(tmp_path / name), rows=50).load().batches(split, 7))
    expected = reference(text, 50, split)
    assert [(label, ids) for label, _, ids in got] == [(label, ids) for label, _, ids in expected]
    for (_, numbers, _), (_, expected_numbers, _) in zip(got, expected, strict=True):
        assert numbers == pytest.approx(expected_numbers, rel=1e-6)


@given(n=st.integers(1, 60), batch_size=st.integers(1, 30), split=st.sampled_from(list(TENTHS)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_example_comes_once_and_only_the_last_batch_is_smaller(
    tmp_path_factory: pytest.TempPathFactory, n: int, batch_size: int, split: Split, seed: int
) -> None:
    path = write(tmp_path_factory.mktemp("criteo") / "day", [line(int_0=str(i)) for i in range(n)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criteo, "CHUNK", 16)
        batches = Criteo(path).load().batches(split, batch_size, seed=seed)
        sizes, got = [len(batch.labels) for batch in batches], examples(batches)
    assert all(size == batch_size for size in sizes[:-1])
    assert all(0 < size <= batch_size for size in sizes)
    numbers = sorted(round(math.expm1(dense[0])) for _, dense, _ in got)
    assert numbers == [i for i in range(n) if i % 10 in TENTHS[split]]


@pytest.mark.usefixtures("small_chunks")
def test_the_order_depends_on_seed_and_epoch_and_stays_within_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "day", [line(int_0=str(i)) for i in range(64)])
    data = Criteo(path).load()

    def order(batches: Batches) -> list[int]:
        return [round(math.expm1(dense[0])) for _, dense, _ in examples(batches)]

    batches = data.batches("train", 5, seed=1)
    first, second = order(batches), order(batches)
    assert first != second
    assert batches.epoch == 2
    batches.epoch = 0
    assert order(batches) == first
    assert [i // 16 for i in first] == sorted(i // 16 for i in first)
    assert order(data.batches("train", 5)) == sorted(first)


def test_missing_values_are_zero_and_large_negative_ones_too(tmp_path: Path) -> None:
    path = write(tmp_path / "day", [line("0", int_1="-2", int_2="7", cat_1="0", cat_2="ff", cat_3="FF")])
    label, numbers, ids = examples(Criteo(path, rows=100).load().batches("train", 1))[0]
    assert label == 0
    assert numbers[:3] == pytest.approx((0, 0, math.log(8)))
    assert ids[:4] == (0, 1, 1 + 255 % 99, 1 + 255 % 99)


def test_schema(tmp_path: Path) -> None:
    data = Criteo(write(tmp_path / "day", [line()]), rows=9).load()
    assert [(field.name, field.rows) for field in data.schema.fields] == [(f"cat_{i}", 9) for i in range(26)]
    assert data.schema.dense == tuple(f"int_{i}" for i in range(13))
    assert len(COLUMNS) == 40


@pytest.mark.usefixtures("small_chunks")
def test_reading_is_lazy(tmp_path: Path) -> None:
    """A bad line in the second chunk goes unnoticed as long as batches come from the first."""
    path = write(tmp_path / "day", [*[line()] * 20, "no data"])
    batches = Criteo(path).load().batches("train", 4)
    assert len(list(islice(batches, 3))) == 3
    with pytest.raises(DataError, match="line 21"):
        list(batches)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "CHUNK", 256)

    def peak(rows: int) -> int:
        write_sample(tmp_path / "day", rows=rows)
        data = Criteo(str(tmp_path / "day")).load()
        tracemalloc.start()
        try:
            for _ in data.batches("train", 100):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8000) < 1.5 * peak(1000)


def test_a_sample_has_something_to_learn_and_equal_seeds_equal_lines(tmp_path: Path) -> None:
    for name, seed in (("a.gz", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / name, rows=2000, seed=seed)
    a, b, c = gzip.decompress((tmp_path / "a.gz").read_bytes()), *((tmp_path / name).read_bytes() for name in "bc")
    assert a == b != c
    got = examples(Criteo(str(tmp_path / "b")).load().batches("train", 500))
    clicks = [label for label, _, _ in got]
    assert 0.2 < sum(clicks) / len(clicks) < 0.6
    ids = {ids[0] for _, _, ids in got}
    rates = [[label for label, _, mine in got if mine[0] == i] for i in ids]
    large = [sum(labels) / len(labels) for labels in rates if len(labels) > 50]
    assert max(large) - min(large) > 0.1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("bad", "column", "got"),
    [
        (line() + "\tff", "cat_25", "41 values"),
        (line()[:-1], "cat_25", "39 values"),
        ("", "int_0", "1 values"),
        (line("2"), "label", "2"),
        (line(""), "label", ""),
        (line(int_4="1.5"), "int_4", "1.5"),
        (line(int_12="x"), "int_12", "x"),
        (line(cat_0="68fd1e6g"), "cat_0", "68fd1e6g"),
        (line(cat_25="-ff"), "cat_25", "-ff"),
        (line(cat_3='"'), "cat_3", '"'),
    ],
)
@pytest.mark.parametrize("place", [0, 8, 36])
def test_a_malformed_line_is_named(tmp_path: Path, bad: str, column: str, got: str, place: int) -> None:
    lines = [line(int_0="5", cat_0="0a")] * 40
    lines[place] = bad
    path = write(tmp_path / "day", lines)
    split = "validation" if place == 8 else "train"
    with pytest.raises(DataError) as caught:
        list(Criteo(path).load().batches(split, 7))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {place + 1}, column {column!r}: must be ")
    assert f"got {got!r}" in message
    assert "Try: " in message


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "day").write_bytes(line(cat_2="ab").encode().replace(b"ab", b"\xff\xfe") + b"\n")
    with pytest.raises(DataError, match="line 1, column 'cat_2'"):
        Criteo(str(tmp_path / "day")).load()


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_end_of_lines_does_not_matter(tmp_path: Path, end: str) -> None:
    (tmp_path / "day").write_bytes((line(cat_25="ff") + end).encode())
    assert examples(Criteo(str(tmp_path / "day")).load().batches("train", 1))[0][2][25] == 256


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_empty_file_is_refused(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / "day").write_bytes(compress(b""))
    with pytest.raises(DataError, match="must hold at least one line"):
        Criteo(str(tmp_path / "day")).load()


def damage(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"damaged" + data[len(data) // 2 + 7 :]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spoil", [lambda data: data[:-100], lambda data: data[:5], damage])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "day.gz"
    write_sample(path, rows=2000)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"day.gz must be a whole gzip file|line \d+, column"):
        list(Criteo(str(path)).load().batches("train", 100))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"day must be a file, but does not exist.*Criteo"):
        Criteo(str(tmp_path / "day")).load()
    with pytest.raises(DataError, match="must be a file, but is a folder"):
        Criteo(str(tmp_path)).load()


def test_a_table_needs_two_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows must be at least 2"):
        Criteo(write(tmp_path / "day", [line()]), rows=1).load()
