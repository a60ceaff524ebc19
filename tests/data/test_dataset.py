import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.data import CONFIGS
from embsearch_plugin.data.bags import Bags
from embsearch_plugin.data.dataset import Batches, Field, Schema, Split, TabularDataset, random_split, time_split
from embsearch_plugin.errors import SettingsError

SIZES = {"train": 23, "validation": 5, "test": 4}


@pytest.fixture
def data() -> TabularDataset:
    """Return 32 examples whose every value tells the example and the column."""
    n = 32
    ids = torch.arange(n)[:, None] * 10 + torch.arange(3)
    dense = ids[:, :2] + 0.5
    parts = torch.arange(n).split(list(SIZES.values()))
    schema = Schema(tuple(Field(f"cat_{f}", 1000) for f in range(3)), ("int_0", "int_1"))
    return TabularDataset(schema, dense, ids.int(), torch.arange(n).float(), dict(zip(SIZES, parts, strict=True)))


def labels(batches: Batches) -> list[float]:
    return [label for batch in batches for label in batch.labels.tolist()]


def test_a_batch_holds_the_examples_in_torchrecs_form(data: TabularDataset) -> None:
    first = next(iter(data.batches("validation", 3)))
    assert first.labels.tolist() == [23, 24, 25]
    assert first.dense_features.tolist() == [[230.5, 231.5], [240.5, 241.5], [250.5, 251.5]]
    sparse = first.sparse_features
    assert sparse.keys() == ["cat_0", "cat_1", "cat_2"]
    assert sparse.stride() == 3
    assert sparse.values().dtype == torch.int64
    assert first.dense_features.dtype == first.labels.dtype == torch.float32
    for f, key in enumerate(sparse.keys()):
        assert sparse[key].values().tolist() == [230 + f, 240 + f, 250 + f]
        assert sparse[key].lengths().tolist() == [1, 1, 1]
        assert sparse[key].offsets().tolist() == [0, 1, 2, 3]


def test_what_is_precomputed_is_what_torchrec_would_compute(data: TabularDataset) -> None:
    for batch in data.batches("train", 9):
        given_ = batch.sparse_features
        fresh = KeyedJaggedTensor(given_.keys(), given_.values(), lengths=given_.lengths())
        assert fresh.offsets().tolist() == given_.offsets().tolist()
        assert fresh.length_per_key() == given_.length_per_key()
        assert fresh.offset_per_key() == given_.offset_per_key()
        assert fresh.stride() == given_.stride()


@given(batch_size=st.integers(1, 40), split=st.sampled_from(list(SIZES)), seed=st.none() | st.integers(0, 2**40))
def test_every_example_comes_once_and_only_the_last_batch_is_smaller(batch_size: int, split: Split, seed: int | None) -> None:
    n = SIZES[split]
    zeros = torch.zeros(32, 1)
    parts = dict(zip(SIZES, torch.arange(32).split(list(SIZES.values())), strict=True))
    data = TabularDataset(Schema((Field("a", 1),), ("x",)), zeros, zeros.int(), torch.arange(32).float(), parts)
    batches = data.batches(split, batch_size, seed=seed)
    sizes = [len(batch.labels) for batch in batches]
    assert sizes == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    assert len(batches) == len(sizes)
    assert sorted(labels(batches)) == data.splits[split].tolist()


def test_without_a_seed_the_order_is_the_datas_own(data: TabularDataset) -> None:
    batches = data.batches("train", 5)
    assert labels(batches) == labels(batches) == list(range(23))


def test_the_order_depends_on_seed_and_epoch_alone(data: TabularDataset) -> None:
    batches = data.batches("train", 5, seed=3)
    epochs = [labels(batches) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches.epoch == 3
    again = data.batches("train", 2, seed=3)
    again.epoch = 1
    assert labels(again) == epochs[1]
    assert labels(data.batches("train", 5, seed=4)) != epochs[0]


def test_an_epoch_that_is_broken_off_is_not_counted(data: TabularDataset) -> None:
    batches = data.batches("train", 5, seed=3)
    first = next(iter(batches)).labels.tolist()
    assert batches.epoch == 0
    assert labels(batches)[:5] == first


def test_shuffling_leaves_the_global_generators_alone(data: TabularDataset) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    labels(data.batches("train", 5, seed=3))
    random_split(100, (0.8, 0.1, 0.1), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@given(n=st.integers(0, 200), cut=st.integers(0, 10), more=st.integers(0, 10), seed=st.integers(0, 99))
def test_random_split_deals_every_position_once(n: int, cut: int, more: int, seed: int) -> None:
    fractions = (cut / 20, more / 20, (20 - cut - more) / 20)
    parts = random_split(n, fractions, seed)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(n))
    for part, fraction in zip(parts.values(), fractions, strict=True):
        assert abs(len(part) - n * fraction) <= 1
        assert part.tolist() == sorted(part.tolist())


def test_random_split_depends_on_its_seed() -> None:
    first, again, other = (random_split(100, (0.8, 0.1, 0.1), seed)["test"].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.1, 0.0, -0.1)])
def test_fractions_that_make_no_sense_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(SettingsError, match="add up to 1"):
        random_split(10, fractions, seed=0)


def test_configs_have_names_of_their_own() -> None:
    assert sorted(config.name for config in CONFIGS) == ["avazu", "criteo", "kkbox", "movielens-1m", "movielens-csv", "planted"]


def test_bags_of_any_length_come_beside_single_ids() -> None:
    """Against bags written out the long way; what is precomputed is what TorchRec would compute."""
    lists = [[5, 2], [], [3], [1, 4, 0]]
    ends = torch.tensor([0, *map(len, lists)]).cumsum(0)
    bags = {"b": Bags(torch.tensor([v for bag in lists for v in bag], dtype=torch.int32), ends)}
    schema = Schema((Field("a", 9), Field("b", 6, multiple=True), Field("c", 9)), ())
    ids = torch.randint(0, 4, (20, 3), dtype=torch.int32)
    data = TabularDataset(schema, torch.empty(20, 0), ids, torch.arange(20.0), {"train": torch.arange(20)}, bags)
    for batch in data.batches("train", 7, seed=1):
        sparse, rows = batch.sparse_features, ids[batch.labels.long()].tolist()
        expected = {"a": [[a] for a, _, _ in rows], "b": [lists[b] for _, b, _ in rows], "c": [[c] for _, _, c in rows]}
        for key, bag in expected.items():
            assert [part.tolist() for part in sparse[key].values().split(sparse[key].lengths().tolist())] == bag
        fresh = KeyedJaggedTensor(sparse.keys(), sparse.values(), lengths=sparse.lengths())
        assert sparse.values().dtype == torch.int64
        assert fresh.length_per_key() == sparse.length_per_key()
        assert fresh.stride() == sparse.stride() == len(rows)


def test_a_fingerprint_tells_bags_apart() -> None:
    schema = Schema((Field("a", 9, multiple=True),), ())

    def fingerprint(values: list[int]) -> str:
        bags = {"a": Bags(torch.tensor(values, dtype=torch.int32), torch.tensor([0, len(values)]))}
        nothing = torch.zeros(1, 1)
        return TabularDataset(schema, nothing, nothing.int(), nothing[0], {"train": torch.arange(1)}, bags).fingerprint()

    assert fingerprint([1, 2]) == fingerprint([1, 2]) != fingerprint([2, 1])


@given(times=st.lists(st.integers(0, 9), max_size=60), cut=st.integers(0, 10), more=st.integers(0, 10))
def test_a_split_by_time_trains_on_the_earliest_and_tests_on_the_latest(times: list[int], cut: int, more: int) -> None:
    fractions = (cut / 20, more / 20, (20 - cut - more) / 20)
    parts = time_split(np.array(times, dtype=np.int64), fractions)
    assert torch.cat(list(parts.values())).tolist() == sorted(range(len(times)), key=lambda at: times[at])
    for part, fraction in zip(parts.values(), fractions, strict=True):
        assert abs(len(part) - len(times) * fraction) <= 1
    with pytest.raises(SettingsError, match="add up to 1"):
        time_split(np.zeros(3, dtype=np.int64), (0.8, 0.1, 0.2))
