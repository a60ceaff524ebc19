"""Growing tensors: against a list, with bounded slack and few moves."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embsearch_plugin.streaming.growing import SLACK, GrowingTensor


def moves(tensor: GrowingTensor, sizes: list[int]) -> int:
    """Give a tensor one size after the other; return how often it moved to another place."""
    found = 0
    for size in sizes:
        held = tensor._held
        tensor.resize(size)
        found += tensor._held is not held
    return found


@given(st.lists(st.integers(0, 300), max_size=30), st.sampled_from([(), (3,), (2, 2)]))
def test_it_is_a_list_that_grows_and_shrinks_at_its_end(sizes: list[int], shape: tuple[int, ...]) -> None:
    tensor, rows = GrowingTensor(shape, torch.float32), []
    for size in sizes:
        tensor.resize(size)
        rows = rows[:size] + [torch.zeros(shape)] * (size - len(rows))
        assert len(tensor) == len(tensor.values) == size
        assert all(torch.equal(row, kept) for row, kept in zip(tensor.values, rows, strict=True))
        fresh = torch.randn(size, *shape)
        tensor.values.copy_(fresh)
        rows = list(fresh)


@given(st.lists(st.integers(0, 2000), max_size=40))
def test_what_is_held_is_what_is_used_within_the_slack(sizes: list[int]) -> None:
    tensor = GrowingTensor((3,), torch.float32)
    for size in sizes:
        tensor.resize(size)
        assert tensor.used_bytes == size * tensor.row_bytes == size * 12
        assert tensor.used_bytes <= tensor.held_bytes <= SLACK * tensor.used_bytes


@pytest.mark.parametrize("rows", [100, 1000, 10_000])
def test_appending_moves_rarely(rows: int) -> None:
    up = moves(GrowingTensor((), torch.int32), list(range(1, rows + 1)))
    assert up <= 8 + log(rows / 8) / log(9 / 8) + 8
    down = GrowingTensor((), torch.int32)
    down.resize(rows)
    assert moves(down, list(range(rows - 1, -1, -1))) <= 8 + log(rows / 8) / log(10 / 9) + 8


def test_a_size_that_swings_moves_nothing() -> None:
    tensor = GrowingTensor((), torch.int32)
    tensor.resize(1000)
    tensor.resize(1001)
    assert moves(tensor, [1000, 1001] * 50) == 0


def test_a_state_has_its_room_too_and_is_a_copy() -> None:
    tensor, other = GrowingTensor((2,), torch.float32), GrowingTensor((2,), torch.float32)
    for size in range(1, 51):
        tensor.resize(size)
    tensor.values.copy_(torch.randn(50, 2))
    state = tensor.state_dict()
    expected = tensor.values.clone()
    tensor.values.zero_()
    other.resize(7)
    other.load_state_dict(state)
    assert torch.equal(other.values, expected)
    assert other.held_bytes == tensor.held_bytes
    assert moves(other, list(range(51, 90))) == moves(tensor, list(range(51, 90)))


def test_memory_is_the_hosts_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert GrowingTensor((2,), torch.float32).values.device.type == "cpu"
