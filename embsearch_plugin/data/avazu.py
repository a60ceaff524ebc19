"""Avazu's click log, read from the owner's train file (Kaggle, 2014), plain or gzip.

A header, then 24 values per line: id, click (0 or 1), hour (YYMMDDHH), 9 hashes of eight hexadecimal digits and 12 integers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embsearch_plugin.data.csv_file import Chunk, read_chunks
from embsearch_plugin.data.dataset import Field, Schema, SplitBy, TabularDataset, check_split, split_of
from embsearch_plugin.data.vocabulary import encode_frequent

SOURCE = "the train file of Avazu's Click-Through Rate Prediction from Kaggle, and give it as 'path', plain or gzip"
SITE, APP = ("site_id", "site_domain", "site_category"), ("app_id", "app_domain", "app_category")
HASHES = (*SITE, *APP, "device_id", "device_ip", "device_model")
ANONYMOUS = tuple(f"C{i}" for i in range(14, 22))
INTEGERS = ("C1", "banner_pos", "device_type", "device_conn_type", *ANONYMOUS)
TIME = "time"
FIELDS = ("hour", "C1", "banner_pos", *HASHES, "device_type", "device_conn_type", *ANONYMOUS)


@dataclass(frozen=True)
class Avazu:
    """Will an advertisement be clicked? ``path`` is the train file.

    Categorical, 22 fields, as in the AutoDim paper (Zhao et al. 2021, section III.A): every column but ``id``, which is a
    line's own, and ``click``. Of ``hour`` the hour of the day is kept: the log's ten days do not come again. There are no
    dense numbers.

    Values that occur fewer than ``min_count`` times share id 0, as in the paper. Here they are counted in the training
    split, so that nothing is known of the others; the paper does not say where.

    ``balanced`` keeps all clicks and draws, at random, as many of the others, as the paper does: half of the examples are then
    positive, in each split of a random one nearly so. ``seed`` decides on that, and on a random split, which is the paper's.

    Args:
        path: the train file.
        split: fractions for training, validation and test.
        split_by: at random, or by time. The log's times are hours; that at a boundary is cut apart.
        seed: of a random split, and of the balance.
        min_count: values that occur less often share an id.
        balanced: as many examples that were not clicked as were.
    """

    name: ClassVar[str] = "avazu"

    path: str
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_by: SplitBy = "random"
    seed: int = 0
    min_count: int = 30
    balanced: bool = False

    def __post_init__(self) -> None:
        check_split(self.split, self.seed, self.split_by)

    def load(self) -> TabularDataset:
        """Read the file; a value takes 4 bytes, and as much again while it is encoded.

        Raises:
            DataError: the file is missing, empty or malformed.
        """
        examples = pl.concat([_parse(chunk) for chunk in read_chunks(Path(self.path), ("click", *FIELDS), SOURCE)])
        labels = examples.drop_in_place("click").to_numpy()
        if self.balanced:
            kept = _balance(labels, self.seed)
            examples, labels = examples[kept], labels[kept]
        splits = split_of(examples.drop_in_place(TIME).to_numpy(), self.split, self.split_by, self.seed)
        ids = np.empty((len(labels), len(FIELDS)), np.int32)
        rows = [0] * len(FIELDS)
        for f, field in enumerate(FIELDS):  # each column is let go of once its ids are there
            ids[:, f], rows[f] = encode_frequent(examples.drop_in_place(field), splits["train"].numpy(), self.min_count)
        return TabularDataset(
            schema=Schema(tuple(map(Field, FIELDS, rows)), ()),
            dense=torch.empty(len(labels), 0),
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels.astype(np.float32)),
            splits=splits,
        )


def _parse(chunk: Chunk) -> pl.DataFrame:
    """Return ``click``, the hour as it is written, and the fields as small integers."""
    click = pl.col("click").replace_strict({"0": False, "1": True}, default=None, return_dtype=pl.Boolean)
    written = pl.when(pl.col("hour").str.contains(r"^\d{6}([01]\d|2[0-3])$")).then(pl.col("hour"))
    hours = chunk.require("hour", written, "an hour as YYMMDDHH").cast(pl.Int32)
    columns = [
        chunk.require("click", click, "0 or 1"),
        hours.alias(TIME),
        (hours % 100).cast(pl.Int8),
        *(chunk.require(name, pl.col(name).cast(pl.Int32, strict=False), "an integer") for name in INTEGERS),
    ]
    for name in HASHES:
        number = pl.col(name).str.to_integer(base=16, dtype=pl.Int64, strict=False)
        hashed = pl.when(number.is_between(0, 2**32 - 1)).then(number).cast(pl.UInt32)
        columns.append(chunk.require(name, hashed, "a hexadecimal number of up to eight digits"))
    return pl.DataFrame(columns)


def _balance(labels: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """Return the positions, in ascending order, of all positives and of as many negatives, or all that there are."""
    positives, negatives = np.flatnonzero(labels), np.flatnonzero(~labels)
    drawn = np.random.default_rng((seed, 1)).permutation(negatives)[: len(positives)]
    return np.sort(np.concatenate([positives, drawn]))


def write_sample(path: str | Path, *, rows: int = 20_000, seed: int = 0) -> None:
    """Write generated lines in Avazu's format: some 17 % are clicks.

    There is something to learn: each value of a site, an app or a device makes clicks likelier, or less likely.
    """
    rng = np.random.default_rng(seed)
    choice = rng.geometric(0.05, (rows, len(HASHES))) % 100
    values = np.char.mod("%08x", rng.integers(2**32, size=(100, len(HASHES))))
    effects = 0.6 * rng.standard_normal((100, len(HASHES)))
    chance = 1 / (1 + np.exp(2.4 - np.take_along_axis(effects, choice, axis=0).sum(1)))
    columns: dict[str, object] = {
        "id": [str(10**18 + n) for n in range(rows)],
        "click": (rng.random(rows) < chance).astype(int),
        "hour": [f"1410{21 + n * 10 // rows:02}{n * 240 // rows % 24:02}" for n in range(rows)],
    }
    columns |= {name: rng.geometric(0.2, rows) - 2 for name in INTEGERS}
    columns |= dict(zip(HASHES, np.take_along_axis(values, choice, axis=0).T, strict=True))
    pl.DataFrame(columns).select("id", "click", *FIELDS).write_csv(Path(path))
