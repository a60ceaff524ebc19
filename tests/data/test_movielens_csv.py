import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from embsearch_plugin.data import csv_file
from embsearch_plugin.data.movielens_csv import MovieLensCsv, write_sample
from embsearch_plugin.errors import DataError
from embsearch_plugin.tasks import RATING

RATINGS = """userId,movieId,rating,timestamp
7,50,4.0,1362062307
7,10,3.5,1362062624
9,10,5.0,1362152838
7,30,0.5,1362063503
9,50,4.5,1362152838
"""
MOVIES = """movieId,title,genres
10,"Heat, The (1995)",Action|Crime
30,Nothing,(no genres listed)
50,"Say ""Ah"" (2001)",Crime
70,Not rated (2010),War
"""


def write(folder: Path, ratings: str = RATINGS, movies: str | None = None) -> str:
    (folder / "ratings.csv").write_text(ratings, encoding="utf-8")
    if movies is not None:
        (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return str(folder)


def error(folder: Path, **files: str) -> str:
    with pytest.raises(DataError) as caught:
        MovieLensCsv(write(folder, **files)).load()
    return str(caught.value)


ALL = {"split": (1.0, 0.0, 0.0), "min_count": 1}


def test_fields_and_labels_are_those_of_the_file(tmp_path: Path) -> None:
    data = MovieLensCsv(write(tmp_path), **ALL).load()
    column = {field.name: data.ids[:, f].tolist() for f, field in enumerate(data.schema.fields)}
    assert {field.name: field.rows for field in data.schema.fields} == {"user": 3, "movie": 4, "hour": 24, "weekday": 7}
    assert column["user"] == [1, 1, 2, 1, 2]
    assert [movie == column["movie"][0] for movie in column["movie"]] == [True, False, False, False, True]
    times = [datetime.fromtimestamp(int(record.split(",")[3]), UTC) for record in RATINGS.splitlines()[1:]]
    assert column["hour"] == [time.hour for time in times]
    assert column["weekday"] == [time.weekday() for time in times]
    assert data.labels.tolist() == [1, 0, 1, 0, 1]
    assert MovieLensCsv(write(tmp_path), threshold=3.5, **ALL).load().labels.tolist() == [1, 1, 1, 0, 1]


def test_genres_are_bags_where_there_is_a_file_of_movies(tmp_path: Path) -> None:
    data = MovieLensCsv(write(tmp_path, movies=MOVIES), **ALL).load()
    field = data.schema.fields[-1]
    assert (field.name, field.rows, field.multiple) == ("genres", 3, True)
    assert data.schema.items == ("movie", "genres")
    batch = next(iter(data.batches("train", 5)))
    genres = batch.sparse_features["genres"]
    order = data.splits["train"].tolist()
    by_movie = {10: [1, 0], 30: [], 50: [0]}  # Crime is the most frequent
    movies = [int(record.split(",")[1]) for record in RATINGS.splitlines()[1:]]
    assert [part.tolist() for part in genres.values().split(genres.lengths().tolist())] == [
        by_movie[movies[at]] for at in order
    ]


@pytest.mark.parametrize("split_by", ["time", "random"])
def test_ids_and_numbers_equal_a_slow_reference(tmp_path: Path, split_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "BLOCK", 999)
    write_sample(tmp_path, users=40, movies=30, ratings=500, seed=5)
    shuffled = pl.read_csv(tmp_path / "ratings.csv").sample(fraction=1, shuffle=True, seed=1)
    shuffled = shuffled.with_columns(pl.col("timestamp") // 90_000 * 90_000)  # many at the same second
    shuffled.write_csv(tmp_path / "ratings.csv")
    rows = shuffled.rows()
    data = MovieLensCsv(str(tmp_path), split_by=split_by, min_count=3).load()
    train = data.splits["train"].tolist()
    raw = []
    for f, at in ((0, 0), (1, 1)):
        frequent = [v for v, n in Counter(rows[t][at] for t in train).items() if n >= 3]
        ids = data.ids[:, f].tolist()
        assert all((i == 0) == (row[at] not in frequent) for i, row in zip(ids, rows, strict=True))
        assert len({(i, row[at]) for i, row in zip(ids, rows, strict=True) if i}) == len(frequent)
        assert data.schema.fields[f].rows == 1 + len(frequent)
        earlier = [sum(o[at] == row[at] and (o[3], m) < (row[3], n) for m, o in enumerate(rows)) for n, row in enumerate(rows)]
        raw.append(np.log1p(earlier))
    numbers = np.column_stack(raw)
    standard = (numbers - numbers[train].mean(0)) / numbers[train].std(0)
    np.testing.assert_allclose(data.dense, standard, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split_by", ["time", "random"])
def test_the_stars_themselves_may_be_asked_for(tmp_path: Path, split_by: str) -> None:
    write_sample(tmp_path, ratings=500)
    data = MovieLensCsv(str(tmp_path), split_by=split_by, task="rating").load()
    lines = [line.split(",") for line in (tmp_path / "ratings.csv").read_text().splitlines()[1:]]
    assert data.schema.task is RATING and [field.name for field in data.schema.fields] == ["user", "movie"]
    assert [field.rows for field in data.schema.fields] == [len({line[0] for line in lines}), len({line[1] for line in lines})]
    assert data.labels.tolist() == [float(line[2]) for line in lines]
    for column in (0, 1):
        seen = {(line[column], int(row)) for line, row in zip(lines, data.ids[:, column], strict=True)}
        assert len(seen) == data.schema.fields[column].rows  # one row for each, and each row once
        assert len({row for _, row in seen}) == len(seen)
    clicks = MovieLensCsv(str(tmp_path), split_by=split_by).load()
    assert all(torch.equal(data.splits[name], clicks.splits[name]) for name in data.splits)


def test_by_time_nothing_of_later_splits_is_known_before(tmp_path: Path) -> None:
    """Whatever is rated, and how, after the training split: no training example changes."""
    write_sample(tmp_path, ratings=400)
    before = MovieLensCsv(str(tmp_path)).load()
    times = pl.read_csv(tmp_path / "ratings.csv")["timestamp"].to_numpy()
    train, validation, test = (before.splits[split] for split in ("train", "validation", "test"))
    assert times[train].max() <= times[validation].min() <= times[validation].max() <= times[test].min()
    lines = (tmp_path / "ratings.csv").read_text().splitlines(keepends=True)
    for position in torch.cat([validation, test]).tolist():
        lines[1 + position] = f"1,1,0.5,{times[position]}\n"
    (tmp_path / "ratings.csv").write_text("".join(lines))
    after = MovieLensCsv(str(tmp_path)).load()
    assert torch.equal(after.splits["train"], train)
    assert torch.equal(after.ids[train], before.ids[train])
    assert torch.equal(after.dense[train], before.dense[train])
    assert not torch.equal(after.ids, before.ids)


def test_a_random_split_is_by_seed(tmp_path: Path) -> None:
    write_sample(tmp_path, ratings=400)
    first, again, other = (MovieLensCsv(str(tmp_path), split_by="random", seed=seed).load() for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert {split: len(part) for split, part in first.splits.items()} == {"train": 320, "validation": 40, "test": 40}


def test_a_sample_has_something_to_learn_and_equal_seeds_equal_files(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / folder, ratings=3000, seed=seed)
    a, b, c = ((tmp_path / folder / "ratings.csv").read_text() for folder in "abc")
    assert a == b != c
    data = MovieLensCsv(str(tmp_path / "a"), **ALL).load()
    rates = torch.stack([data.labels[data.ids[:, 1] == movie].mean() for movie in range(1, 20)])
    assert rates.max() - rates.min() > 0.3


@pytest.mark.parametrize(
    ("name", "line", "column", "got"),
    [
        ("ratings", "7,10,3.5", "timestamp", "3 values"),
        ("ratings", "7,10,3.5,1362062307,1", "timestamp", "5 values"),
        ("ratings", "seven,10,3.5,1362062307", "userId", "seven"),
        ("ratings", ",10,3.5,1362062307", "userId", ""),
        ("ratings", "7,1.5,3.5,1362062307", "movieId", "1.5"),
        ("ratings", "7,11,3.5,1362062307", "movieId", "11"),
        ("ratings", "7,10,good,1362062307", "rating", "good"),
        ("ratings", "7,10,5.5,1362062307", "rating", "5.5"),
        ("ratings", "7,10,nan,1362062307", "rating", "nan"),
        ("ratings", "7,10,3.5,2013-02-28", "timestamp", "2013-02-28"),
        ("ratings", "7,10,3.5,0", "timestamp", "0"),
        ("movies", "80,Heat, The (1995),War", "genres", "4 values"),
        ("movies", "x80,Heat (1995),War", "movieId", "x80"),
        ("movies", "30,Heat (1995),War", "movieId", "30"),
    ],
)
@pytest.mark.parametrize("block", [50, 1 << 24])
def test_a_malformed_line_is_named(
    tmp_path: Path, name: str, line: str, column: str, got: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_file, "BLOCK", block)
    files = {"ratings": RATINGS, "movies": MOVIES}
    number = files[name].count("\n") + 1
    files[name] += line + "\n"
    message = error(tmp_path, **files)
    assert message.startswith(f"{tmp_path / name}.csv, line {number}, column {column!r}: must be ")
    assert f"got {got!r}" in message


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "movies.csv").write_bytes((MOVIES + "80,Amélie (2001),Comedy\n").encode("latin-1"))
    with pytest.raises(DataError, match="movies.csv, line 6, column 'title': must be text in UTF-8"):
        MovieLensCsv(str(tmp_path)).load()


def test_the_end_of_lines_does_not_matter(tmp_path: Path) -> None:
    data = MovieLensCsv(write(tmp_path, movies=MOVIES)).load()
    for name, text in (("ratings", RATINGS), ("movies", MOVIES)):
        (tmp_path / f"{name}.csv").write_bytes(text.replace("\n", "\r\n").encode())
    assert MovieLensCsv(str(tmp_path)).load().fingerprint() == data.fingerprint()


def test_a_task_that_the_files_do_not_serve_is_named() -> None:
    with pytest.raises(ValueError, match="task must be 'click' or 'rating' for movielens-csv; got 'top-k'"):
        MovieLensCsv("folder", task="top-k")


def test_missing_files_and_files_without_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings\.csv must be a file, but does not exist.*MovieLens-20M"):
        MovieLensCsv(str(tmp_path)).load()
    assert "ratings.csv must hold at least one line below its header" in error(tmp_path, ratings=RATINGS.splitlines()[0])
    assert "movies.csv, line 1, column 'movieId': must be in the header" in error(tmp_path, movies="")


@pytest.mark.skipif("EMBSEARCH_MOVIE_STREAM" not in os.environ, reason="EMBSEARCH_MOVIE_STREAM names no folder of ratings.csv")
def test_a_real_file() -> None:
    data = MovieLensCsv(os.environ["EMBSEARCH_MOVIE_STREAM"]).load()
    assert data.ids.shape == (336_672, 4)
    assert data.labels.sum() == 167_665
    assert data.splits["train"].tolist() == list(range(269_338))
