import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from embsearch_plugin.data.movielens import GENRES, MovieLens1M, write_sample
from embsearch_plugin.errors import DataError
from embsearch_plugin.tasks import RATING

USERS = "1::F::1::10::48067\n7::M::56::16::70072-1\n3::M::25::10::55117\n"
MOVIES = "1::Toy Story: A (Long) Title (1995)::Animation|Comedy\n9::Misérables, Les (1998)::Drama\n"
RATINGS = "7::9::5::978300760\n1::1::3::978302109\n7::1::4::0\n1::9::1::978300275\n"


def write(folder: Path, users: str = USERS, movies: str = MOVIES, ratings: str = RATINGS) -> str:
    for name, text in (("users", users), ("movies", movies), ("ratings", ratings)):
        (folder / f"{name}.dat").write_text(text, encoding="latin-1")
    return str(folder)


def error(folder: Path, **files: str) -> str:
    with pytest.raises(DataError) as caught:
        MovieLens1M(write(folder, **files)).load()
    return str(caught.value)


def test_fields_and_vocabularies(tmp_path: Path) -> None:
    data = MovieLens1M(write(tmp_path)).load()
    rows = {field.name: field.rows for field in data.schema.fields}
    genres = {name: n for name, n in rows.items() if name.startswith("genre_")}
    assert len(rows) == 25
    assert list(genres.values()) == [2] * 18
    others = {"user": 3, "gender": 2, "age": 3, "occupation": 2, "zip": 3, "movie": 2, "year": 2}
    assert {name: rows[name] for name in rows if name not in genres} == others


def test_ids_and_labels_are_those_of_the_files(tmp_path: Path) -> None:
    data = MovieLens1M(write(tmp_path)).load()
    assert data.labels.tolist() == [1, 0, 1, 0]
    column = {field.name: data.ids[:, f].tolist() for f, field in enumerate(data.schema.fields)}
    assert column["user"] == [1, 0, 1, 0]
    assert column["movie"] == [1, 0, 0, 1]
    assert column["gender"] == [1, 0, 1, 0]
    assert column["age"] == [2, 0, 2, 0]
    assert column["occupation"] == [1, 0, 1, 0]
    assert column["zip"] == [2, 0, 2, 0]
    assert column["year"] == [1, 0, 0, 1]
    assert column["genre_comedy"] == [0, 1, 1, 0]
    assert column["genre_drama"] == [1, 0, 0, 1]
    assert column["genre_war"] == [0, 0, 0, 0]


def test_dense_columns_equal_a_slow_reference(tmp_path: Path) -> None:
    write_sample(tmp_path, users=12, movies=8, ratings=60, seed=3)
    data = MovieLens1M(str(tmp_path), split=(0.5, 0.25, 0.25), seed=2).load()
    users, movies, ratings = (
        [line.split("::") for line in (tmp_path / f"{name}.dat").read_text().splitlines()]
        for name in ("users", "movies", "ratings")
    )
    train = data.splits["train"].tolist()
    expected = []
    for user, movie, *_ in ratings:
        age = next(float(record[2]) for record in users if record[0] == user)
        title, genres = next(record[1:] for record in movies if record[0] == movie)
        by_user, by_movie = (sum(ratings[t][at] == key for t in train) for at, key in ((0, user), (1, movie)))
        expected.append([age, float(title[-5:-1]), genres.count("|") + 1, np.log1p(by_user), np.log1p(by_movie)])
    raw = np.array(expected)
    standard = (raw - raw[train].mean(0)) / raw[train].std(0)
    np.testing.assert_allclose(data.dense, standard, rtol=1e-5, atol=1e-5)


def test_ratings_outside_the_training_split_leave_no_trace(tmp_path: Path) -> None:
    """Whoever rates what in the test split, nothing of any training example may change."""
    write_sample(tmp_path, users=12, movies=8, ratings=60)
    config = MovieLens1M(str(tmp_path), split=(0.5, 0.25, 0.25))
    before = config.load()
    lines = (tmp_path / "ratings.dat").read_text().splitlines(keepends=True)
    for position in before.splits["test"].tolist():
        lines[position] = "1::1::5::0\n"
    (tmp_path / "ratings.dat").write_text("".join(lines))
    after, train = config.load(), before.splits["train"]
    assert torch.equal(after.splits["train"], train)
    assert torch.equal(after.dense[train], before.dense[train])
    assert not torch.equal(after.ids, before.ids)


def test_split_is_by_seed_and_fractions(tmp_path: Path) -> None:
    write_sample(tmp_path, users=20, movies=10, ratings=200)
    first, again, other = (MovieLens1M(str(tmp_path), seed=seed).load() for seed in (1, 1, 2))
    assert {split: len(part) for split, part in first.splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert torch.equal(first.splits["test"], again.splits["test"])
    assert not torch.equal(first.splits["test"], other.splits["test"])


def test_a_split_by_time_tests_on_the_latest_ratings(tmp_path: Path) -> None:
    write_sample(tmp_path, users=20, movies=10, ratings=100)
    lines = (tmp_path / "ratings.dat").read_text().splitlines(keepends=True)
    (tmp_path / "ratings.dat").write_text("".join(reversed(lines)))
    for task in ("click", "rating"):
        splits = MovieLens1M(str(tmp_path), split_by="time", task=task).load().splits
        assert splits["train"].tolist() == list(range(99, 19, -1))
        assert splits["test"].tolist() == list(range(9, -1, -1))
    with pytest.raises(ValueError, match="split_by must be random for the task top-k"):
        MovieLens1M(str(tmp_path), split_by="time", task="top-k")


def test_a_split_by_time_needs_every_time(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings\.dat, line 3, column 'Timestamp': must be above 0 .* got 0 \(1 such line"):
        MovieLens1M(write(tmp_path), split_by="time").load()


def test_a_sample_has_the_owners_form_and_something_to_learn(tmp_path: Path) -> None:
    write_sample(tmp_path / "new" / "folder", users=50, movies=30, ratings=1200)
    data = MovieLens1M(str(tmp_path / "new" / "folder")).load()
    assert len(data.labels) == 1200
    assert len(torch.unique(data.ids[:, [0, 5]], dim=0)) == 1200
    train, test = data.splits["train"], data.splits["test"]
    mean = [data.labels[train][data.ids[train, 5] == movie].mean() for movie in range(30)]
    assert spearmanr([mean[movie] for movie in data.ids[test, 5]], data.labels[test]).statistic > 0.2


def test_equal_seeds_write_equal_samples(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / folder, users=10, movies=5, ratings=20, seed=seed)
    a, b, c = ((tmp_path / folder / "ratings.dat").read_text() for folder in "abc")
    assert a == b != c


def test_ratings_are_stars_of_users_and_movies_that_occur(tmp_path: Path) -> None:
    data = MovieLens1M(write(tmp_path, movies="4::Unrated (1990)::Drama\n" + MOVIES), task="rating").load()
    assert [(field.name, field.rows) for field in data.schema.fields] == [("user", 2), ("movie", 2)]
    assert (data.schema.items, data.schema.task, data.dense.shape) == (("movie",), RATING, (4, 0))
    assert data.ids.tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]
    assert data.labels.tolist() == [5, 3, 4, 1]


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'ratings'. Did you mean 'rating'"):
        MovieLens1M(str(tmp_path), task="ratings")


@pytest.mark.parametrize("name", ["users", "movies", "ratings"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / f"{name}.dat").unlink()
    with pytest.raises(DataError, match=rf"{name}\.dat must be a file, but does not exist.*MovieLens-1M"):
        MovieLens1M(str(tmp_path)).load()


@pytest.mark.parametrize("name", ["users", "movies", "ratings"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    assert f"{name}.dat must hold at least one line" in error(tmp_path, **{name: ""})


@pytest.mark.parametrize(
    ("name", "line", "column", "got"),
    [
        ("users", "8::M::25::10", "Zip-code", "4 values"),
        ("users", "8::M::25::10::55117::x", "Zip-code", "6 values"),
        ("users", "7::M::25::10::55117", "UserID", "7"),
        ("users", "8::X::25::10::55117", "Gender", "X"),
        ("users", "8::M::old::10::55117", "Age", "old"),
        ("users", "8::M::25::1.5::55117", "Occupation", "1.5"),
        ("movies", "", "Title", "1 values"),
        ("movies", "9::Heat (1995)::Action", "MovieID", "9"),
        ("movies", "5::Heat::Action", "Title", "Heat"),
        ("movies", "5::Heat (1995)::Action|Cooking", "Genres", "Action|Cooking"),
        ("ratings", "1::1::3", "Timestamp", "3 values"),
        ("ratings", "2::1::3::0", "UserID", "2"),
        ("ratings", "1::2::3::0", "MovieID", "2"),
        ("ratings", "1::1::3.5::0", "Rating", "3.5"),
        ("ratings", "1::1::3::then", "Timestamp", "then"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, name: str, line: str, column: str, got: str) -> None:
    good = {"users": USERS, "movies": MOVIES, "ratings": RATINGS}[name]
    message = error(tmp_path, **{name: f"{good}{line}\n"})
    assert message.startswith(f"{tmp_path / name}.dat, line {good.count(chr(10)) + 1}, column {column!r}: must be ")
    assert f"got {got!r}" in message
    assert "Try: " in message


@pytest.mark.skipif("EMBSEARCH_ML1M" not in os.environ, reason="EMBSEARCH_ML1M does not name a folder of MovieLens-1M")
def test_the_real_files() -> None:
    data = MovieLens1M(os.environ["EMBSEARCH_ML1M"]).load()
    rows = {field.name: field.rows for field in data.schema.fields}
    assert (rows["user"], rows["movie"], rows["age"], rows["occupation"]) == (6040, 3883, 7, 21)
    assert data.ids.shape == (1_000_209, 7 + len(GENRES))
    assert data.labels.sum() == 575_281
    assert data.dense.isfinite().all()
    torch.testing.assert_close(data.dense[data.splits["train"]].std(0), torch.ones(5), atol=1e-3, rtol=0)


@pytest.mark.skipif("EMBSEARCH_ML1M" not in os.environ, reason="EMBSEARCH_ML1M does not name a folder of MovieLens-1M")
def test_the_real_leave_one_out() -> None:
    data = MovieLens1M(os.environ["EMBSEARCH_ML1M"], task="top-k").load()
    assert [field.rows for field in data.schema.fields] == [6040, 3706]  # nis.txt, Table 1
    assert {split: len(pairs) for split, pairs in data.pairs.items()} == {"train": 894_752, "validation": 99_417, "test": 6040}
    assert data.negatives.shape == (6040, 99)
