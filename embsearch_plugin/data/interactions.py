"""Pairs of a user and an item, as the papers' collaborative filtering takes them from a log of ratings: two fields, no numbers.

For top-k recommendation a file says what the test split is: a parquet file with the columns ``user`` (each once), ``positive``
(the item of the user's last rating) and ``negatives`` (a list of items, for each user as many). That is the protocol of
He et al. (2017), which nis.txt, 4.1.1, follows; but the paper draws 99 negatives anew for each batch of the test.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embsearch_plugin.data.dataset import Field, Schema, Split, TabularDataset, random_split, require_file
from embsearch_plugin.data.ranking import RankingDataset
from embsearch_plugin.errors import DataError
from embsearch_plugin.tasks import RATING, TOP_K, Task


@dataclass(frozen=True)
class Ratings:
    """A log of n ratings.

    Args:
        users, items: whose and of what, by their spelling in the log: what occurs there, by its id ``0 .. rows - 1``.
        pairs: int64 (n, 2), ids of user and item.
        stars: (n,).
    """

    users: Mapping[str, int]
    items: Mapping[str, int]
    pairs: Tensor
    stars: Tensor

    def schema(self, item: str, task: Task) -> Schema:
        """Return the two fields, ``user`` and the item by its name."""
        return Schema((Field("user", len(self.users)), Field(item, len(self.items))), (), (item,), task)


def occurring(names: Mapping[str, int], column: NDArray[np.int32]) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Leave out the names that do not occur in a column: return the others' new ids, and the column in new ids (n,)."""
    used, ids = np.unique(column, return_inverse=True)
    spelt = {at: name for name, at in names.items()}
    return {spelt[at]: new for new, at in enumerate(used.tolist())}, ids


def rating_dataset(ratings: Ratings, item: str, splits: Mapping[Split, Tensor]) -> TabularDataset:
    """Return all ratings; labels are the stars (dnis.txt, 3.1)."""
    return TabularDataset(
        schema=ratings.schema(item, RATING),
        dense=torch.empty(len(ratings.pairs), 0),
        ids=ratings.pairs.int(),
        labels=ratings.stars.float(),
        splits=splits,
    )


def top_k_dataset(ratings: Ratings, item: str, path: Path, validation: float, seed: int) -> RankingDataset:
    """Return every rating as a positive, whatever its stars (nis.txt, A.1.1).

    Args:
        ratings: the log.
        item: what items are called.
        path: the file of the test split.
        validation: the share of the other ratings that is for validation, at random; the rest is for training.
        seed: of that choice.

    Raises:
        DataError: where the file is missing, malformed, or does not fit the ratings.
    """
    last, negatives = _read_leave_one_out(path, ratings)
    keys = [pairs[:, 0] * len(ratings.items) + pairs[:, 1] for pairs in (ratings.pairs, last)]
    rest = ratings.pairs[~torch.isin(*keys)]
    if len(rest) + len(last) != len(ratings.pairs):
        raise DataError(f"every positive of {path} must be one rating, each user's of one movie. Try: make the file anew.")
    parts = random_split(len(rest), (1 - validation, validation, 0.0), seed)
    pairs: dict[Split, Tensor] = {"train": rest[parts["train"]], "validation": rest[parts["validation"]], "test": last}
    return RankingDataset(ratings.schema(item, TOP_K), pairs, negatives)


def _read_leave_one_out(path: Path, ratings: Ratings) -> tuple[Tensor, Tensor]:
    """Return the test split: int64 (U, 2), users and positives; int64 (U, C), negatives."""
    require_file(path, "it, or write it: parquet with each user's last rating; columns user, positive, negatives (a list)")
    try:
        frame = pl.read_parquet(path, columns=["user", "positive", "negatives"])
        counts = frame["negatives"].list.len().unique().to_list()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} must be a parquet file with the columns user, positive and negatives; got: {error}") from error
    if len(counts) != 1 or not counts[0] or frame["user"].is_duplicated().any():
        raise DataError(f"{path} must hold each user once, all with as many negatives; got {counts[:3]}. Try: make it anew.")
    users, positives = _ids(path, frame["user"], ratings.users), _ids(path, frame["positive"], ratings.items)
    negatives = _ids(path, frame["negatives"].explode(), ratings.items)
    return torch.stack([users, positives], dim=1), negatives.view(len(users), -1)


def _ids(path: Path, names: pl.Series, ids: Mapping[str, int]) -> Tensor:
    found = names.cast(pl.String).replace_strict(ids, default=None, return_dtype=pl.Int64)
    if found.has_nulls():
        unknown = names.filter(found.is_null())[0]
        raise DataError(f"{path}, column {names.name!r}: must occur in the ratings, got {unknown!r}. Try: make the file anew.")
    return torch.from_numpy(found.to_numpy(writable=True))
