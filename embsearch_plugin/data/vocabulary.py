"""Which row of its table a value has: the more frequent, the smaller its id."""

import re

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embsearch_plugin.data.bags import Bags


class Numbering:
    """Numbers texts in the order in which they are first seen, a chunk after the other."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, texts: pl.Series) -> pl.Series:
        """Return the number of each text, int32."""
        distinct = texts.unique(maintain_order=True)
        numbers = [self.numbers.setdefault(text, len(self.numbers)) for text in distinct]
        return texts.replace_strict(distinct, numbers, return_dtype=pl.Int32)


def by_count(values: pl.Series, counts: pl.Series | None = None, *, at_least: int = 1) -> pl.Series:
    """Return the distinct values, most frequent first; among equals, the one that comes first.

    Args:
        values: (N,) of any type.
        counts: how often each of the N occurs; once if not given.
        at_least: values that occur less often in all are left out.
    """
    count = pl.len() if counts is None else pl.sum("count")
    groups = pl.DataFrame({"value": values, "count": counts}).group_by("value", maintain_order=True)
    totals = groups.agg(total=count).filter(pl.col("total") >= at_least)
    return totals.sort("total", descending=True, maintain_order=True)["value"]


def encode(values: pl.Series, known: pl.Series, *, first: int = 0) -> NDArray[np.int32]:
    """Return the id of each value: its position in ``known``, counted from ``first``; 0 for a value that is not there."""
    ids = pl.int_range(first, first + len(known), dtype=pl.Int32, eager=True)
    return values.replace_strict(known, ids, default=0, return_dtype=pl.Int32).to_numpy()


def encode_frequent(values: pl.Series, train: NDArray[np.int64], min_count: int) -> tuple[NDArray[np.int32], int]:
    """Return ids (N,) and the number of rows they need. Id 0 is shared by all values that are too rare in training.

    What only other splits have is among them: in use, too, a value may be new. With ``min_count`` above 1, the shared row is
    trained.

    Args:
        values: (N,) of any type.
        train: positions of the training examples.
        min_count: the fewest training examples that earn a value a row of its own.
    """
    known = by_count(values.gather(train), at_least=min_count)
    return encode(values, known, first=1), len(known) + 1


def encode_parts(texts: pl.Series, separators: str, counts: pl.Series) -> tuple[Bags, int]:
    """Return a bag of ids for each of N texts, and the number of rows the ids need.

    A text's values stand between separators; spaces around them, empty ones and repetitions do not count.

    Args:
        texts: (N,), null where there is no value.
        separators: characters.
        counts: how often each text occurs; ids are by falling frequency.
    """
    bag = pl.int_range(len(texts), eager=True)
    split = texts.str.replace_all(f"[{re.escape(separators)}]", "|").str.split("|")
    parts = pl.DataFrame({"bag": bag, "count": counts, "value": split}).explode("value")
    parts = parts.with_columns(pl.col("value").str.strip_chars()).filter(pl.col("value") != "")
    parts = parts.unique(["bag", "value"], maintain_order=True)
    known = by_count(parts["value"], parts["count"], at_least=0)
    lengths = np.bincount(parts["bag"], minlength=len(texts))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    return Bags(torch.tensor(encode(parts["value"], known)), offsets), max(len(known), 1)
