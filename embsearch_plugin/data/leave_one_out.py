"""The test split of top-k recommendation, in a file: each user's last item, to be ranked among some that she has not rated.

The protocol is that of He et al. (2017), which nis.txt, 4.1.1, follows; but the paper draws 99 negatives anew for each batch of
the test, and here they are drawn once, so that all methods rank the same. For MovieLens-1M ``embsearch leave-one-out FOLDER``
writes the file.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embsearch_plugin.data.dataset import require_file
from embsearch_plugin.errors import DataError
from embsearch_plugin.files import atomic

NEGATIVES = 99
FILE = "leave_one_out.parquet"
_Column = NDArray[np.int64]


def read_test_split(path: Path, users: Mapping[str, int], items: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return the test split: int64 (U, 2), ids of users and positives; int64 (U, C), ids of negatives.

    Args:
        path: a parquet file with the columns ``user`` (each once), ``positive`` (the item of the user's last rating) and
            ``negatives`` (a list of items, for each user as many).
        users, items: their ids, by how they are spelt in the log.

    Raises:
        DataError: where the file is missing or malformed, or names what the log does not have.
    """
    require_file(path, "the ratings, and write it by: embsearch leave-one-out FOLDER")
    try:
        frame = pl.read_parquet(path, columns=["user", "positive", "negatives"])
        counts = frame["negatives"].list.len().unique().to_list()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} must be a parquet file with the columns user, positive and negatives; got: {error}") from error
    if len(counts) != 1 or not counts[0] or frame["user"].is_duplicated().any():
        raise DataError(f"{path} must hold each user once, all with as many negatives; got {counts[:3]}. Try: make it anew.")
    pairs = [_ids(path, frame["user"], users), _ids(path, frame["positive"], items)]
    return torch.stack(pairs, dim=1), _ids(path, frame["negatives"].explode(), items).view(len(frame), -1)


def _ids(path: Path, names: pl.Series, ids: Mapping[str, int]) -> Tensor:
    found = names.cast(pl.String).replace_strict(ids, default=None, return_dtype=pl.Int64)
    if found.has_nulls():
        unknown = names.filter(found.is_null())[0]
        raise DataError(f"{path}, column {names.name!r}: must occur in the ratings, got {unknown!r}. Try: make the file anew.")
    return torch.from_numpy(found.to_numpy(writable=True))


def write_test_split(path: Path, user: _Column, item: _Column, time: _Column, seed: int = 0) -> None:
    """Write the test split of a log of n ratings, each column (n,).

    A user's last rating is the latest, and of several at that time the one that stands last. Negatives are drawn uniformly from
    the items of the log that the user has not rated: 99, or as many as there are for every user.
    """
    rng = np.random.default_rng(seed)
    items, order = np.unique(item), np.lexsort((np.arange(len(time)), time))
    latest = dict(zip(user[order].tolist(), item[order].tolist(), strict=True))
    last = {one: latest[one] for one in sorted(latest)}
    by_user = np.argsort(user, kind="stable")
    rated = np.split(item[by_user], np.flatnonzero(np.diff(user[by_user])) + 1)
    others = [rng.permutation(np.setdiff1d(items, mine)) for mine in rated]
    count = min(NEGATIVES, *map(len, others))
    columns = {"user": list(last), "positive": list(last.values()), "negatives": [some[:count].tolist() for some in others]}
    with atomic(path) as temporary:
        pl.DataFrame(columns, schema_overrides={"negatives": pl.List(pl.Int64)}).write_parquet(temporary)


def write_for_movielens(folder: Path, seed: int = 0) -> Path:
    """Write the test split of GroupLens's ``ratings.dat`` beside it, and return its path.

    Raises:
        DataError: where the ratings are missing or malformed, or the test split is there already.
    """
    ratings, path = folder / "ratings.dat", folder / FILE
    require_file(ratings, "MovieLens-1M from GroupLens")
    if path.exists():
        raise DataError(f"{path} is there already, and was left as it is. Try: remove it first.")
    try:
        log = pl.read_csv(ratings, has_header=False, separator=":", schema_overrides=[pl.Int64] * 7)  # every other is empty
        user, item, time = (log.to_series(place).to_numpy() for place in (0, 2, 6))
    except (pl.exceptions.PolarsError, IndexError) as error:
        raise DataError(f"{ratings} must hold lines of user::movie::stars::time, in numbers; got: {error}") from error
    write_test_split(path, user, item, time, seed)
    return path
