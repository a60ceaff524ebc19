"""Limits of settings that are numbers, which their class declares beside them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from embsearch_plugin.errors import SettingsError


class Limit(NamedTuple):
    """What a number must be, in words, and whether one is."""

    words: str
    holds: Callable[[float], bool]


Limits = Mapping[str, Limit]
"""By the name of the setting."""


def at_least(least: float) -> Limit:
    """Return the limit of what may be ``least`` or more."""
    return Limit(f"at least {least:g}", lambda value: value >= least)


def above(bound: float) -> Limit:
    """Return the limit of what must be more than ``bound``."""
    return Limit(f"above {bound:g}", lambda value: value > bound)


def share(*, zero: bool = False, one: bool = False) -> Limit:
    """Return the limit of a part of a whole, which may be nothing, or all of it, where it says so."""
    low, high = ("at least" if zero else "above"), ("at most" if one else "below")
    return Limit(f"{low} 0 and {high} 1", lambda value: (0 < value < 1) or (zero and value == 0) or (one and value == 1))


def check_limits(settings: object) -> None:
    """Check the settings of an object by the ``limits`` of its class and of those it derives from.

    Raises:
        SettingsError: where one is broken.
    """
    for ancestor in type(settings).__mro__:
        limits: Limits = vars(ancestor).get("limits", {})
        for name, limit in limits.items():
            value = getattr(settings, name)
            if value is None and getattr(type(settings), name, None) is None:  # left out
                continue
            if value is None or not limit.holds(value):
                raise SettingsError(f"{name} must be {limit.words}; got {value}")
