"""What counts as a step of the loop, in a search and on a stream."""

from typing import Any

import pytest
import torch
from support import PLAIN, STREAMING, Task, Told, task, train
from torch import nn

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError

SESSIONS: dict[str, Any] = {"search": es.Dnis(warm_up=1), "stream": es.Darts(**STREAMING["darts"])}
either = pytest.mark.parametrize("kind", SESSIONS)


class Twice(torch.optim.SGD):
    """Its step calls its parent's, and both fire torch's hook once torch has hooked the parent's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def prepared(kind: str, *optimizers: type[torch.optim.Optimizer]) -> tuple[Task, Any, list[Any]]:
    """Return a model, its session, and an optimizer of its own for each part of it, all of them attached."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    model = task(PLAIN)
    session = es.prepare(model, algorithm=SESSIONS[kind])
    parts = [model.over, model.collection]
    made = [build(part.parameters(), lr=0.1) for build, part in zip(optimizers, parts, strict=False)]  # type: ignore[call-arg]
    session.attach(made, validation=[PLAIN.batch(seed=9)])
    return model, session, made


@either
def test_several_optimizers_make_one_step(kind: str) -> None:
    model, session, (first, last) = prepared(kind, torch.optim.SGD, torch.optim.Adam)
    for steps in range(1, 4):
        model(PLAIN.batch())[0].backward()
        last.step()
        assert session.search_steps == session.step_count == steps - 1
        first.step()
        assert session.search_steps == session.step_count == steps


@either
def test_a_step_that_calls_its_parents_step_is_one_step(kind: str) -> None:
    model, session, (optimizer,) = prepared(kind, Twice)
    train(model, optimizer, [PLAIN.batch(seed=seed) for seed in range(5)])
    assert session.search_steps == session.step_count == 5


@either
def test_so_is_one_of_several(kind: str) -> None:
    model, session, (first, last) = prepared(kind, torch.optim.SGD, Twice)
    counts = []
    for _ in range(4):
        model(PLAIN.batch())[0].backward()
        first.step()
        counts.append(session.step_count)
        last.step()
        counts.append(session.step_count)
    assert counts == [0, 1, 1, 2, 2, 3, 3, 4]


def test_steps_by_hand_follow_the_loops() -> None:
    """The schedule of an algorithm goes by the loop's steps, and gates are drawn for each of them, whoever steps."""
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.AutoDim(candidates=(2, 4), every=1))
    told = Told()
    session.register(told)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(seed=9)])
    session.detach()
    for step in range(4):
        optimizer.zero_grad()
        looked_up = model.collection(PLAIN.batch(seed=step).sparse_features)  # a part of the model, not the model itself
        looked_up.values().sum().backward()
        optimizer.step()
        session.step(PLAIN.batch(seed=9))
    session.step(PLAIN.batch(seed=9))
    assert session.step_count == 4 and session.search_steps == 5
    assert told.steps == [0, 1, 2, 3]


def test_a_batch_by_hand_that_is_too_small_is_tried_once() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), [PLAIN.batch()])
    with pytest.raises(AttachError, match="at least 2 examples; this one is smaller"):
        session.step(PLAIN.batch(1))
