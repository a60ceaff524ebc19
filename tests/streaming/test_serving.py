"""From growing tables to a plan and a compact model: the same answers, in the bytes that are counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MEAN, PLAIN, STREAMS, SUM, WORLDS, World, relative_error, stored_bytes, streamed, task
from torch import Tensor

import embsearch_plugin as es
from embsearch_plugin.errors import InputError, SessionError
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.streaming.forms import Chain
from embsearch_plugin.streaming.serving import basis_of
from embsearch_plugin.streaming.session import StreamSession

FLOAT32 = [name for name in WORLDS if name != "half"]
everywhere = pytest.mark.parametrize(("algorithm", "world"), [(algorithm, world) for algorithm in STREAMS for world in FLOAT32])


def grown(algorithm: str, world: World) -> tuple[torch.nn.Module, StreamSession]:
    """A stream whose rows have several widths, where the algorithm knows any."""
    model, session, _ = streamed(world, algorithm=algorithm)
    for table in session.tables:
        for part in (2, 3):  # whatever the policy did
            table.widen(torch.arange(0, len(table), part))
    return model.eval(), session


@everywhere
def test_the_compact_model_answers_as_the_stream_does(algorithm: str, world: str) -> None:
    """Ids that never came, empty bags and long ones among them."""
    model, session = grown(algorithm, WORLDS[world])
    features = [WORLDS[world].features(50, seed) for seed in (3, 444)]
    with torch.no_grad():
        expected = [model.collection(each) for each in features]
    plan = session.derive()
    session.compact(plan)
    for each, before in zip(features, expected, strict=True):
        got = model.collection(each)
        assert (got.keys(), got.length_per_key()) == (before.keys(), before.length_per_key())
        assert relative_error(got.values(), before.values()) < 1e-5
    assert stored_bytes(model) == plan.size_bytes
    assert len({block.dim for table in plan.tables for block in table.blocks} - {0, 8, 12, 4}) >= (algorithm == "esapn")


@pytest.mark.parametrize("algorithm", STREAMS)
def test_a_stream_is_saved_and_loaded_as_any_compact_model(algorithm: str, tmp_path: Path) -> None:
    model, session = grown(algorithm, WORLDS["bags"])
    batch = WORLDS["bags"].batch(seed=321)
    expected = model(batch)[1][1]
    plan = session.derive()
    es.save(session.compact(plan), plan, tmp_path)
    loaded = es.load(tmp_path, task(WORLDS["bags"], seed=9)).eval()
    torch.testing.assert_close(loaded(batch)[1][1], expected, rtol=1e-4, atol=1e-5)
    again = SizePlan.load(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    for one, other in zip(again.tables, plan.tables, strict=True):
        assert (one.order is None and other.order is None) or torch.equal(one.order, other.order)


@pytest.mark.parametrize("algorithm", STREAMS)
def test_a_plan_loaded_from_a_file_is_the_plan_of_now(algorithm: str, tmp_path: Path) -> None:
    model, session = grown(algorithm, PLAIN)
    session.derive().save(tmp_path / "plan.json")
    assert session.compact(SizePlan.load(tmp_path / "plan.json")) is model


@pytest.mark.parametrize("algorithm", STREAMS)
def test_derive_changes_nothing(algorithm: str) -> None:
    model, session = grown(algorithm, PLAIN)
    batch = PLAIN.batch(seed=3)
    before = model(batch)[1][1]
    held = session.held_bytes
    assert str(session.derive()) == str(session.derive())
    assert torch.equal(model(batch)[1][1], before)
    assert session.held_bytes == held


@pytest.mark.parametrize("outside", [-1, 200, 10**15])
def test_ids_that_the_original_table_has_no_rows_for_are_an_error(outside: int) -> None:
    _, session, _ = streamed(PLAIN, 2, "fixed")
    session.tables[0].admit(torch.tensor([outside]), torch.ones(1, dtype=torch.int64))
    with pytest.raises(SessionError, match="rows for the ids 0 to 199, and 1 others came"):
        session.derive()


def test_an_id_outside_is_refused_when_it_is_served() -> None:
    model, session = grown("esapn", PLAIN)
    session.compact(session.derive())
    batch = PLAIN.batch()
    batch.sparse_features.values()[0] = 10**6
    with pytest.raises(InputError, match="must be in"):
        model(batch)


@pytest.mark.parametrize("algorithm", STREAMS)
@pytest.mark.parametrize("pooling", [SUM, MEAN])
def test_a_table_that_no_id_came_to_answers_too(algorithm: str, pooling: object) -> None:
    world = replace(PLAIN, tables=(("t0", 20, 8, ("f0",), pooling), ("t1", 30, 8, ("f1",), SUM)))
    model = task(world)
    session = es.prepare(model, algorithm=type(streamed(PLAIN, 0, algorithm)[1].config)(candidates=(1, 3))
                         if algorithm != "fixed" else "fixed")  # fmt: skip
    session.tables[1].admit(torch.arange(30), torch.ones(30, dtype=torch.int64))  # and one that all came to
    features = world.features(16, 0)
    expected = model.eval().collection(features).values()
    plan = session.derive()
    session.compact(plan)
    assert relative_error(model.collection(features).values(), expected) < 1e-5
    assert stored_bytes(model) == plan.size_bytes


def reached(chain: Chain, size: int) -> Tensor:
    """What rows of a width can reach, (D, d)."""
    image = torch.eye(chain.widths[size], dtype=torch.float64)
    for step in chain.maps[size:]:
        image = step.weight.detach().double() @ image
    return image


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4, unique=True).map(sorted), st.integers(0, 99), st.booleans())
def test_the_basis_has_the_narrower_rows_subspaces_first(widths: list[int], seed: int, flat: bool) -> None:
    """Also where maps lose dimensions."""
    torch.manual_seed(seed)
    chain = Chain(widths)
    if flat:
        with torch.no_grad():
            chain.maps[0].weight.zero_()
            chain.maps[-1].weight[:, :1] = 0
    basis = basis_of(chain)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(widths[-1], dtype=torch.float64))
    for size, width in enumerate(widths):
        image, part = reached(chain, size), basis[:width]
        torch.testing.assert_close(part.t() @ (part @ image), image, rtol=1e-9, atol=1e-9)
