"""Fronts, knees and hypervolumes, against slow references."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embsearch_plugin.study.compare import Outcome, compared, summary
from embsearch_plugin.study.front import front, hypervolume, knee

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(POINTS)
def test_nothing_is_better_than_a_point_of_the_front(points: list[tuple[int, int]]) -> None:
    chosen = front(points, (1, -1))
    for place, (quality, size) in enumerate(points):
        beaten = any(q >= quality and s <= size and (q, s) != (quality, size) for q, s in points)
        assert (place in chosen) == (not beaten)


@given(POINTS)
def test_the_hypervolume_is_the_area_that_is_dominated(points: list[tuple[int, int]]) -> None:
    squares = product(range(2, 10), range(1, 8))  # squares of side one between the worst corner (2, 8) and the best one
    area = sum(any(q >= x + 1 and s <= y for q, s in points) for x, y in squares)
    assert hypervolume(points, (2, 8)) == area


def test_the_knee_is_nearest_to_the_best_of_everything() -> None:
    points = [(0.70, 1e2), (0.79, 1e3), (0.80, 1e6)]
    assert knee(points, (1, -1)) == 1
    assert knee([(0.5, 7.0)], (1, -1)) == 0
    assert knee([(0.5,), (0.7,)], (1,)) == 1
    assert knee([(0.5,), (0.4,)], (-1,)) == 1
    assert knee([(0.7, 0.0), (0.8, 10.0), (0.71, 9.0)], (1, -1)) in (0, 1)  # nothing has no logarithm


def test_two_studies_are_compared_by_their_fronts() -> None:
    ours = Outcome([(0.8, 50.0), (0.7, 10.0)], (0.8, 100.0), 4, 2.9)
    assert [ours.within(share) for share in (0.05, 0.1, 0.4, 0.5)] == [None, 0.7, 0.7, 0.8]
    theirs = Outcome([(0.75, 50.0), (0.6, 10.0)], (0.8, 100.0), 5, 3.1)
    found = compared(ours, theirs)
    assert found["hypervolumes"] == pytest.approx([0.2 * 50 + 0.1 * 40, 0.15 * 50])
    assert found["ratio"] == pytest.approx(14 / 7.5)
    assert found["bytes_needed"] == [50.0, None]
    assert "1.867 ± 0.000. Bytes to be within 0.001 of the dense model: 50 B and more than any; 50 B" in summary([found] * 2)
