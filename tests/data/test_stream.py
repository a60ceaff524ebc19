"""Ratings as a stream: their order, frequencies and labels, and draws from the past."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch

from embsearch_plugin.data import movielens_csv
from embsearch_plugin.data.stream import MovieLens1MStream, MovieLensCsvStream, Past, Stream
from embsearch_plugin.errors import DataError
from embsearch_plugin.tasks import PREFERENCE, STARS

RATINGS = """userId,movieId,rating,timestamp
7,50,4.0,30
7,10,3.5,10
9,10,5.0,20
7,30,0.5,20
9,50,4.5,5
"""
DAT = "3::50::4::30\n1::10::3::10\n3::10::5::20\n3::30::1::20\n"


def csv(folder: Path, text: str = RATINGS, **options: object) -> MovieLensCsvStream:
    (folder / "ratings.csv").write_text(text)
    return MovieLensCsvStream(str(folder), **options)


def columns(stream: Stream) -> list[tuple[int, int, float]]:
    """Every transaction: its user, its item and its label."""
    batch = stream.batch(torch.arange(len(stream)))
    ids = batch.sparse_features.to_dict()
    return list(zip(ids["user"].values().tolist(), ids["item"].values().tolist(), batch.labels.tolist(), strict=True))


def test_transactions_come_as_they_are_in_the_file_and_ids_are_the_owners(tmp_path: Path) -> None:
    stream = csv(tmp_path).load()
    assert columns(stream) == [(7, 50, 1), (7, 10, 0), (9, 10, 1), (7, 30, 0), (9, 50, 1)]
    assert [(f.name, f.rows) for f in stream.schema.fields] == [("user", 10), ("item", 51)]
    assert stream.schema.task is PREFERENCE
    assert stream.frequencies.tolist() == [[1, 1], [2, 1], [1, 2], [3, 1], [2, 2]]


def test_sorted_they_come_in_order_of_time_and_those_of_one_time_as_in_the_file(tmp_path: Path) -> None:
    stream = csv(tmp_path, sort=True).load()
    assert columns(stream) == [(9, 50, 1), (7, 10, 0), (9, 10, 1), (7, 30, 0), (7, 50, 1)]


def test_times_out_of_order_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        csv(tmp_path).load()
    (record,) = caplog.records
    assert "2 ratings are older than the one before" in record.message and "sort: true" in record.message
    caplog.clear()
    csv(tmp_path, sort=True).load()
    assert not caplog.records


def test_half_stars_belong_to_the_next_whole_one(tmp_path: Path) -> None:
    lines = [f"1,{n},{n / 2},{n}" for n in range(1, 11)]
    stream = csv(tmp_path, "userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n", task="stars").load()
    assert [label for _, _, label in columns(stream)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert stream.schema.task is STARS


def test_movielens_1m_is_sorted_and_may_have_fewer_users(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text(DAT)
    assert columns(MovieLens1MStream(str(tmp_path)).load()) == [(1, 10, 0), (3, 10, 1), (3, 30, 0), (3, 50, 1)]
    assert columns(MovieLens1MStream(str(tmp_path), users=2).load()) == [(1, 10, 0)]
    with pytest.raises(DataError, match="none are left"):
        MovieLens1MStream(str(tmp_path), users=0).load()
    with pytest.raises(DataError, match=r"ratings\.csv"):
        MovieLensCsvStream(str(tmp_path / "none")).load()


def test_frequencies_are_counted_as_they_come(tmp_path: Path) -> None:
    movielens_csv.write_sample(tmp_path, ratings=500)
    stream = MovieLensCsvStream(str(tmp_path)).load()
    seen: Counter[tuple[int, int]] = Counter()
    for (user, item, _), frequencies in zip(columns(stream), stream.frequencies.tolist(), strict=True):
        for key, each in enumerate((user, item)):
            seen[key, each] += 1
        assert frequencies == [seen[0, user], seen[1, item]]


def test_other_data_have_another_fingerprint(tmp_path: Path) -> None:
    plain, again = csv(tmp_path).load().fingerprint(), csv(tmp_path).load().fingerprint()
    assert plain == again
    others = [csv(tmp_path, sort=True), csv(tmp_path, task="stars"), csv(tmp_path, RATINGS.replace("5.0", "1.0"))]
    assert len({plain, *(other.load().fingerprint() for other in others)}) == 4


def test_the_past_is_what_was_seen_and_a_draw_depends_on_how_much_alone(tmp_path: Path) -> None:
    movielens_csv.write_sample(tmp_path, ratings=500)
    stream = MovieLensCsvStream(str(tmp_path)).load()
    past, other = Past(stream, 64, seed=3), Past(stream, 64, seed=3)
    assert not list(past)
    drawn = []
    for seen in (10, 100, 500):
        past.seen = seen
        (batch,) = past
        (again,) = past
        assert torch.equal(batch.labels, again.labels)
        transactions = set(columns(stream)[:seen])
        ids = batch.sparse_features.to_dict()
        users, items = ids["user"].values().tolist(), ids["item"].values().tolist()
        assert set(zip(users, items, batch.labels.tolist(), strict=True)) <= transactions
        drawn.append(tuple(items))
    other.seen = 500
    (batch,) = other
    assert tuple(batch.sparse_features["item"].values().tolist()) == drawn[-1]
    (differing,) = past_of(stream, 4)
    assert tuple(differing.sparse_features["item"].values().tolist()) != drawn[-1]


def past_of(stream: Stream, seed: int) -> Past:
    past = Past(stream, 64, seed)
    past.seen = len(stream)
    return past


def test_every_transaction_of_the_past_is_as_likely(tmp_path: Path) -> None:
    movielens_csv.write_sample(tmp_path, ratings=500)
    stream = MovieLensCsvStream(str(tmp_path)).load()
    past = Past(stream, 20_000, seed=1)
    past.seen = 40
    (batch,) = past
    drawn = Counter(zip(*(batch.sparse_features[key].values().tolist() for key in ("user", "item")), strict=True))
    expected = Counter((user, item) for user, item, _ in columns(stream)[:40])
    assert drawn.keys() == expected.keys()
    assert all(400 * times < drawn[each] < 600 * times for each, times in expected.items())


def test_only_the_first_transactions_can_be_taken(tmp_path: Path) -> None:
    whole, part = csv(tmp_path, sort=True).load(), csv(tmp_path, sort=True, first=3).load()
    assert len(part) == 3 and torch.equal(part.frequencies, whole.frequencies[:3])
    with pytest.raises(DataError, match="first must be at least 1; got 0"):
        csv(tmp_path, first=0).load()
