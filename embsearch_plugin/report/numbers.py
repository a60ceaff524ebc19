"""Numbers as people read them."""

from dataclasses import dataclass
from statistics import fmean, stdev

from embsearch_plugin.report.inputs import Number

__all__ = ["DIGITS", "TIMES", "UNDEFINED", "Estimate", "dim_text", "measure", "percent", "ratio"]

DIGITS = 4  # of a metric
UNDEFINED = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its spread, the sample standard deviation (None for one seed), rounded as they are printed.

    All comparisons are of these rounded figures, so that no sentence disagrees with what a table shows.
    """

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: list[Number]) -> "Estimate | None":
        """Return the estimate from a value per seed, or None if there is none or one of them is undefined."""
        known = [value for value in values if value is not None]
        return cls.over(known) if known and len(known) == len(values) else None

    @classmethod
    def over(cls, values: list[float]) -> "Estimate":
        """Return the estimate from a value per seed, at least one."""
        return cls(round(fmean(values), DIGITS), round(stdev(values), DIGITS) if len(values) > 1 else None)

    def __str__(self) -> str:
        return measure(self.mean) + ("" if self.spread is None else f" ± {measure(self.spread)}")


def measure(value: float) -> str:
    """Return a metric, or a difference of two: ``0.8034``."""
    return f"{value:.{DIGITS}f}"


def percent(part: float, whole: float) -> str:
    """Return ``part`` of ``whole`` as a percentage, or a dash if there is no whole."""
    return f"{part / whole:.1%}" if whole else UNDEFINED


def ratio(value: Number, reference: Number) -> str:
    """Return how many times ``reference`` the value is, or a dash if either is unknown."""
    return f"{value / reference:.2f}{TIMES}" if value is not None and reference else UNDEFINED


def dim_text(dim: float) -> str:
    """Return a dim, or the mean of several: ``16``, ``7.4``, ``0.03``."""
    return f"{round(dim, 1 if dim >= 1 else 2):g}"
