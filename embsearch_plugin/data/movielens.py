"""MovieLens-1M, read from GroupLens's own three files.

They are in latin-1, one record per line, with values separated by ``::``:

    ratings.dat   UserID::MovieID::Rating::Timestamp
    users.dat     UserID::Gender::Age::Occupation::Zip-code
    movies.dat    MovieID::Title (Year)::Genre|Genre

For top-k recommendation a fourth file stands beside them, ``leave_one_out.parquet``: see ``data/leave_one_out.py``.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embsearch_plugin.data.dataset import (
    Field,
    Schema,
    Split,
    SplitBy,
    TabularDataset,
    check_split,
    malformed,
    require_file,
    split_of,
)
from embsearch_plugin.data.interactions import Ratings, occurring, rating_dataset, top_k_dataset
from embsearch_plugin.data.leave_one_out import FILE, write_test_split
from embsearch_plugin.data.ranking import RankingDataset
from embsearch_plugin.errors import DataError, SettingsError, did_you_mean
from embsearch_plugin.tasks import CLICK, TASKS

# fmt: off
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
STARS = {str(star): star for star in range(1, 6)}
USER_FIELDS = ("user", "gender", "age", "occupation", "zip")
MOVIE_FIELDS = ("movie", "year", *("genre_" + re.sub(r"\W", "_", genre.lower()) for genre in GENRES))
DENSE = ("age", "year", "genres", "user_ratings", "movie_ratings")


@dataclass(frozen=True)
class MovieLens1M:
    """Users and movies. ``path`` is the folder of the files; ``task`` is what is asked of them.

    ``click``: will a user like a movie? The label is 1 for 4 or 5 stars. Categorical, 25 fields: user, gender, age,
    occupation, zip, movie, year of release, and a flag for each of the 18 genres. Vocabularies come from the whole of
    users.dat and movies.dat. So no split holds an unseen value, but the rows of values without a rating in the training
    split stay untrained.

    Dense, 5 numbers: the user's age (the code of the age group, which is its lowest age), the movie's year and number
    of genres, and log(1 + n) for the n ratings that the user, and the movie, have in the training split. All are
    standardised with the mean and the standard deviation of the training split.

    ``rating``: how many stars will she give? Two fields, user and movie, as in dnis.txt, 3.1, and no numbers.

    ``top-k``: which movie will she rate next? Two fields, user and movie, as in nis.txt, A.1.1: every rating is a positive,
    whatever its stars. The last rating of each user is for test, with the negatives of leave_one_out.parquet.

    The vocabularies of the last two are the users and movies that occur in ratings.dat (6,040 and 3,706).

    The ratings are split into the fractions ``split``: at ``random``, as ``seed`` decides, or by ``time``, so that a model is
    validated and tested on what came after its training split. For top-k the test split is given, and ``split[1]`` is the
    share of the other ratings, at random, that is for validation.

    Args:
        path: the folder of the files.
        split: fractions for training, validation and test.
        split_by: at random, or by time.
        seed: of a random split.
        task: what is asked.
    """

    name: ClassVar[str] = "movielens-1m"

    path: str
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_by: SplitBy = "random"
    seed: int = 0
    task: Literal["click", "rating", "top-k"] = "click"

    def __post_init__(self) -> None:
        check_split(self.split, self.seed, self.split_by)
        if self.task not in TASKS:
            raise SettingsError(f"unknown task {self.task!r}.{did_you_mean(self.task, TASKS)}")
        if self.task == "top-k" and self.split_by != "random":
            raise SettingsError("split_by must be random for the task top-k: leave_one_out.parquet says what its test split is")

    def load(self) -> TabularDataset | RankingDataset:
        """Read the files; the full data set takes about two seconds.

        Raises:
            DataError: a file is missing, empty or malformed, or the split is by time and not every time is known (GroupLens's
                own file has them all).
        """
        folder = Path(self.path)
        users, movies = _read_users(folder / "users.dat"), _read_movies(folder / "movies.dat")
        ratings = _read_ratings(folder / "ratings.dat", users.position, movies.position)
        if self.task == "click":
            return self._clicks(ratings, users, movies)
        log = _log(ratings, users.position, movies.position)
        if self.task == "rating":
            return rating_dataset(log, "movie", self._splits(ratings[3]))
        return top_k_dataset(log, "movie", folder / FILE, self.split[1], self.seed)

    def _splits(self, times: NDArray[np.int64]) -> dict[Split, torch.Tensor]:
        if self.split_by == "time":
            _require_times(Path(self.path) / "ratings.dat", times)
        return split_of(times, self.split, self.split_by, self.seed)

    def _clicks(self, ratings: NDArray[np.int64], users: "_Entities", movies: "_Entities") -> TabularDataset:
        user, movie, stars, times = ratings
        splits = self._splits(times)
        train = splits["train"].numpy()
        numbers = [users.numbers[user], movies.numbers[movie], _log_count(user, train), _log_count(movie, train)]
        return TabularDataset(
            schema=Schema(users.fields + movies.fields, DENSE, MOVIE_FIELDS, CLICK),
            dense=torch.from_numpy(standardise(np.column_stack(numbers), train)),
            ids=torch.from_numpy(np.concatenate([users.ids[user], movies.ids[movie]], axis=1)),
            labels=torch.from_numpy(stars >= 4).float(),
            splits=splits,
        )


@dataclass(frozen=True)
class _Entities:
    """All n users, or all n movies."""

    position: dict[str, int]  # the id in the files -> 0 .. n - 1
    fields: tuple[Field, ...]
    ids: NDArray[np.int32]  # (n, len(fields))
    numbers: NDArray[np.float64]  # (n, count of numbers)


def _lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each line's number, from 1, and its values, one per column."""
    require_file(path, "MovieLens-1M from GroupLens, and give its folder as 'path'")
    number = 0
    with path.open(encoding="latin-1") as lines:
        for number, line in enumerate(lines, 1):
            values = line.rstrip("\n").split("::")
            if len(values) != len(columns):
                column = columns[min(len(values), len(columns) - 1)]
                must = f"one of {len(columns)} values separated by '::'"
                raise malformed(path, number, column, must, f"{len(values)} values")
            yield number, values
    if not number:
        raise DataError(f"{path} must hold at least one line, but is empty. Try: download it again.")


def _read_users(path: Path) -> _Entities:
    position: dict[str, int] = {}
    records: list[tuple[str, int, int, str]] = []
    for number, values in _lines(path, ("UserID", "Gender", "Age", "Occupation", "Zip-code")):
        user, gender, age, occupation, zip_code = values
        if position.setdefault(user, len(records)) != len(records):
            raise malformed(path, number, "UserID", "another one on every line", user)
        if gender not in ("F", "M"):
            raise malformed(path, number, "Gender", "F or M", gender)
        group, work = _integer(path, number, "Age", age), _integer(path, number, "Occupation", occupation)
        records.append((gender, group, work, zip_code))
    genders, ages, occupations, zip_codes = zip(*records, strict=True)
    ids = [np.arange(len(records)), *map(_encode, (genders, ages, occupations, zip_codes))]
    fields = tuple(Field(name, int(column.max()) + 1) for name, column in zip(USER_FIELDS, ids, strict=True))
    return _Entities(position, fields, np.column_stack(ids).astype(np.int32), np.array([ages], dtype=float).T)


def _read_movies(path: Path) -> _Entities:
    position: dict[str, int] = {}
    years: list[int] = []
    flags: list[list[bool]] = []
    for number, (movie, title, genres) in _lines(path, ("MovieID", "Title", "Genres")):
        if position.setdefault(movie, len(years)) != len(years):
            raise malformed(path, number, "MovieID", "another one on every line", movie)
        year = re.search(r"\((\d{4})\)$", title)
        if not year:
            raise malformed(path, number, "Title", "a title that ends in its year, as in 'Heat (1995)'", title)
        names = genres.split("|")
        if not set(names).issubset(GENRES):
            raise malformed(path, number, "Genres", f"some of {'|'.join(GENRES)}", genres)
        years.append(int(year[1]))
        flags.append([genre in names for genre in GENRES])
    ids = np.column_stack([np.arange(len(years)), _encode(years), flags]).astype(np.int32)
    fields = tuple(map(Field, MOVIE_FIELDS, [len(years), len(set(years)), *[2] * len(GENRES)]))
    return _Entities(position, fields, ids, np.column_stack([years, np.sum(flags, axis=1)]).astype(float))


def _read_ratings(path: Path, users: dict[str, int], movies: dict[str, int]) -> NDArray[np.int64]:
    """Return four rows: positions of the users, positions of the movies, stars, times."""
    ratings = []
    for number, (user, movie, stars, time) in _lines(path, ("UserID", "MovieID", "Rating", "Timestamp")):
        try:
            ratings.append((users[user], movies[movie], STARS[stars], int(time)))
        except ValueError:
            raise malformed(path, number, "Timestamp", "an integer", time) from None
        except KeyError:
            if user not in users:
                raise malformed(path, number, "UserID", "a user of users.dat", user) from None
            if movie not in movies:
                raise malformed(path, number, "MovieID", "a movie of movies.dat", movie) from None
            raise malformed(path, number, "Rating", "1, 2, 3, 4 or 5", stars) from None
    return np.array(ratings, dtype=np.int64).T


def read_rating_lines(path: Path) -> pl.DataFrame:
    """Return ``userId``, ``movieId``, ``rating`` and ``timestamp`` of ``ratings.dat``, integers, without the other files.

    Raises:
        DataError: where it is missing, empty or malformed.
    """
    names = ("UserID", "MovieID", "Rating", "Timestamp")
    rows = [[_integer(path, n, *pair) for pair in zip(names, values, strict=True)] for n, values in _lines(path, names)]
    return pl.DataFrame(np.array(rows, dtype=np.int64), schema=["userId", "movieId", "rating", "timestamp"])


def _require_times(path: Path, times: NDArray[np.int64]) -> None:
    unknown = np.flatnonzero(times <= 0)
    if len(unknown):
        raise DataError(
            f"{path}, line {unknown[0] + 1}, column 'Timestamp': must be above 0 where ratings are split by time, got "
            f"{times[unknown[0]]} ({len(unknown)} such lines). Try: split_by: random, or GroupLens's own file."
        )


def _log(ratings: NDArray[np.int64], users: dict[str, int], movies: dict[str, int]) -> Ratings:
    (rated_by, user), (rated, movie) = occurring(users, ratings[0]), occurring(movies, ratings[1])
    return Ratings(rated_by, rated, torch.from_numpy(np.column_stack([user, movie])), torch.from_numpy(ratings[2]))


def _integer(path: Path, number: int, column: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise malformed(path, number, column, "an integer", value) from None


def _encode(values: Sequence[int | str]) -> NDArray[np.int64]:
    """Return for each value its position among the distinct values in ascending order."""
    return np.unique(values, return_inverse=True)[1]


def _log_count(positions: NDArray[np.int64], train: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return log(1 + n) for each rating, where n training ratings have the same position."""
    return np.log1p(np.bincount(positions[train], minlength=positions.max() + 1))[positions]


def standardise(numbers: NDArray[np.float64], train: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return numbers (N, columns) with mean 0 and standard deviation 1 in the training examples."""
    deviation = numbers[train].std(0)
    deviation[deviation == 0] = 1  # a column without variation becomes zero
    standard: NDArray[np.float64] = (numbers - numbers[train].mean(0)) / deviation
    return standard.astype(np.float32)


def write_sample(folder: str | Path, *, users: int = 200, movies: int = 100, ratings: int = 10_000, seed: int = 0) -> None:
    """Write generated users, movies and ratings in GroupLens's format into a folder, which is made if need be.

    There is something to learn: stars depend on how much a user likes the movie's genres, and on the movie. A pair is
    rated once at most, so no more than ``users * movies`` ratings are written. The last of each user is the positive in
    leave_one_out.parquet, beside movies that she did not rate: 99, or as many as there are for every user.
    """
    rng = np.random.default_rng(seed)
    flags = rng.random((movies, len(GENRES))) < 0.1
    flags[np.arange(movies), rng.integers(len(GENRES), size=movies)] = True
    score = rng.standard_normal((users, len(GENRES))) @ flags.T + rng.standard_normal(movies)
    user, movie = np.divmod(rng.permutation(users * movies)[:ratings], movies)
    noisy = score[user, movie] + rng.standard_normal(len(user))
    stars = 1 + np.searchsorted(np.quantile(noisy, (0.06, 0.16, 0.42, 0.77)), noisy)

    genders, ages = rng.choice(["F", "M"], users), rng.choice([1, 18, 25, 35, 45, 50, 56], users)
    occupations, zip_codes = rng.integers(21, size=users), rng.integers(10_000, 10_050, size=users)
    titles = [f"Movie {m} ({year})" for m, year in enumerate(rng.integers(1950, 2001, size=movies), 1)]
    genres = ["|".join(np.array(GENRES)[row]) for row in flags]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "users.dat", range(1, users + 1), genders, ages, occupations, zip_codes)
    _write(folder / "movies.dat", range(1, movies + 1), titles, genres)
    _write(folder / "ratings.dat", user + 1, movie + 1, stars, range(978_300_000, 978_300_000 + len(user)))
    write_test_split(folder / FILE, user + 1, movie + 1, np.arange(len(user)), seed)


def _write(path: Path, *columns: Iterable[object]) -> None:
    records = zip(*columns, strict=True)
    path.write_text("".join("::".join(map(str, record)) + "\n" for record in records), encoding="latin-1")
