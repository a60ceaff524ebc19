import csv
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from embsearch_plugin.data import csv_file
from embsearch_plugin.data.dataset import TabularDataset
from embsearch_plugin.data.kkbox import KkBox, write_sample
from embsearch_plugin.errors import DataError

TRAIN = """msno,song_id,source_system_tab,source_screen_name,source_type,target
u1=,s1=,my library,Local playlist more,local-library,1
u2=,s2=,,,,0
u2=,s1=,discover,"Explore, more",online-playlist,1
u2=,s9=,search,,song,1
u3=,s3=,search,,song,0
"""
SONGS = """song_id,song_length,genre_ids,artist_name,composer,lyricist,language
s7=,1,465,Nobody,Nobody,Nobody,3.0
s2=,247640,465,"Wind, Earth & Fire| 張信哲 (Jeff Chang)",董貞,何啟弘/Ann,3.0
s1=,197328,444|458,AC/DC,TEDDY|  FUTURE BOUNCE|  Bekuh BOOM,,
s3=,231781,465,AC/DC,"TEDDY、 Bo\\Cy;;TEDDY",,31.0
"""


def write(folder: Path, train: str = TRAIN, songs: str = SONGS) -> str:
    (folder / "train.csv").write_text(train, encoding="utf-8")
    (folder / "songs.csv").write_text(songs, encoding="utf-8")
    return str(folder)


def error(folder: Path, **files: str) -> str:
    with pytest.raises(DataError) as caught:
        KkBox(write(folder, **files)).load()
    return str(caught.value)


def bags(data: TabularDataset, field: str) -> list[list[int]]:
    """Return each record's ids, the long way."""
    column = [f.name for f in data.schema.fields].index(field)
    if field not in data.bags:
        return data.ids[:, column : column + 1].tolist()
    ends = data.bags[field].offsets.tolist()
    return [data.bags[field].values[ends[bag] : ends[bag + 1]].tolist() for bag in data.ids[:, column]]


def reference(folder: Path) -> tuple[list[float], dict[str, list[list[int]]], dict[str, int]]:
    """Return labels, ids of each record and vocabulary sizes: appendix A.1.2 of the paper, record by record."""
    with (folder / "songs.csv").open(encoding="utf-8", newline="") as file:
        songs = {record["song_id"]: record for record in csv.DictReader(file)}
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        records = [record for record in csv.DictReader(file) if record["song_id"] in songs]
    values: dict[str, list[list[str]]] = {
        "user": [[record["msno"]] for record in records],
        "song": [[record["song_id"]] for record in records],
    }
    for field, separators in (("artist_name", r"\|"), ("composer", r"[|/\\;、]"), ("lyricist", r"[|/\\;、]")):
        parts = [re.split(separators, songs[record["song_id"]][field]) for record in records]
        values[field] = [list(dict.fromkeys(part.strip() for part in found if part.strip())) for found in parts]
    counts = {field: Counter(value for found in lists for value in found) for field, lists in values.items()}
    sizes = {field: len(count) for field, count in counts.items()}
    labels = [float(record["target"]) for record in records]
    return labels, {f: [[counts[f][value] for value in found] for found in lists] for f, lists in values.items()}, sizes


def test_fields_labels_and_bags_are_those_of_the_files(tmp_path: Path) -> None:
    data = KkBox(write(tmp_path), split=(1.0, 0.0, 0.0)).load()
    rows = {field.name: (field.rows, field.multiple) for field in data.schema.fields}
    assert rows == {
        "user": (3, False),
        "song": (3, False),
        "artist_name": (3, True),
        "composer": (6, True),
        "lyricist": (2, True),
    }
    assert data.schema.dense == ()
    assert data.schema.items == ("song", "artist_name", "composer", "lyricist")
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert bags(data, "user") == [[1], [0], [0], [2]]
    assert bags(data, "song") == [[0], [1], [0], [2]]
    assert bags(data, "artist_name") == [[0], [1, 2], [0], [0]]
    assert bags(data, "composer") == [[0, 1, 2], [3], [0, 1, 2], [0, 4, 5]]
    assert bags(data, "lyricist") == [[], [0, 1], [], []]


def test_ids_equal_a_slow_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are told apart by how often they occur: the more frequent, the smaller; equal ids, equal values."""
    monkeypatch.setattr(csv_file, "BLOCK", 2000)
    write_sample(tmp_path, users=30, songs=25, records=600, seed=4)
    data = KkBox(str(tmp_path), split=(1.0, 0.0, 0.0)).load()
    labels, counts, sizes = reference(tmp_path)
    assert data.labels.tolist() == labels
    assert {field.name: field.rows for field in data.schema.fields} == sizes
    for field, lists in counts.items():
        count_of: dict[int, int] = {}
        got = bags(data, field)
        for ids, expected in zip(got, lists, strict=True):
            assert len(ids) == len(expected)
            assert all(count_of.setdefault(i, n) == n for i, n in zip(ids, expected, strict=True))
        by_id = [count_of[i] for i in range(sizes[field])]
        assert by_id == sorted(by_id, reverse=True)
        assert Counter(i for ids in got for i in ids) == count_of


def test_other_splits_do_not_decide_what_is_frequent(tmp_path: Path) -> None:
    """Ids rank by training alone; rows that only other splits have stand in the order of the files."""
    write_sample(tmp_path, users=200, songs=120, records=600, seed=4)
    data = KkBox(str(tmp_path)).load()
    train = set(data.splits["train"].tolist())
    for name in ("user", "song", "composer"):
        rows = next(field.rows for field in data.schema.fields if field.name == name)
        seen = Counter(i for place, ids in enumerate(bags(data, name)) if place in train for i in ids)
        by_id = [seen[i] for i in range(rows)]
        assert by_id == sorted(by_id, reverse=True)
        new = list(dict.fromkeys(i for ids in bags(data, name) for i in ids if not seen[i]))
        assert new == sorted(new)
        assert new or name == "composer"


def test_the_split_is_the_papers(tmp_path: Path) -> None:
    write_sample(tmp_path, records=2000)
    first, again, other = (KkBox(str(tmp_path), seed=seed).load() for seed in (0, 0, 1))
    sizes = [len(first.splits[split]) / len(first.labels) for split in ("train", "validation", "test")]
    assert sizes == pytest.approx([0.72, 0.08, 0.2], abs=1e-3)
    assert torch.equal(first.splits["test"], again.splits["test"])
    assert not torch.equal(first.splits["test"], other.splits["test"])
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_a_song_is_kept_once_however_often_it_is_heard(tmp_path: Path) -> None:
    write_sample(tmp_path, songs=40, records=2000)
    data = KkBox(str(tmp_path)).load()
    assert data.ids.dtype == data.bags["composer"].values.dtype == torch.int32
    assert all(len(stored.offsets) == 40 for stored in data.bags.values())  # one of the 40 songs is not in songs.csv


def test_a_sample_has_something_to_learn_and_equal_seeds_equal_files(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / folder, seed=seed)
    a, b, c = ((tmp_path / folder / "train.csv").read_text() for folder in "abc")
    assert a == b != c
    data = KkBox(str(tmp_path / "a")).load()
    song = data.ids[:, 1]
    rates = torch.stack([data.labels[song == s].mean() for s in range(20)])
    assert rates.max() - rates.min() > 0.3


@pytest.mark.parametrize(
    ("name", "line", "column", "got"),
    [
        ("train", "u1=,s1=,a,b,c", "target", "5 values"),
        ("train", "u1=,s1=,a,b,c,1,0", "target", "7 values"),
        ("train", "u1=,s1=,a,b,c,", "target", ""),
        ("train", "u1=,s1=,a,b,c,yes", "target", "yes"),
        ("train", "u1=,s1=,a,b,c,2", "target", "2"),
        ("train", ",s1=,a,b,c,1", "msno", ""),
        ("train", "u1=,,a,b,c,1", "song_id", ""),
        ("songs", "s4=,1,465,A,B", "lyricist", "5 values"),
        ("songs", "s4=,1,465,A,B,C, D,3.0", "language", "8 values"),
        ("songs", "s1=,1,465,A,B,C,3.0", "song_id", "s1="),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, name: str, line: str, column: str, got: str) -> None:
    good = {"train": TRAIN, "songs": SONGS}[name]
    message = error(tmp_path, **{name: f"{good}{line}\n"})
    assert message.startswith(f"{tmp_path / name}.csv, line {good.count(chr(10)) + 1}, column {column!r}: must be ")
    assert f"got {got!r}" in message


@pytest.mark.parametrize("block", [40, 1 << 24])
def test_a_song_that_comes_twice_is_named_wherever_it_is(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "BLOCK", block)
    twice = "s3=,1,465,A,B,C,3.0\n"
    assert "songs.csv, line 6, column 'song_id': must be another one on every line, got 's3='" in error(
        tmp_path, songs=SONGS + twice
    )
    unknown = SONGS + "s8=,1,465,A,B,C,3.0\n" * 2  # nobody listens to it
    assert len(KkBox(write(tmp_path, songs=unknown)).load().labels) == 4


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    songs = SONGS.replace("=,", "!,")
    assert "songs.csv must hold songs of train.csv, but has none" in error(tmp_path, songs=songs)


@pytest.mark.parametrize("name", ["train", "songs"])
def test_missing_files_and_files_without_lines_are_named(tmp_path: Path, name: str) -> None:
    header = {"train": TRAIN, "songs": SONGS}[name].splitlines()[0]
    assert f"{name}.csv must hold at least one line below its header" in error(tmp_path, **{name: header})
    assert f"{name}.csv, line 1, column" in error(tmp_path, **{name: ""})
    (tmp_path / f"{name}.csv").unlink()
    with pytest.raises(DataError, match=rf"{name}\.csv must be a file, but does not exist.*KKBox"):
        KkBox(str(tmp_path)).load()


def test_the_end_of_lines_does_not_matter(tmp_path: Path) -> None:
    data = KkBox(write(tmp_path)).load()
    for name, text in (("train", TRAIN), ("songs", SONGS)):
        (tmp_path / f"{name}.csv").write_bytes(text.replace("\n", "\r\n").encode())
    assert KkBox(str(tmp_path)).load().fingerprint() == data.fingerprint()
