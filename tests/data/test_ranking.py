"""Top-k data: what is in a batch, against loops over its examples."""

from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from embsearch_plugin.data.dataset import Split
from embsearch_plugin.data.movielens import MovieLens1M, write_sample
from embsearch_plugin.data.ranking import SAMPLED, RankingBatch, RankingDataset
from embsearch_plugin.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ml")
    write_sample(path, users=40, movies=12, ratings=300)
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> RankingDataset:
    return MovieLens1M(str(folder), task="top-k").load()


def items_of(batch: RankingBatch) -> list[list[int | None]]:
    """Each example's candidates by item, None where one is removed."""
    items = batch.sparse_features.to_dict()["movie"].to_dense()
    return [[None if bag < 0 else int(items[bag]) for bag in bags] for bags in batch.candidates.tolist()]


def everything(data: RankingDataset, split: Split, size: int, seed: int | None = None) -> list[list[list[int | None]]]:
    return [items_of(batch) for batch in data.batches(split, size, seed=seed)]


def test_last_ratings_are_for_test_and_the_others_are_dealt_once(data: RankingDataset, folder: Path) -> None:
    rows = [line.split("::") for line in (folder / "ratings.dat").read_text().splitlines()]
    users, movies = (sorted({int(row[at]) for row in rows}) for at in (0, 1))
    assert [field.rows for field in data.schema.fields] == [len(users), len(movies)]
    rated = [(users.index(int(row[0])), movies.index(int(row[1])), int(row[3])) for row in rows]
    last = {(user, max((time, movie) for who, movie, time in rated if who == user)[1]) for user in {user for user, *_ in rated}}
    parts = {split: [tuple(pair) for pair in pairs.tolist()] for split, pairs in data.pairs.items()}
    assert set(parts["test"]) == last
    assert sorted(chain(*parts.values())) == sorted((user, movie) for user, movie, _ in rated)
    assert len(parts["validation"]) == round(0.1 * (len(rated) - len(last)))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_shares_negatives_and_accidental_hits_are_removed(data: RankingDataset, split: Split) -> None:
    hits = 0
    for batch in data.batches(split, 16, seed=3):
        ids = {name: tensor.to_dense() for name, tensor in batch.sparse_features.to_dict().items()}
        size = len(batch.labels)
        shared = [int(item) for item in ids["movie"][size:]]
        assert len(set(shared)) == len(shared) == SAMPLED
        assert [len(bag) for bag in ids["user"]] == [1] * size + [0] * SAMPLED
        assert batch.labels.tolist() == [[1.0] + [0.0] * SAMPLED] * size
        for number, items in enumerate(items_of(batch)):
            positive = int(ids["movie"][number])
            assert items == [positive, *(None if item == positive else item for item in shared)]
            hits += None in items
    assert hits


@pytest.mark.parametrize("split", ["train", "validation"])
def test_apart_each_example_has_negatives_of_its_own(data: RankingDataset, split: Split) -> None:
    apart = data.apart()
    assert apart.fingerprint() == data.fingerprint()
    drawn = torch.zeros(data.schema.fields[1].rows)
    for batch in apart.batches(split, 7, seed=3):
        items, size = batch.sparse_features["movie"].values(), len(batch.labels)
        assert len(batch.sparse_features["user"].values()) == size
        own = items[size:].view(size, SAMPLED)  # no bag is there twice
        for candidates, positive, negatives in zip(items_of(batch), items.tolist(), own.tolist(), strict=False):
            assert len(set(negatives)) == SAMPLED
            assert candidates == [positive, *(None if item == positive else item for item in negatives)]
            drawn[negatives] += 1
    assert bool((drawn > 0).all())  # all items are drawn
    assert everything(apart, split, 7, 3) == everything(data.apart(), split, 7, 3) != everything(apart, split, 7, 4)
    assert everything(apart, "test", 7) == everything(data, "test", 7)


def test_test_candidates_are_those_of_the_file_in_any_batch_size(data: RankingDataset, folder: Path) -> None:
    frame = pl.read_parquet(folder / "leave_one_out.parquet")
    names = sorted({int(line.split("::")[1]) for line in (folder / "ratings.dat").read_text().splitlines()})
    expected = [
        [names.index(movie) for movie in (positive, *negatives)]
        for positive, negatives in zip(frame["positive"], frame["negatives"].to_list(), strict=True)
    ]
    for size in (7, 100):
        assert list(chain(*everything(data, "test", size))) == expected


def test_negatives_follow_from_seed_and_epoch(data: RankingDataset) -> None:
    assert everything(data, "validation", 8) == everything(data, "validation", 8)
    batches = data.batches("train", 8, seed=1)
    first, second = ([items_of(batch) for batch in batches] for _ in range(2))
    assert first != second
    again = data.batches("train", 8, seed=1)
    again.set_epoch(1)
    assert [items_of(batch) for batch in again] == second
    assert len(again) == len(second)


def test_all_items_are_drawn_alike(data: RankingDataset) -> None:
    rows = data.schema.fields[1].rows
    drawn = np.zeros(rows)
    for seed in range(200):
        batch = next(iter(data.batches("train", 8, seed=seed)))
        drawn[batch.sparse_features["movie"].values()[8:].numpy()] += 1
    expected = 200 * SAMPLED / rows
    assert abs(drawn - expected).max() < 6 * expected**0.5


def test_a_batch_moves_as_a_whole(data: RankingDataset) -> None:
    moved = next(iter(data.batches("train", 8))).to(torch.device("meta"))
    assert {moved.labels.device.type, moved.candidates.device.type, moved.sparse_features.device().type} == {"meta"}


def test_a_fingerprint_follows_the_data(data: RankingDataset, folder: Path) -> None:
    assert data.fingerprint() == MovieLens1M(str(folder), task="top-k").load().fingerprint()
    assert data.fingerprint() != MovieLens1M(str(folder), task="top-k", seed=1).load().fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("negatives"), "with the columns user, positive and negatives"),
        (lambda frame: pl.concat([frame, frame[:1]]), "each user once"),
        (lambda frame: frame.with_columns(negatives=pl.lit([], pl.List(pl.Int64))), "as many negatives; got \\[0\\]"),
        (
            lambda frame: frame.with_columns(positive=frame["positive"] + 1000),
            "column 'positive': must occur in the ratings, got 10",
        ),
        (lambda frame: frame.with_columns(positive=frame["negatives"].list.first()), "must be one rating"),
    ],
)
def test_a_malformed_file_is_named(change: object, message: str, tmp_path: Path) -> None:
    write_sample(tmp_path, users=40, movies=12, ratings=300)
    path = tmp_path / "leave_one_out.parquet"
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(DataError, match=f"leave_one_out.parquet.*{message}"):
        MovieLens1M(str(tmp_path), task="top-k").load()
    path.write_text("no parquet")
    with pytest.raises(DataError, match="must be a parquet file"):
        MovieLens1M(str(tmp_path), task="top-k").load()
    path.unlink()
    with pytest.raises(DataError, match="must be a file, but does not exist"):
        MovieLens1M(str(tmp_path), task="top-k").load()
