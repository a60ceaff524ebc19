"""Recipes' dataclasses from plain data and back; every problem is listed at once."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import cattrs
from cattrs.gen import make_dict_structure_fn

from embsearch_plugin import data, models
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.data import stream
from embsearch_plugin.data.own import OwnData
from embsearch_plugin.errors import EmbsearchError, RecipeError, did_you_mean
from embsearch_plugin.models.own import OwnModel
from embsearch_plugin.models.stream_mlp import StreamMlp
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.streaming.base import StreamConfig


def structured(content: Mapping[str, Any], cls: Any, source: str) -> Any:
    """Turn plain data into a dataclass of recipes; ``source`` is named in errors.

    Raises:
        RecipeError: where something in it is wrong; lists all problems.
    """
    try:
        return _converter().structure(content, cls)
    except (cattrs.BaseValidationError, cattrs.StructureHandlerNotFoundError) as error:
        problems = [problem.replace("$", "recipe") for problem in cattrs.transform_error(error, format_exception=_message)]
        raise RecipeError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {source}: {'; '.join(problems)}.") from error
    except EmbsearchError as error:
        raise RecipeError(f"1 problem in {source}: {error}") from error


def to_plain(value: Any) -> Any:
    """Return a dataclass as plain data, every default written out; :func:`structured` reads it back."""
    if is_dataclass(value):
        name = getattr(value, "name", None)
        named = {} if name is None else {"name": name}
        return named | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for primitive in (int, float, bool, str):
        converter.register_structure_hook(primitive, _strictly)
    converter.register_structure_hook_func(_is_tuple, _list_only(converter.get_structure_hook(tuple[int, ...])))
    converter.register_structure_hook_func(_is_literal, _one_of_the_named)
    converter.register_structure_hook_func(_is_union, lambda value, union: _one_of(converter, value, union))
    for base, known, own in (
        (data.DataConfig, lambda: {c.name: c for c in data.CONFIGS}, OwnData),
        (stream.StreamData, lambda: {c.name: c for c in stream.CONFIGS}, None),
        (StreamMlp, lambda: {StreamMlp.name: StreamMlp}, None),
        (models.ModelConfig, lambda: {c.name: c for c in models.CONFIGS}, OwnModel),
        (SearchConfig, algorithms, None),
        (StreamConfig, algorithms, None),
    ):
        converter.register_structure_hook_func(_is(base), _by_name(converter, known, own))
    return converter


def _is(wanted: object) -> Callable[[object], bool]:
    return lambda cls: cls is wanted or cls == wanted


def _is_union(cls: object) -> bool:
    return get_origin(cls) in (Union, UnionType)


def _is_literal(cls: object) -> bool:
    origin: object = get_origin(cls)
    return origin is Literal


def _is_tuple(cls: object) -> bool:
    return get_origin(cls) is tuple


def _list_only(structure: Callable[[Any, Any], Any]) -> Callable[[object, object], object]:
    """Refuse a text where a list is expected: it would be taken for a list of its letters."""

    def checked(value: object, cls: object) -> object:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {value!r}")
        return structure(value, cls)

    return checked


def _strictly(value: object, cls: type) -> object:
    """Take no value for another type's: ``bool("no")`` would be true.

    For a float, an int will do, and ``1e-3``, which YAML takes for a text because it has no point.
    """
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if cls is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE):
        return float(value)
    if type(value) is not cls:
        raise TypeError(f"expected {cls.__name__}, got {value!r}")
    return value


def _one_of_the_named(value: object, literal: object) -> object:
    if value not in get_args(literal):
        raise ValueError(f"unknown value {value!r}.{did_you_mean(str(value), get_args(literal))}")
    return value


def _one_of(converter: cattrs.Converter, value: object, union: object) -> object:
    """Structure a value of a union of at most one tuple, plain types and None; its YAML form tells which."""
    options = [cls for cls in get_args(union) if cls is not type(None)]
    if value is None and len(options) < len(get_args(union)):
        return None
    fitting = [cls for cls in options if (get_origin(cls) is tuple) == isinstance(value, list)]
    chosen = next((cls for cls in fitting if cls is type(value)), (fitting or options)[0])
    if is_dataclass(chosen) and not isinstance(value, dict):
        or_list = " or a list" * (len(options) > len([cls for cls in options if get_origin(cls) is not tuple]))
        raise TypeError(f"expected a mapping with {', '.join(f.name for f in fields(chosen))}{or_list}, got {value!r}")
    return converter.structure(value, chosen)


def _by_name(
    converter: cattrs.Converter, known: Callable[[], Mapping[str, type]], own: type | None
) -> Callable[[object, object], object]:
    """Structure a config by its name; ``own`` is that of a name such as ``package.module:function``."""

    def structure(value: object, _: object) -> object:
        given = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
        name = given.pop("name", None)
        if own is not None and isinstance(name, str) and ":" in name:
            return make_dict_structure_fn(own, converter, _cattrs_forbid_extra_keys=True)(given | {"name": name}, own)
        if name not in known():
            raise ValueError(f"unknown name {name!r}.{did_you_mean(str(name), known())}".rstrip("."))
        cls = known()[name]
        return make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)(given, cls)

    return structure


def _message(error: BaseException, cls: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [f.name for f in fields(error.cl)]
        return "; ".join(f"extra field {key!r}.{did_you_mean(key, known)}".rstrip(".") for key in sorted(error.extra_fields))
    if isinstance(error, KeyError):
        return f"required field {error.args[0]!r} is missing"
    return str(error).rstrip(".")
