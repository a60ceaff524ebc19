import torch
from hypothesis import given
from hypothesis import strategies as st

from embsearch_plugin.data.bags import Bags


@given(bags=st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=9), data=st.data())
def test_the_bags_taken_are_those_asked_for_in_order(bags: list[list[int]], data: st.DataObject) -> None:
    lengths = torch.tensor([0, *map(len, bags)])
    stored = Bags(torch.tensor([v for bag in bags for v in bag], dtype=torch.int32), lengths.cumsum(0))
    which = data.draw(st.lists(st.integers(0, len(bags) - 1), max_size=12))
    values, got = stored.take(torch.tensor(which, dtype=torch.int64))
    assert [part.tolist() for part in values.split(got.tolist())] == [bags[at] for at in which] or not which
    assert got.tolist() == [len(bags[at]) for at in which]
