"""Bags: beside loops over one bag and one id at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.errors import InputError
from embsearch_plugin.lookup.bags import (
    check_ids,
    has_long_bags,
    ids_of,
    one_per_bag,
    ordered,
    split_by_cell,
)


def batch(lengths: list[list[int]], weighted: bool = False) -> KeyedJaggedTensor:
    """Bags of the ids 0, 1, 2, ... in the order in which they lie."""
    n = sum(map(sum, lengths))
    return KeyedJaggedTensor(
        keys=[f"f{number}" for number in range(len(lengths))],
        values=torch.arange(n),
        lengths=torch.tensor(lengths).flatten(),
        weights=torch.arange(n) / 7 if weighted else None,
    )


@settings(deadline=None, max_examples=50)
@given(data=st.data(), weighted=st.booleans())
def test_bags_are_split_by_cell(data: st.DataObject, weighted: bool) -> None:
    n_features, examples, size = (data.draw(st.integers(1, most)) for most in (3, 4, 5))
    lengths = [[data.draw(st.integers(0, 4)) for _ in range(examples)] for _ in range(n_features)]
    features = batch(lengths, weighted)
    cell_of = [data.draw(st.integers(0, size - 1)) for _ in range(features.values().numel())]
    cells = list(torch.tensor(cell_of, dtype=torch.uint8).split([sum(bags) for bags in lengths]))
    expected, counts, start = [], [], 0
    for bags in lengths:
        ends = [start + sum(bags[: k + 1]) for k in range(examples)]
        for cell in range(size):
            for length, end in zip(bags, ends, strict=True):
                held = [i for i in range(end - length, end) if cell_of[i] == cell]
                expected += held
                counts.append(len(held))
        start += sum(bags)
    split = split_by_cell(features, cells, size)
    assert split.features.values().tolist() == expected
    assert split.features.lengths().tolist() == counts
    assert (split.features.keys(), split.features.stride()) == (features.keys(), size * examples)
    if weighted:
        torch.testing.assert_close(split.features.weights(), torch.tensor(expected) / 7)
    share = split.share.sum(1)
    torch.testing.assert_close(share, (torch.tensor(lengths) > 0).float())


def test_many_features_are_split_too() -> None:
    features = batch([[2]] * 300)
    cells = [torch.tensor([200, 5], dtype=torch.uint8)] * 300
    split = split_by_cell(features, cells, 256)  # 76,800 parts: more than int16 numbers
    assert split.features.values().view(300, 2).flip(1).flatten().tolist() == list(range(600))


def test_one_value_per_bag() -> None:
    values = torch.tensor([5, 6])
    assert one_per_bag(torch.tensor([1, 1]), values) is values
    assert one_per_bag(torch.tensor([0, 1, 0, 1, 0]), values)[[1, 3]].tolist() == [5, 6]
    assert one_per_bag(torch.tensor([0, 0]), values[:0]).shape == (2,)


def test_features_are_put_in_order_and_others_left_out() -> None:
    features = batch([[1, 2], [0, 1], [2, 0]])
    assert ordered(features, ["f0", "f1", "f2"]) is features
    chosen = ordered(features, ["f2", "f0"])
    assert {name: ids.tolist() for name, ids in ids_of(chosen).items()} == {"f2": [4, 5], "f0": [0, 1, 2]}
    assert has_long_bags(features)
    assert not has_long_bags(batch([[0, 1]]))


def test_deduplicated_batches_are_refused() -> None:
    features = batch([[1, 2], [0, 1]])
    inverse = (features.keys(), torch.zeros(2, 5, dtype=torch.int64))
    again = KeyedJaggedTensor(features.keys(), features.values(), lengths=features.lengths(), inverse_indices=inverse)
    with pytest.raises(InputError, match="deduplicated"):
        ordered(again, features.keys())


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_ids_without_a_row(bad: int) -> None:
    check_ids("t", "f", 4, torch.tensor([0, 3]))
    check_ids("t", "f", 4, torch.tensor([], dtype=torch.int64))
    with pytest.raises(InputError, match=rf"'f' must be in \[0, 4\), the rows of table 't'; got {bad} \(1 of 2 ids\)"):
        check_ids("t", "f", 4, torch.tensor([0, bad]))
