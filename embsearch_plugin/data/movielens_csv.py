"""Ratings in the layout of MovieLens-20M and its successors: GroupLens's CSV files.

ratings.csv   userId,movieId,rating,timestamp      stars in halves; seconds since 1970
movies.csv    movieId,title,genres                 Genre|Genre
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embsearch_plugin.data.csv_file import Chunk, read_chunks
from embsearch_plugin.data.dataset import Field, Schema, Split, SplitBy, TabularDataset, check_split, split_of
from embsearch_plugin.data.interactions import Ratings, rating_dataset
from embsearch_plugin.data.movielens import standardise
from embsearch_plugin.data.vocabulary import encode_frequent, encode_parts
from embsearch_plugin.errors import SettingsError

SOURCE = "MovieLens-20M from GroupLens, or ratings in its layout, and give the folder as 'path'"
NO_GENRES = "(no genres listed)"
DENSE = ("user_ratings", "movie_ratings")
HOUR, DAY = 3600, 86_400
THURSDAY = 3  # the first of January 1970


@dataclass(frozen=True)
class MovieLensCsv:
    """Users and movies. ``path`` is the folder of the files; ``task`` is what is asked of them.

    ``click``: will a user like a movie? The label is 1 for ``threshold`` stars or more. Categorical: user, movie, hour of the
    day (UTC) and day of the week (Monday is 0); and genres, several values, where there is a movies.csv. Users and movies with
    fewer than ``min_count`` ratings in the training split share id 0, and so do those that only other splits have.

    Dense, 2 numbers: log(1 + n) for the n earlier ratings of the user, and of the movie, standardised with the mean and the
    standard deviation of the training split. That is what was known when the rating was given, whatever the split.

    ``rating``: how many stars will she give? Two fields, user and movie, as in dnis.txt, 3.1: those that occur. No numbers.

    The ratings are split into the fractions ``split``: by ``time``, so that a model is validated and tested on what came
    after its training split, or at ``random``, as ``seed`` decides.

    Args:
        path: the folder of the files.
        split: fractions for training, validation and test.
        split_by: by time, or at random.
        seed: of a random split.
        threshold: the least stars of a like.
        min_count: users and movies that occur less often share an id, for clicks.
        task: what is asked.
    """

    name: ClassVar[str] = "movielens-csv"

    path: str
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_by: SplitBy = "time"
    seed: int = 0
    threshold: float = 4.0
    min_count: int = 2
    task: Literal["click", "rating"] = "click"

    def __post_init__(self) -> None:
        check_split(self.split, self.seed, self.split_by)
        if self.task not in ("click", "rating"):
            raise SettingsError(f"task must be 'click' or 'rating' for movielens-csv; got {self.task!r}")

    def load(self) -> TabularDataset:
        """Read the files; a million ratings take about a second.

        Raises:
            DataError: a file is missing, empty or malformed.
        """
        folder = Path(self.path)
        movies = _read_movies(folder / "movies.csv") if (folder / "movies.csv").exists() else None
        ratings = read_ratings(folder / "ratings.csv", movies)
        splits = split_of(ratings["timestamp"].to_numpy(), self.split, self.split_by, self.seed)
        if self.task == "rating":
            return rating_dataset(_log(ratings), "movie", splits)
        return self._clicks(ratings, movies, splits)

    def _clicks(self, ratings: pl.DataFrame, movies: pl.DataFrame | None, splits: dict[Split, Tensor]) -> TabularDataset:
        train = splits["train"].numpy()
        columns, bags = self._columns(ratings, train), {}
        if movies is not None:
            bags["genres"], rows = encode_parts(movies["genres"], "|", pl.ones(len(movies), pl.Int64, eager=True))
            columns[Field("genres", rows, multiple=True)] = ratings["at"].to_numpy()
        numbers = np.column_stack([_earlier(ratings, key) for key in ("userId", "movieId")])
        return TabularDataset(
            schema=Schema(tuple(columns), DENSE, tuple(field.name for field in columns if field.name in ("movie", "genres"))),
            dense=torch.from_numpy(standardise(numbers, train)),
            ids=torch.from_numpy(np.column_stack(list(columns.values())).astype(np.int32)),
            labels=torch.from_numpy(ratings["rating"].to_numpy() >= self.threshold).float(),
            splits=splits,
            bags=bags,
        )

    def _columns(self, ratings: pl.DataFrame, train: NDArray[np.int64]) -> dict[Field, NDArray[Any]]:
        """Return the ids of the fields that hold one value."""
        users, user_rows = encode_frequent(ratings["userId"], train, self.min_count)
        movies, movie_rows = encode_frequent(ratings["movieId"], train, self.min_count)
        times = ratings["timestamp"].to_numpy()
        return {
            Field("user", user_rows): users,
            Field("movie", movie_rows): movies,
            Field("hour", 24): times // HOUR % 24,
            Field("weekday", 7): (times // DAY + THURSDAY) % 7,
        }


def _read_movies(path: Path) -> pl.DataFrame:
    """Return ``movieId`` and ``genres``, null where there are none, of each movie."""
    genres = pl.when(pl.col("genres") != NO_GENRES).then("genres")
    movies: list[pl.DataFrame] = []
    for chunk in read_chunks(path, ("movieId", "genres"), SOURCE):
        movie = chunk.require("movieId", _integer("movieId"), "an integer")
        seen = pl.concat([frame["movieId"] for frame in movies]) if movies else movie.clear()
        again = ~movie.is_first_distinct() | movie.is_in(seen)
        chunk.require("movieId", pl.when(~again).then("movieId"), "another one on every line")
        movies.append(chunk.text.select(movie, genres))
    return pl.concat(movies)


def read_ratings(path: Path, movies: pl.DataFrame | None = None) -> pl.DataFrame:
    """Return the file's columns as numbers; where ``movies`` are given, ``at`` says which of them a rating is of.

    Raises:
        DataError: where it is missing, empty or malformed.
    """
    chunks = read_chunks(path, ("userId", "movieId", "rating", "timestamp"), SOURCE)
    return pl.concat([_ratings(chunk, movies) for chunk in chunks])


def _ratings(chunk: Chunk, movies: pl.DataFrame | None) -> pl.DataFrame:
    """Return the columns as numbers; where movies are known, ``at`` says which of them it is."""
    rating = pl.col("rating").cast(pl.Float64, strict=False)
    time = _integer("timestamp")
    columns = [
        chunk.require("userId", _integer("userId"), "an integer"),
        chunk.require("movieId", _integer("movieId"), "an integer"),
        chunk.require("rating", pl.when(rating.is_between(0, 5)).then(rating), "a number from 0 to 5"),
        chunk.require("timestamp", pl.when(time > 0).then(time), "seconds since 1970, an integer above 0"),
    ]
    if movies is not None:
        at = columns[1].replace_strict(movies["movieId"], range(len(movies)), default=None, return_dtype=pl.Int32)
        columns.append(chunk.require("movieId", at, "a movie of movies.csv").alias("at"))
    return pl.DataFrame(columns)


def _log(ratings: pl.DataFrame) -> Ratings:
    (users, user), (movies, movie) = (np.unique(ratings[key], return_inverse=True) for key in ("userId", "movieId"))
    rows_of_users, rows_of_movies = ({str(name): row for row, name in enumerate(n.tolist())} for n in (users, movies))
    stars = torch.from_numpy(ratings["rating"].to_numpy(writable=True))
    return Ratings(rows_of_users, rows_of_movies, torch.from_numpy(np.column_stack([user, movie])), stars)


def _integer(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Int64, strict=False)


def _earlier(ratings: pl.DataFrame, key: str) -> NDArray[np.float64]:
    """Return log(1 + n) for each rating, where n earlier ones have the same key; at the same second the file's order counts."""
    order = np.argsort(ratings["timestamp"].to_numpy(), kind="stable")
    counts = np.empty(len(order))
    counts[order] = ratings[key].gather(order).to_frame().select(pl.int_range(pl.len()).over(key)).to_series().to_numpy()
    return np.log1p(counts)


def write_sample(folder: str | Path, *, users: int = 200, movies: int = 100, ratings: int = 10_000, seed: int = 0) -> None:
    """Write generated ratings and movies in GroupLens's format into a folder, which is made if need be.

    There is something to learn: stars depend on the user and the movie. Half a year is covered; the file is in order of time.
    """
    rng = np.random.default_rng(seed)
    user, movie = rng.integers(users, size=ratings), rng.geometric(3 / movies, ratings) % movies
    score = rng.standard_normal(users)[user] + rng.standard_normal(movies)[movie] + 0.5 * rng.standard_normal(ratings)
    stars = 0.5 * (1 + np.searchsorted(np.quantile(score, np.linspace(0.05, 0.85, 9)), score))
    times = 1_400_000_000 + np.sort(rng.integers(180 * DAY, size=ratings))
    genres = rng.choice(["Comedy", "Drama", "Drama|War", "Comedy|Romance|Drama", NO_GENRES], movies)
    titles = [f"Movie, The {m} ({year})" for m, year in enumerate(rng.integers(1950, 2014, size=movies))]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = pl.DataFrame({"userId": user + 1, "movieId": 10 * movie + 1, "rating": stars, "timestamp": times})
    table.write_csv(folder / "ratings.csv")
    table = pl.DataFrame({"movieId": 10 * np.arange(movies) + 1, "title": titles, "genres": genres})
    table.write_csv(folder / "movies.csv")
