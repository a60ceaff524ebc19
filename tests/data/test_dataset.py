import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.data import CONFIGS
from embsearch_plugin.data.dataset import Batches, Field, Schema, Split, TabularDataset, random_split
from embsearch_plugin.errors import DataError

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
    with pytest.raises(DataError, match="add up to 1"):
        random_split(10, fractions, seed=0)


def test_configs_have_names_of_their_own() -> None:
    assert sorted(config.name for config in CONFIGS) == ["criteo", "movielens-1m", "planted"]
