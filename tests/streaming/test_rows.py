"""Rows of several widths: against a dict of vectors, each with the optimizer's state of its own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embsearch_plugin.streaming.row_optimizers import RowAdam, RowOptimizer, RowWiseAdagrad
from embsearch_plugin.streaming.rows import Rows

WIDTHS = (2, 3, 5)
OPTIMIZERS = {"adam": RowAdam(lr=0.1), "rowwise_adagrad": RowWiseAdagrad(lr=0.1)}


class Slow:
    """The same, a row at a time."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        self.optimizer, self.rows, self.states, self.sizes = optimizer, [], [], []

    def add(self, rows: Tensor) -> None:
        for row in rows:
            self.rows.append(row.clone())
            self.states.append(self._new(0))
            self.sizes.append(0)

    def _new(self, size: int) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.optimizer.shapes(WIDTHS[size]).items()}

    def widen(self, entry: int, row: Tensor) -> None:
        self.rows[entry], self.sizes[entry] = row.clone(), self.sizes[entry] + 1
        fresh = self._new(self.sizes[entry])
        self.states[entry] = {n: old if not old.shape else fresh[n] for n, old in self.states[entry].items()}

    def train(self, entry: int, gradient: Tensor, step: int) -> None:
        state = {name: value[None].clone() for name, value in self.states[entry].items()}
        self.rows[entry] = self.optimizer.update(self.rows[entry][None], gradient[None], state, step)[0]
        self.states[entry] = {name: value[0] for name, value in state.items()}


def check(rows: Rows, slow: Slow, entries: Tensor) -> None:
    """Read entries, those that are not there among them, and look at every tensor."""
    found: dict[int, Tensor] = {}
    for piece in rows.read(entries):
        for position, row in zip(piece.positions.tolist(), piece.rows, strict=True):
            found[position] = row
            assert len(row) == WIDTHS[piece.size]
    assert sorted(found) == list(range(len(entries)))
    for position, entry in enumerate(entries.tolist()):
        expected = slow.rows[entry] if entry >= 0 else torch.zeros(WIDTHS[0])
        torch.testing.assert_close(found[position], expected, rtol=0, atol=0)
    assert rows.row_counts == [slow.sizes.count(size) for size in range(len(WIDTHS))]
    for size, arena in enumerate(rows._arenas):
        owners = arena.owners.values.tolist()
        assert sorted(owners) == [entry for entry, each in enumerate(slow.sizes) if each == size]  # no gaps
        for place, entry in enumerate(owners):
            assert int(rows._places.values[entry]) == place
            for name, tensor in arena.state.items():
                torch.testing.assert_close(tensor.values[place], slow.states[entry][name], rtol=1e-6, atol=1e-9)
    assert rows.used_bytes == sum(rows.entry_bytes(size) for size in slow.sizes)
    assert rows.used_bytes <= rows.held_bytes <= 1.25 * rows.used_bytes


@settings(max_examples=25)
@given(st.data(), st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 2**30))
def test_it_is_a_dict_of_vectors(data: st.DataObject, name: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rows, slow = Rows(WIDTHS, OPTIMIZERS[name]), Slow(OPTIMIZERS[name])
    for _ in range(data.draw(st.integers(1, 8))):
        new = torch.randn(data.draw(st.integers(0, 30)), WIDTHS[0], generator=random)
        rows.add(new)
        slow.add(new)
        order = torch.randperm(len(slow.rows), generator=random)
        read = order[: len(order) * 2 // 3]
        size = data.draw(st.integers(0, 2))
        taken = rows.read(read)[size]
        gradients = torch.randn(len(taken.positions), WIDTHS[size], generator=random)
        grow(rows, slow, order[: len(order) // 2], random)  # between reading and training, entries and others move
        rows.train(read[taken.positions], size, gradients, rows.steps + 1)
        for entry, gradient in zip(read[taken.positions].tolist(), gradients, strict=True):
            if slow.sizes[entry] == size:
                slow.train(entry, gradient, rows.steps)
        asked = torch.cat([order, torch.tensor([-1, -1])])
        check(rows, slow, asked[torch.randperm(len(asked), generator=random)])


def grow(rows: Rows, slow: Slow, entries: Tensor, random: torch.Generator) -> None:
    sizes = rows.sizes(entries)
    for size in (2, 1):
        growing = entries[sizes == size - 1]
        wider = torch.randn(len(growing), WIDTHS[size], generator=random)
        rows.widen(growing, size, wider)
        for entry, row in zip(growing.tolist(), wider, strict=True):
            slow.widen(entry, row)


@pytest.mark.parametrize(("name", "kept"), [("adam", False), ("rowwise_adagrad", True)])
def test_a_number_per_row_is_kept_when_it_grows_and_moments_start_anew(name: str, kept: bool) -> None:
    rows = Rows(WIDTHS, OPTIMIZERS[name])
    rows.add(torch.randn(4, 2))
    rows.train(torch.arange(4), 0, torch.ones(4, 2), 1)
    rows.widen(torch.tensor([2]), 1, torch.randn(1, 3))
    for tensor in rows._arenas[1].state.values():
        assert bool(tensor.values.any()) is kept
    for tensor in rows._arenas[0].state.values():
        assert tensor.values.all()


def test_what_is_read_is_a_copy_and_training_touches_no_other_row() -> None:
    rows = Rows((2,), OPTIMIZERS["adam"])
    rows.add(torch.randn(5, 2))
    before = rows.read(torch.arange(5))[0].rows
    kept = before.clone()
    rows.train(torch.tensor([3, -1, 1]), 0, torch.ones(3, 2), 1)
    assert torch.equal(before, kept)
    changed = (rows.read(torch.arange(5))[0].rows != kept).all(1)
    assert changed.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_state_goes_on_to_the_same_bits_and_bytes(name: str) -> None:
    rows, other = Rows(WIDTHS, OPTIMIZERS[name]), Rows(WIDTHS, OPTIMIZERS[name])
    random = torch.Generator().manual_seed(1)

    def work(target: Rows, random: torch.Generator) -> None:
        for _ in range(5):
            target.add(torch.randn(7, 2, generator=random))
            entries = torch.randperm(len(target), generator=random)[:9]
            grow(target, _Deaf(), entries, random)
            step = target.steps + 1
            for piece in target.read(entries):
                target.train(entries[piece.positions], piece.size, torch.randn(piece.rows.shape, generator=random), step)
            assert target.steps == step

    work(rows, random)
    other.load_state_dict(rows.state_dict())
    twin = torch.Generator()
    twin.set_state(random.get_state())
    work(rows, random)
    work(other, twin)
    assert same(rows.state_dict(), other.state_dict())
    assert other.held_bytes == rows.held_bytes


class _Deaf:
    """A slow reference that is not asked."""

    def widen(self, entry: int, row: Tensor) -> None: ...


def same(one: Any, other: Any) -> bool:
    """Whether two nested states hold the same."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
