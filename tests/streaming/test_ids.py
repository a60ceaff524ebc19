"""The map from ids to entries: against a dict, within its slack, and with a bounded number of probes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embsearch_plugin.streaming.ids import IdMap

ANY = st.one_of(st.integers(-5, 60), st.integers(-(2**63), 2**63 - 1))
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 by the golden ratio


class Watched:
    """Slots that count how often they are read, and in how many rounds."""

    def __init__(self, slots: Tensor, owner: "Counting") -> None:
        self.slots, self.owner = slots, owner
        self.nbytes, self.itemsize = slots.nbytes, slots.itemsize

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, places: Tensor) -> Tensor:
        self.owner.probed += len(places)
        self.owner.rounds += 1
        return self.slots[places]

    def __setitem__(self, places: Tensor, entries: Tensor) -> None:
        self.slots[places] = entries


class Counting(IdMap):
    """Counts how many slots are read."""

    probed, rounds = 0, 0

    @property
    def _slots(self) -> Watched:
        return self._watched

    @_slots.setter
    def _slots(self, slots: Tensor) -> None:
        self._watched = Watched(slots, self)


@given(st.lists(st.lists(ANY, max_size=40, unique=True), max_size=12), st.lists(ANY, max_size=20))
def test_it_is_a_dict(batches: list[list[int]], others: list[int]) -> None:
    entries: dict[int, int] = {}
    ids = IdMap()
    for batch in batches:
        for each in batch:
            entries.setdefault(each, len(entries))
        assert ids.admit(torch.tensor(batch, dtype=torch.int64)).tolist() == [entries[each] for each in batch]
        asked = [*others, *entries]
        assert ids.find(torch.tensor(asked, dtype=torch.int64)).tolist() == [entries.get(each, -1) for each in asked]
        assert ids.ids.tolist() == list(entries)
        assert len(ids) == len(entries)


def test_smaller_integers_are_ids_as_well() -> None:
    ids = IdMap()
    assert ids.admit(torch.tensor([3, -1], dtype=torch.int32)).tolist() == [0, 1]
    assert ids.find(torch.tensor([-1, 4, 3], dtype=torch.int16)).tolist() == [1, -1, 0]


@pytest.mark.parametrize("step", [1, 100])
def test_from_eight_ids_on_the_slack_is_bounded(step: int) -> None:
    ids = IdMap()
    for first in range(0, 1200, step):
        ids.admit(torch.arange(first, first + step))
        assert ids.used_bytes == len(ids) * ids.entry_bytes == len(ids) * 12
        if len(ids) >= 8:
            assert ids.used_bytes < ids.held_bytes <= 1.25 * ids.used_bytes


@pytest.mark.parametrize("kind", ["in a row", "random", "multiples", "powers"])
def test_a_lookup_takes_as_many_probes_however_many_ids_there_are(kind: str) -> None:
    for count in (1_000, 30_000):
        numbers = torch.arange(count)
        admitted = {
            "in a row": numbers,
            "random": torch.randint(-(2**62), 2**62, (count,)).unique(),
            "multiples": numbers * (GOLDEN - 2**64),  # as of ids that were hashed by multiplication
            "powers": numbers << 40,
        }[kind]
        ids = Counting()
        ids.admit(admitted)
        ids.probed = ids.rounds = 0
        assert (ids.find(admitted) >= 0).all()
        assert ids.probed < 6 * len(admitted)
        ids.probed = ids.rounds = 0
        assert (ids.find(admitted[:1000] * 3 + 2**61 + 1) == -1).all()
        assert ids.probed < 14 * 1000
        assert ids.rounds < 150


@pytest.mark.parametrize(("count", "together"), [(1_500, 3), (20_000, 50)])
def test_admitting_takes_a_constant_number_of_probes_per_id(count: int, together: int) -> None:
    ids = Counting()
    for first in range(0, count, together):
        ids.admit(torch.arange(first, first + together))
    assert ids.probed < 40 * count  # dealing all anew each time would take hundreds


def test_a_state_has_its_room_too() -> None:
    ids, other = IdMap(), IdMap()
    for number in range(200):
        ids.admit(torch.tensor([number * 7919]))
    other.load_state_dict(ids.state_dict())
    assert torch.equal(other.ids, ids.ids)
    assert other.held_bytes == ids.held_bytes
    for number in range(200, 300):
        assert other.admit(torch.tensor([number * 7919])).tolist() == [number]
        ids.admit(torch.tensor([number * 7919]))
        assert other.held_bytes == ids.held_bytes
    assert other.find(ids.ids).tolist() == list(range(300))
