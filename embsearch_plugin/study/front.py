"""Pareto fronts of plain numbers: what is on it, its knee, and its hypervolume."""

import math
from collections.abc import Sequence

Point = Sequence[float]
"""Values of the objectives."""


def front(points: Sequence[Point], signs: Sequence[int]) -> list[int]:
    """Return which points no other is better than, or equal to one and better in another; of equal ones, all.

    Args:
        points: the points.
        signs: per objective 1 where more is better, else -1.
    """
    better = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    return [n for n, one in enumerate(better) if not any(_dominates(other, one) for other in better)]


def _dominates(one: Point, other: Point) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def knee(points: Sequence[Point], signs: Sequence[int]) -> int:
    """Return the point of a front that is nearest to having the best of everything.

    Each objective is scaled to [0, 1] over the front, from its best to its worst; where less is better (bytes, microseconds)
    its logarithm is, since a front spans orders of magnitude. The nearest by Euclidean distance to the corner of all bests
    is the knee; of equally near ones the first.
    """
    scaled = [_scaled([point[k] for point in points], sign) for k, sign in enumerate(signs)]
    distances = [math.hypot(*(column[n] for column in scaled)) for n in range(len(points))]
    return min(range(len(points)), key=distances.__getitem__)


def _scaled(values: Sequence[float], sign: int) -> list[float]:
    """Return how far each value is from the best one: 0 for that, 1 for the worst."""
    logarithmic = sign < 0 and min(values) > 0
    placed = [-sign * (math.log(value) if logarithmic else value) for value in values]
    span = max(placed) - min(placed)
    return [(value - min(placed)) / span if span else 0.0 for value in placed]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area that points dominate, where more of the first value is better and less of the second.

    Args:
        points: (quality, size).
        reference: the corner of the worst; what is worse than it does not count.
    """
    area, best = 0.0, reference[0]
    for quality, size in sorted(points, key=lambda point: (point[1], -point[0])):
        if quality > best and size < reference[1]:
            area += (quality - best) * (reference[1] - size)
            best = quality
    return area
