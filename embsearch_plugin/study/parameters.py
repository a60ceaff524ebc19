"""What a study varies: the fields of a recipe, resolved to parameters of Optuna's, and checked before anything is trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.errors import EmbsearchError, RecipeError, did_you_mean
from embsearch_plugin.plain import to_plain
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.ranges import Choices, Range, Ranges, is_number
from embsearch_plugin.recipes import Recipe, overridden
from embsearch_plugin.study.config import Study

ALGORITHM, BUDGETS = "search.algorithm", "search.budgets"
Kind = Literal["int", "float", "choice", "share", "amount"]


@dataclass(frozen=True)
class Parameter:
    """One thing that a study varies.

    Args:
        name: as Optuna and reports have it, and the recipe under ``study.fields``.
        key: the field of the recipe, with dots.
        values: what may be tried.
        kind: ``share`` and ``amount`` are budgets in per cent, and in bytes or parameters.
        algorithm: it is asked for only where this one is chosen.
    """

    name: str
    key: str
    values: Range | Choices
    kind: Kind
    algorithm: str | None = None

    def plain(self, value: Any) -> Any:
        """Return what the recipe says for a value, one of the ends or of the choices, or what Optuna drew."""
        if self.kind == "choice" and self.key == BUDGETS:
            return [to_plain(value)]
        if self.kind == "share":
            return [f"{value:.4g}%" if is_number(value) else value]
        if self.kind == "amount":
            unit = " params" if Budget.of(self.limits[0]).params else ""
            return [f"{value}{unit}" if is_number(value) else value]
        return to_plain(value)

    @property
    def limits(self) -> tuple[Any, Any]:
        """The ends of a range."""
        assert isinstance(self.values, Range)
        return self.values.ends

    @property
    def tried(self) -> Choices:
        """The choices, or the ends of the range."""
        return self.values.ends if isinstance(self.values, Range) else self.values


def label(choice: Any) -> Any:
    """Return a choice as Optuna keeps it: a plain value as it is, a list or a mapping as YAML on one line."""
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    return yaml.safe_dump(to_plain(choice), default_flow_style=True, width=10_000, sort_keys=False).strip()


def study_of(recipe: Recipe) -> Study:
    """Return the recipe's study.

    Raises:
        RecipeError: where it has none.
    """
    if recipe.study is None:
        raise RecipeError("the recipe must have a section study, which says what is varied.\n  See docs/study.md.")
    return recipe.study


def parameters(recipe: Recipe) -> list[Parameter]:
    """Return what the recipe's study varies, the choice of the algorithm first.

    Raises:
        RecipeError: where fields do not exist, or cannot be varied like that; lists all problems.
    """
    found, problems = list[Parameter](), list[str]()
    for name, values in study_of(recipe).fields.items():
        try:
            found += _resolved(recipe, name, values)
        except RecipeError as error:
            problems.append(f"{str(error).rstrip('.')} @ recipe.study.fields.{name}")
    _raise_any(problems)
    return sorted(found, key=lambda parameter: parameter.key != ALGORITHM)


def check(recipe: Recipe) -> None:
    """Make sure that every choice, and both ends of every range, make a recipe.

    Raises:
        RecipeError: lists all problems.
    """
    varied = parameters(recipe)
    problems = [problem for parameter in varied for problem in _refused(recipe, parameter)]
    if len(recipe.search.budgets) > 1 and not any(parameter.key == BUDGETS for parameter in varied):
        problems.append(
            f"there must be one budget, or {BUDGETS} among the fields that vary; got {list(recipe.search.budgets)} "
            "@ recipe.search.budgets"
        )
    if not recipe.search.strict:
        problems.append("strict must be true in a study, whose trials are compared within budgets @ recipe.search.strict")
    _raise_any(problems)  # what follows needs the algorithms, which may be among them
    possible = {config.name for config in possible_algorithms(recipe)}
    tried = ", ".join(sorted(possible))
    problems += [
        f"{parameter.algorithm} is not among the algorithms that are tried ({tried}) @ recipe.study.fields.{parameter.name}"
        for parameter in varied
        if parameter.algorithm and parameter.algorithm not in possible
    ]
    problems += _wrong_with_layout(recipe, varied)
    _raise_any(problems)


def _wrong_with_layout(recipe: Recipe, varied: list[Parameter]) -> Iterator[str]:
    """Say where the layout does not go with the space, with the fields that vary, or with any algorithm."""
    space, layout, possible = recipe.search.space, study_of(recipe).layout, possible_algorithms(recipe)
    if layout is None:
        return
    if space is not None and space.scope == "global" and layout.groups:
        yield "groups must be empty where the space's scope is global @ recipe.study.layout.groups"
    cuts = {name for name in ("row_blocks", "column_chunks") if getattr(layout, name) is not None}
    drawn = {f"search.space.{name}" for name in ({"groups"} if layout.groups else cuts)}
    yield from (f"the layout draws it, so it is no field @ recipe.study.fields.{p.name}" for p in varied if p.key in drawn)
    used = any((c.cuts_rows and "row_blocks" in cuts) or (c.cuts_columns and "column_chunks" in cuts) for c in possible)
    if not used and not any(parameter.algorithm for parameter in varied):  # an algorithm's field may say whether it cuts
        tried = ", ".join(sorted({config.name for config in possible}))
        yield f"the layout varies nothing: {tried} does not cut tables so; leave it out, or try others @ recipe.study.layout"


def possible_algorithms(recipe: Recipe) -> list[SearchConfig]:
    """Return the algorithms that a trial may be of."""
    choice = next((p for p in parameters(recipe) if p.key == ALGORITHM), None)
    if choice is None:
        return [recipe.search.algorithm]
    bare = replace(recipe, study=None)
    return [overridden(bare, {ALGORITHM: choice.plain(value)}, choice.name).search.algorithm for value in choice.values]  # type: ignore[union-attr]


def _raise_any(problems: list[str]) -> None:
    if problems:
        raise RecipeError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in the study: {'; '.join(problems)}.")


def _resolved(recipe: Recipe, name: str, values: Range | Choices | None) -> Iterator[Parameter]:
    """Return the parameters that one entry of ``fields`` stands for."""
    algorithm, _, rest = name.partition(".")
    if algorithm not in algorithms():
        yield _parameter(recipe, name, name, values, None)
        return
    config = algorithms()[algorithm]()
    if not rest and values is not None:
        raise RecipeError(f"an algorithm by itself stands for all ranges that it declares, so it takes null; got {values!r}")
    for field in [rest] if rest else config.ranges:
        yield _parameter(config, f"{algorithm}.{field}", field, values, algorithm)


def _parameter(root: Any, name: str, path: str, values: Range | Choices | None, algorithm: str | None) -> Parameter:
    if name.startswith(f"{ALGORITHM}."):
        raise RecipeError("an algorithm's field is written NAME.field, as dnis.lr")
    if name == "search.baselines":
        raise RecipeError("a trial has no baselines, so they cannot be varied")
    if algorithm is None and name.split(".", maxsplit=1)[0] not in ("model", "train", "search"):
        raise RecipeError(f"fields of model, train and search can be varied, and of algorithms ({', '.join(algorithms())})")
    declared, hint = _look_up(root, path)
    chosen = values if values is not None else declared.get(path.rpartition(".")[2])
    if chosen is None:
        known = ", ".join(declared) or "none"
        raise RecipeError(f"the field declares no range, so the study must give one, or a list. Declared there: {known}")
    return Parameter(name, f"{ALGORITHM}.{path}" if algorithm else path, chosen, _kind(path, chosen, hint), algorithm)


def _look_up(root: Any, path: str) -> tuple[Ranges, Any]:
    """Return the ranges that a field's owner declares, and the type of the field."""
    owner, hint = root, None
    for part in path.split("."):
        if isinstance(owner, Mapping):
            owner, hint = None, get_args(hint)[1]
            continue
        cls = owner if isinstance(owner, type) else type(owner)
        known = [f.name for f in fields(cls)] if is_dataclass(cls) else []
        if part not in known:
            raise RecipeError(f"there is no field {part!r}.{did_you_mean(part, known)}")
        hint, declared = get_type_hints(cls)[part], getattr(cls, "ranges", {})
        value = None if isinstance(owner, type) else getattr(owner, part)
        owner = next(iter(_dataclasses(hint)), None) if value is None else value
    return declared, hint


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _dataclasses(hint: Any) -> list[type]:
    return [cls for cls in _alternatives(hint) if isinstance(cls, type) and is_dataclass(cls)]


def _kind(path: str, values: Range | Choices, hint: Any) -> Kind:
    if not isinstance(values, Range):
        return "choice"
    if path == BUDGETS:
        return _budget_kind(values)
    if not all(is_number(end) for end in values.ends):
        raise RecipeError(f"the ends must be numbers; got {values.low!r} and {values.high!r}")
    types = _alternatives(hint)
    if float in types:
        return "float"
    if int in types or hint is Any:
        whole = all(isinstance(end, int) for end in values.ends)
        if not whole and hint is not Any:
            raise RecipeError(f"the ends must be whole numbers; got {values.low!r} and {values.high!r}")
        if whole and values.fraction and hint is not Any:
            raise RecipeError(values.fraction)
        return "int" if whole and not values.fraction else "float"
    raise RecipeError("the field is no number, so it takes a list of choices")


def _budget_kind(values: Range) -> Kind:
    try:
        low, high = (Budget.of(end) for end in values.ends)
    except EmbsearchError as error:
        raise RecipeError(str(error)) from error
    if (low.unit, low.share is None) != (high.unit, high.share is None):
        raise RecipeError(f"both ends must be in per cent, in bytes or in parameters; got {low} and {high}")
    if not low.amount < high.amount:
        raise RecipeError(f"the range is {'empty' if low.amount == high.amount else 'inverted'}: got {low} and {high}")
    if low.share is None and values.fraction:
        raise RecipeError(values.fraction)
    return "amount" if low.share is None else "share"


def _refused(recipe: Recipe, parameter: Parameter) -> Iterator[str]:
    """Say what the recipe has against the values of a parameter, each alone."""
    other = parameter.algorithm not in (None, recipe.search.algorithm.name)
    base = {ALGORITHM: parameter.algorithm} if other else {}
    for value in parameter.tried:
        try:
            overridden(replace(recipe, study=None), base | {parameter.key: parameter.plain(value)}, "it")
        except EmbsearchError as error:
            reason = str(error).removeprefix("1 problem in it: ").rstrip(".")
            yield f"{label(value)!r} is refused: {reason} @ recipe.study.fields.{parameter.name}"
