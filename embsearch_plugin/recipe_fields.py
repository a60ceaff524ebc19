"""Every field of a recipe, from the code itself: ``python -m embsearch_plugin.recipe_fields`` prints ``docs/recipes.md``."""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from embsearch_plugin import data, models
from embsearch_plugin.algorithms.base import AlgorithmConfig, SearchConfig
from embsearch_plugin.data import stream
from embsearch_plugin.data.own import OwnData
from embsearch_plugin.models.own import OwnModel
from embsearch_plugin.models.stream_mlp import StreamMlp
from embsearch_plugin.plain import to_plain
from embsearch_plugin.plugins import BUILTIN, algorithms
from embsearch_plugin.ranges import Choices, Range
from embsearch_plugin.recipes import Fused, Recipe, Search, Train, Tune
from embsearch_plugin.space import SearchSpace, TableGroup
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.streaming.recipe import StreamRecipe, StreamSearch, StreamTrain
from embsearch_plugin.study.config import Layout, Study

HEAD = """# Recipes, field by field

This page is printed by `python -m embsearch_plugin.recipe_fields` from the code itself.

A recipe is YAML. It is read as a whole, and all problems are listed together, each with its path and its value. `key=value`
after a recipe on the command line overrides a field (`train.epochs=3`). What has a `name` may be written as that name alone
(`model: dlrm`), or as a mapping with its settings (`model: {name: dlrm, embedding_dim: 16}`).

`extends: OTHER.yaml`, a path from the recipe's own folder, takes everything from another recipe and says only what differs:
mappings are merged, unless their names differ; null takes back what the other recipe says, and where that says nothing it is
null.
"""

SECTIONS: tuple[tuple[str, str, type], ...] = (
    ("The recipe", "", Recipe),
    ("Search", "search", Search),
    ("Space", "search.space", SearchSpace),
    ("Groups of tables", "search.space.groups", TableGroup),
    ("Training", "train", Train),
    ("Fused tables", "train.fused", Fused),
    ("Tuning of a run", "tune", Tune),
    ("Study", "study", Study),
    ("Layouts", "study.layout", Layout),
    ("A range", "study.fields.NAME", Range),
    ("A recipe of a stream", "", StreamRecipe),
    ("Search on a stream", "search", StreamSearch),
    ("Training on a stream", "train", StreamTrain),
)


def markdown() -> str:
    """Return the page."""
    own = [cls for cls in algorithms().values() if cls.__module__ in BUILTIN]
    parts = [HEAD, *(_section(title, f"`{path}`" if path else "", cls) for title, path, cls in SECTIONS)]
    for title, path, classes in (
        ("Algorithms", "search.algorithm", sorted(own, key=lambda cls: cls.name)),
        ("Models", "model", [*models.CONFIGS, OwnModel]),
        ("The model of a stream", "model", [StreamMlp]),
        ("Data", "data", [*data.CONFIGS, OwnData]),
        ("Streams", "data", [*stream.CONFIGS]),
    ):
        parts.append(f"## {title}\n\nUnder `{path}`.\n")
        parts += [_section(getattr(cls, "name", "package.module:function"), "", cls, "###") for cls in classes]
    return "\n".join(parts)


def _section(title: str, path: str, cls: type, level: str = "##") -> str:
    described = described_fields(cls)
    rows = [_row(cls, field, described[field.name]) for field in fields(cls)]
    under = f"Under {path}. " if path else ""
    head = f"{level} {title}\n\n{under}{_first_paragraph(cls)}\n"
    table = ["| field | values | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([head, *table, ""])


def described_fields(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each field, under ``Args:``."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        found |= _arguments(inspect.cleandoc(each.__doc__ or ""))
    return found


def _arguments(doc: str) -> dict[str, str]:
    block = re.search(r"^Args:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", block[1], re.MULTILINE) if block else []
    return {name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")}


def _first_paragraph(cls: type) -> str:
    return _plain(" ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()))


def _plain(text: str) -> str:
    """Turn reStructuredText into Markdown."""
    text = re.sub(r":\w+:`~?([^`]*)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`").replace("|", "\\|")


def _row(cls: type, field: Field[Any], text: str) -> str:
    hint = get_type_hints(cls)[field.name]
    declared = getattr(cls, "ranges", {}).get(field.name)
    studied = f" Range in a study: {_range(declared)}." if declared is not None else ""
    return f"| `{field.name}` | {_values(hint)} | {_default(field)} | {_plain(text)}{studied} |"


def _default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if is_dataclass(value) and not isinstance(value, Range):
        return "its defaults"
    if isinstance(value, tuple) and all(isinstance(each, AlgorithmConfig) for each in value) and value:
        value = tuple(each.name for each in value)
    return "required" if value is MISSING else f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """Return plain data as YAML on one line."""
    return yaml.safe_dump(to_plain(value), default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()


def _range(declared: Range | Choices) -> str:
    if isinstance(declared, Range):
        return f"{declared.low:g} to {declared.high:g}{', by magnitude' if declared.log else ''}"
    return " or ".join(f"`{_flow(choice)}`" for choice in declared)


_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Any: "any",
}


def _values(hint: Any) -> str:
    """Say in words what a field takes."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (data.DataConfig, models.ModelConfig, SearchConfig, StreamConfig, stream.StreamData, StreamMlp):
        return "a name, or a mapping"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_values(each) for each in inner))
    if origin is tuple:
        return f"list of {_values(inner[0])}"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping to {_values(inner[1])}"
    titles = {cls: f"a mapping ({title})" for title, _, cls in SECTIONS}
    return (titles | _NAMES).get(hint, "function")


if __name__ == "__main__":
    sys.stdout.write(markdown())
