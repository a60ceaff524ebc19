"""Recipes as files: YAML, what a recipe extends, and overrides. All of it is plain data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from embsearch_plugin.errors import RecipeError

VARIED = ["study", "fields"]


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe's plain data, with what it extends, and with overrides.

    Raises:
        RecipeError: where a file cannot be read, is not YAML or no mapping, or an override is wrong.
    """
    content = _read(Path(path), ())
    for override in overrides:
        put(content, *_parsed(override))
    return content


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Read a recipe and all that it extends; ``readers`` are the recipes that led here."""
    if path.resolve() in readers:
        raise RecipeError(f"{path} extends itself, by way of {', '.join(reader.name for reader in readers)}.")
    content = _content(path)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"extends must be the path of a recipe; got {base!r} in {path}.")
    return _merged(_read(path.parent / base, (*readers, path.resolve())), content)


def _merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with another's changes. What stays keeps its place: a table is in the first group that matches."""
    merged = dict(base)
    for key, value in other.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merged(old, value)
        elif value is None and key in base:
            del merged[key]
        else:
            merged[key] = value
    return merged


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}. Recipes end in .yaml.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping with data, model and search; got {type(content).__name__}.")
    return content


def _parsed(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override is key=value, such as train.epochs=3; got {override!r}.")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of the override {override!r} is not YAML: {error}") from error


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a value of a recipe as plain data, by its key with dots.

    Raises:
        RecipeError: where the key leads into something that holds no fields.
    """
    *parents, last = key.split(".")
    if parents[:2] == VARIED:  # names of fields, which have dots themselves
        parents, last = VARIED, key.split(".", 2)[2]
    for parent in parents:
        inner = content.setdefault(parent, {})
        if inner is None:
            inner = content[parent] = {}
        if isinstance(inner, str):  # `algorithm: dnis` is short for `algorithm: {name: dnis}`
            inner = content[parent] = {"name": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"the override of {key!r} goes into {parent!r}, which is {inner!r} and holds no fields.")
        content = inner
    content[last] = value
