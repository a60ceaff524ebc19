"""What is done for all tables at once, beside doing it table by table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, WORLDS, searched, train
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.errors import InputError
from embsearch_plugin.lookup.readers import Readers

IDS = st.lists(st.lists(st.lists(st.integers(-1, 6), max_size=3), min_size=2, max_size=2), min_size=3, max_size=3)


@settings(max_examples=100)
@given(bags=IDS, reads=st.lists(st.sampled_from(["f0", "f1", "f2"]), min_size=1, max_size=4), rows=st.data())
def test_readers_read_together_as_one_by_one(bags: list[list[list[int]]], reads: list[str], rows: st.DataObject) -> None:
    """Three features of two bags each; a reader may read what another does."""
    features = KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.tensor([i for feature in bags for bag in feature for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for feature in bags for bag in feature]),
    )
    limits = [rows.draw(st.integers(1, 7)) for _ in reads]
    read = (readers := Readers(features.keys(), reads, rows=limits)).read(features)
    ids = [[i for bag in bags[int(name[1])] for i in bag] for name in reads]
    assert read.ids.tolist() == [i for own in ids for i in own]
    assert read.reader.tolist() == [number for number, own in enumerate(ids) for _ in own]
    assert read.lengths.tolist() == [[len(bag) for bag in bags[int(name[1])]] for name in reads]
    assert list(read.counts) == [len(own) for own in ids]
    good = all(0 <= i < limit for own, limit in zip(ids, limits, strict=True) for i in own)
    assert read.have_rows(readers.of("rows", read.ids.device)) == good


@pytest.mark.skipif(DEVICE.type != "cpu", reason="what a CPU does does not run on a GPU")
@pytest.mark.parametrize("world", ["one id", "bags", "mean", "weighted", "several features", "shared feature", "unequal dims"])
def test_a_search_and_its_compact_model_do_the_same_together(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU."""
    losses = []
    for together in (False, True):
        monkeypatch.setattr(Readers, "together", lambda *_, together=together: together)
        model, session, optimizer = searched(WORLDS[world], steps=4, algorithm=es.Dnis(warm_up=1, lr=0.2), budget="55%")
        counted = [count.clone() for count in session.frequencies]
        gates = [gate.clone() for gate in session.gates]
        session.compact(session.derive())
        torch.manual_seed(3)
        losses.append([*counted, *gates, train(model, optimizer, (WORLDS[world].batch(seed=40 + i) for i in range(4)))])
    for mine, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, 10**6])
@pytest.mark.parametrize("form", ["searched", "compact"])
def test_ids_without_a_row_are_found_together(form: str, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readers, "together", lambda *_: True)
    model, session, _ = searched(WORLDS["bags"], steps=3)
    if form == "compact":
        session.compact(session.derive())
    features = WORLDS["bags"].features(20, seed=5)
    features.values()[3] = bad
    with pytest.raises(InputError, match=rf"must be in \[0, \d+\), the rows of table .*; got {bad} "):
        model.collection(features)
