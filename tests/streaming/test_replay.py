"""Batches of the past, for a loop of one's own."""

from collections import Counter

import pytest
import torch
from support import PLAIN, STREAMING, task

import embsearch_plugin as es


def test_batches_come_as_they_are_and_only_what_came_is_remembered() -> None:
    stream = es.Replay(range(100), capacity=5, seed=1)
    assert not list(stream.past)
    for number, batch in enumerate(stream):
        assert batch == number
        drawn = [each for _ in range(30) for each in stream.past]
        assert set(drawn) <= set(range(number))
        assert len(set(drawn)) <= 5
        if 0 < number <= 4:
            assert set(drawn) == set(range(number))
    assert len({each for _ in range(100) for each in stream.past}) == 5


def test_every_batch_so_far_is_as_likely() -> None:
    drawn = Counter()
    for seed in range(400):
        stream = es.Replay(range(20), capacity=4, seed=seed)
        for _ in stream:
            pass
        drawn.update(each for _ in range(5) for each in stream.past)
    assert set(drawn) == set(range(20))
    assert min(drawn.values()) > 50 and max(drawn.values()) < 160  # 100 on the average


def test_a_capacity_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        es.Replay([], capacity=0)


def test_a_search_step_waits_until_something_is_past() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Esapn(**STREAMING["esapn"]))
    optimizer = torch.optim.Adam(model.parameters())
    stream = es.Replay([PLAIN.batch(seed=i) for i in range(6)], capacity=3)
    session.attach(optimizer, validation=stream.past)
    for batch in stream:
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    assert session.search_steps == 5
