"""Columns of a compact collection: where they come from, beside copying them one by one."""

import pytest
import torch

from embsearch_plugin.compact.columns import Layout, take_columns


@pytest.mark.parametrize("places", [[3, -1, 0, 4, -1, 1, 2], [3, 0, 4, 1, 2]])
def test_columns_are_taken_and_their_gradients_given_back(places: list[int]) -> None:
    values, source = torch.randn(4, 5).requires_grad_(), torch.tensor(places)
    got = take_columns(values, source)
    expected = torch.stack([torch.zeros(4) if s < 0 else values[:, s] for s in source.tolist()], dim=1)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(4, len(places))
    (mine,), (theirs,) = (torch.autograd.grad((output * weights).sum(), values) for output in (got, expected))
    torch.testing.assert_close(mine, theirs)


def test_a_layout_finds_each_slots_columns() -> None:
    layout = Layout.of([[(0, 2), (4, 1)], [(2, 2)]], dims=[3, 4], device=torch.device("cpu"))
    assert layout.source([None, None], [3, 4]).tolist() == [0, 1, 4, 2, 3, -1, -1]
    placement = torch.tensor([2, 0, 1], dtype=torch.int32)  # original column 0 stands at place 2
    assert layout.source([placement, None], [3, 4]).tolist() == [4, 0, 1, 2, 3, -1, -1]


def test_columns_in_their_place_are_not_moved() -> None:
    layout = Layout.of([[(0, 2), (2, 1)], [(3, 2)]], dims=[3, 2], device=torch.device("cpu"))
    assert layout.source([None, None], [3, 2]) is None
