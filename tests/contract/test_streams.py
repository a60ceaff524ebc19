"""What must hold for every algorithm on streams, with every optimizer of rows. A new one is tested here by itself."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEVICE, STREAMING, STREAMS, WORLDS, Task, random_state, set_random_state, streamed, train
from torch import Tensor

import embsearch_plugin as es
from embsearch_plugin.files import read_state, write_state
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.streaming.row_optimizers import ROW_OPTIMIZERS
from embsearch_plugin.streaming.session import StreamSession

KINDS = list(product(STREAMS, ROW_OPTIMIZERS))
every = pytest.mark.parametrize(("algorithm", "rows"), KINDS)
WORLD = WORLDS["bags"]
CAP = es.Budget(bytes=60_000)


def stream(algorithm: str, rows: str, steps: int = 8) -> tuple[Task, StreamSession, torch.optim.Optimizer]:
    config = algorithms()[algorithm](**STREAMING.get(algorithm, {}), row_lr=0.05, rows=rows)
    torch.manual_seed(1)
    return streamed(WORLD, steps, config, budget=CAP)


def state_of(model: Task, session: StreamSession, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    return {**states, "random": random_state()}


def same(one: Any, other: Any) -> bool:
    """Whether two nested states hold the same, bit for bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def batches(first: int, last: int) -> Any:
    return (WORLD.batch(seed=seed) for seed in range(first, last))


@every
def test_it_learns_and_its_tables_follow_what_comes(algorithm: str, rows: str) -> None:
    model, session, optimizer = stream(algorithm, rows, 0)
    batch = WORLD.batch(seed=3)
    features = batch.sparse_features.to_dict()
    losses = train(model, optimizer, [batch] * 30)
    assert losses[-1] < losses[0] - 0.1
    for table in session.tables:
        came = torch.cat([features[name].values() for name in table.spec.features]).unique()
        assert sorted(table.ids.ids.tolist()) == came.tolist()
        assert sum(table.rows.row_counts) == len(came)
    assert session.used_bytes <= session.held_bytes <= 1.25 * session.used_bytes


@every
def test_rows_have_the_standard_deviation_that_was_asked_for(algorithm: str, rows: str) -> None:
    config = replace(stream(algorithm, rows, 0)[1].config, init_std=0.3)
    _, session, _ = streamed(WORLD, 0, config)
    table = session.tables[0]
    table.admit(torch.arange(5000), torch.ones(5000, dtype=torch.int64))
    numbers = table.rows.read(torch.arange(5000))[0].rows
    assert float(numbers.std()) == pytest.approx(0.3, rel=0.05)
    assert float(numbers.mean()) == pytest.approx(0.0, abs=0.01)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU adds up in no fixed order")
@every
def test_equal_seeds_give_equal_streams_and_others_do_not(algorithm: str, rows: str) -> None:
    one, other = (state_of(*stream(algorithm, rows, 3)) for _ in range(2))
    assert same(one, other)
    config = stream(algorithm, rows, 0)[1].config
    torch.manual_seed(1)
    differing = state_of(*streamed(WORLD, 3, config, budget=CAP, seed=5))
    assert not same(one["session"]["tables"], differing["session"]["tables"])


def test_a_stream_goes_on_in_a_new_process_to_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for algorithm, rows in KINDS:
        model, session, optimizer = stream(algorithm, rows)
        write_state(tmp_path / f"{algorithm}-{rows}", state_of(model, session, optimizer))
        losses = train(model, optimizer, batches(8, 16))
        after = {**state_of(model, session, optimizer), "losses": losses, "bytes": [session.used_bytes, session.held_bytes]}
        expected[algorithm, rows] = after
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=120, env=environment)
    for (algorithm, rows), after in expected.items():
        assert same(after, read_state(tmp_path / f"{algorithm}-{rows}-resumed")), (algorithm, rows)


def resume(folder: Path) -> None:
    """The other process of the test above: every stream is taken up at step 8 and taken to step 16."""
    torch.set_num_threads(1)
    for algorithm, rows in KINDS:
        state = read_state(folder / f"{algorithm}-{rows}")
        model, session, optimizer = stream(algorithm, rows, steps=0)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        session.load_state_dict(state["session"])
        set_random_state(state["random"])
        losses = train(model, optimizer, batches(8, 16))
        after = {**state_of(model, session, optimizer), "losses": losses, "bytes": [session.used_bytes, session.held_bytes]}
        write_state(folder / f"{algorithm}-{rows}-resumed", after)


@every
def test_that_the_cap_was_reached_is_remembered(algorithm: str, rows: str, caplog: pytest.LogCaptureFixture) -> None:
    config = stream(algorithm, rows, 0)[1].config
    _, session, _ = streamed(WORLD, 6, config, budget=es.Budget(bytes=6_000))
    assert session.stopped
    state = session.state_dict()
    model, other, optimizer = streamed(WORLD, 0, config, budget=es.Budget(bytes=6_000))
    other.load_state_dict(state)
    assert other.stopped
    caplog.clear()
    train(model, optimizer, batches(6, 9))
    assert not caplog.records  # said before
    assert other.held_bytes <= 6_000


if __name__ == "__main__":
    resume(Path(sys.argv[1]))
