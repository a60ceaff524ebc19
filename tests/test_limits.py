"""Limits of settings: declared beside them, and the one that is broken is named."""

import re
from dataclasses import fields
from typing import ClassVar

import pytest

from embsearch_plugin.errors import SettingsError
from embsearch_plugin.limits import Limit, Limits, above, at_least, check_limits, share
from embsearch_plugin.plugins import algorithms


@pytest.mark.parametrize(
    ("limit", "inside", "outside", "words"),
    [
        (at_least(1), [1, 2.5], [0, 0.99], "at least 1"),
        (above(0), [1e-9, 3], [0, -1], "above 0"),
        (share(), [0.5], [0, 1, 2], "above 0 and below 1"),
        (share(one=True), [0.5, 1], [0, 1.1], "above 0 and at most 1"),
        (share(zero=True), [0, 0.5], [-0.1, 1], "at least 0 and below 1"),
    ],
)
def test_a_limit_says_what_it_holds(limit: Limit, inside: list[float], outside: list[float], words: str) -> None:
    assert all(limit.holds(value) for value in inside) and not any(limit.holds(value) for value in outside)
    assert limit.words == words


def test_limits_of_a_class_and_of_what_it_derives_from_are_checked() -> None:
    class Base:
        limits: ClassVar[Limits] = {"a": at_least(1)}
        a: float | None = None

    class Derived(Base):
        limits: ClassVar[Limits] = {"b": above(0)}
        b: float | None = 1

    settings = Derived()
    check_limits(settings)
    settings.a = None  # left out
    check_limits(settings)
    settings.a = 0
    with pytest.raises(SettingsError, match=r"^a must be at least 1; got 0$"):
        check_limits(settings)
    settings.a, settings.b = 1, 0
    with pytest.raises(SettingsError, match=r"^b must be above 0; got 0$"):
        check_limits(settings)
    settings.b = None  # its default says that it may not be left out
    with pytest.raises(SettingsError, match=r"^b must be above 0; got None$"):
        check_limits(settings)


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_every_setting_that_is_a_number_has_a_limit_that_is_checked(name: str) -> None:
    config = algorithms()[name]
    limits = {key: limit for ancestor in config.__mro__ for key, limit in vars(ancestor).get("limits", {}).items()}
    numbers = {field.name for field in fields(config) if re.fullmatch(r"(int|float)( \| None)?", str(field.type))} | {
        field.name for field in fields(config) if field.type in (int, float, int | None, float | None)
    }
    assert numbers - CHECKED_BY_HAND <= limits.keys()
    for key in limits:
        with pytest.raises(SettingsError, match=rf"^{key} must be .*; got -1$"):
            config(**{key: -1})


CHECKED_BY_HAND = {"temperature", "blocks"}  # of mixed dimensions, each with its grid
