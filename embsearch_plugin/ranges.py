"""Ranges of settings: what a study may try for a field of a recipe. Plain data, as YAML writes it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from embsearch_plugin.errors import SettingsError

Bound = int | float | str
"""A number, or a budget's text."""


@dataclass(frozen=True)
class Range:
    """Everything from one value to another.

    Args:
        low: the least, a number or a budget as text ("5%").
        high: the largest, of the same kind.
        log: whether small and large values are tried alike; not with a step.
        step: only the least value and whole steps from it; of integers it is whole, by default 1.
    """

    low: Any
    high: Any
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, _number(getattr(self, name)))
        for problem in self._problems():
            raise SettingsError(problem)

    def _problems(self) -> list[str]:
        problems = []
        if not all(isinstance(end, int | float | str) and not isinstance(end, bool) for end in self.ends):
            problems.append(f"low and high must be numbers, or budgets as text; got {self.low!r} and {self.high!r}")
        elif isinstance(self.low, str) != isinstance(self.high, str):
            problems.append(f"low and high must be both numbers or both texts; got {self.low!r} and {self.high!r}")
        elif not isinstance(self.low, str):
            problems += self._disorder(self.low, self.high)
        if self.step is not None and (not self.step > 0 or self.log):
            problems.append(f"step must be above 0, and null with log; got {self.step:g}")
        return problems

    def _disorder(self, low: float, high: float) -> list[str]:
        if not (math.isfinite(low) and math.isfinite(high)):
            return [f"low and high must be finite; got {low:g} and {high:g}"]
        if not low < high:
            kind = "empty" if low == high else "inverted"
            return [f"the range is {kind}: low must be below high; got {low:g} and {high:g}"]
        if self.step is not None and self.step > high - low:
            return [f"step must be at most high - low; got {self.step:g} from {low:g} to {high:g}"]
        return [f"low must be above 0 with log; got {low:g}"] if self.log and low <= 0 else []

    @property
    def ends(self) -> tuple[Any, Any]:
        """The least and the largest value."""
        return self.low, self.high

    @property
    def fraction(self) -> str | None:
        """What is wrong with the step, if the values are to be integers; None where nothing is."""
        return f"step must be a whole number; got {self.step:g}" if self.step is not None and self.step % 1 else None


Choices = tuple[Any, ...]
Ranges = Mapping[str, Range | Choices]
"""By the name of a field, what may be tried for it."""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """YAML takes ``1e-3`` for a text, because it has no point."""
    return (
        float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE) else value
    )
