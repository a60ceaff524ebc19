"""Pairs of a user and an item, as the papers' collaborative filtering takes them from a log of ratings: two fields, no numbers.

For top-k recommendation a file says what the test split is: see ``data/leave_one_out.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embsearch_plugin.data.dataset import Field, Schema, Split, TabularDataset, random_split
from embsearch_plugin.data.leave_one_out import read_test_split
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
    last, negatives = read_test_split(path, ratings.users, ratings.items)
    keys = [pairs[:, 0] * len(ratings.items) + pairs[:, 1] for pairs in (ratings.pairs, last)]
    rest = ratings.pairs[~torch.isin(*keys)]
    if len(rest) + len(last) != len(ratings.pairs):
        raise DataError(f"every positive of {path} must be one rating, each user's of one movie. Try: make the file anew.")
    parts = random_split(len(rest), (1 - validation, validation, 0.0), seed)
    pairs: dict[Split, Tensor] = {"train": rest[parts["train"]], "validation": rest[parts["validation"]], "test": last}
    return RankingDataset(ratings.schema(item, TOP_K), pairs, negatives)
