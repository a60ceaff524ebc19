"""Drawing a trial's recipe: values for the fields that vary, and a layout of the tables."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import optuna

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.errors import RecipeError
from embsearch_plugin.ranges import Range
from embsearch_plugin.recipes import Recipe, overridden
from embsearch_plugin.study.config import Layout
from embsearch_plugin.study.parameters import Parameter, label, parameters, study_of

REASON = "reason"


def suggest(trial: optuna.trial.BaseTrial, recipe: Recipe) -> Recipe:
    """Return the recipe of a trial: the recipe with what its study varies drawn by Optuna, and without the study.

    Parameters that a choice makes meaningless are not asked for: those of other algorithms, growths of blocks that are not
    there, a layout that the algorithm does not use.

    Args:
        trial: Optuna's.
        recipe: as :func:`embsearch_plugin.recipes.load_recipe` reads it, with a section ``study``.

    Raises:
        optuna.TrialPruned: where the values do not go together; says why, as does the trial's user attribute ``reason``.
        RecipeError: where the recipe has no study, or the study varies what does not exist.
    """
    bare, study, varied = replace(recipe, study=None), study_of(recipe), parameters(recipe)
    try:
        for parameter in varied:
            if parameter.algorithm in (None, bare.search.algorithm.name):
                bare = overridden(bare, {parameter.key: drawn(trial, parameter)}, f"trial {trial.number}")
        if study.layout is not None:
            bare = overridden(bare, laid_out(trial, study.layout, bare.search.algorithm), f"trial {trial.number}")
    except RecipeError as error:
        prune(trial, str(error), error)
    return bare


def prune(trial: optuna.trial.BaseTrial, reason: str, cause: Exception | None = None) -> None:
    """End a trial as pruned, and keep the reason with it."""
    reason = " ".join(reason.split())
    trial.set_user_attr(REASON, reason)
    raise optuna.TrialPruned(reason) from cause


def drawn(trial: optuna.trial.BaseTrial, parameter: Parameter) -> Any:
    """Let Optuna draw a parameter; return the value as the recipe writes it."""
    if not isinstance(parameter.values, Range):
        by_label = {label(choice): choice for choice in parameter.values}
        return parameter.plain(by_label[trial.suggest_categorical(parameter.name, list(by_label))])
    return parameter.plain(_number(trial, parameter.name, *_ends(parameter), parameter.values))


def _ends(parameter: Parameter) -> tuple[float, float]:
    if parameter.kind in ("share", "amount"):
        low, high = (Budget.of(end).amount for end in parameter.limits)
        return (float(100 * low), float(100 * high)) if parameter.kind == "share" else (int(low), int(high))
    return parameter.limits if parameter.kind == "int" else (float(parameter.limits[0]), float(parameter.limits[1]))


def _number(trial: optuna.trial.BaseTrial, name: str, low: float, high: float, values: Range) -> float:
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=values.log, step=int(values.step or 1))
    return trial.suggest_float(name, low, high, log=values.log, step=values.step)


def laid_out(trial: optuna.trial.BaseTrial, layout: Layout, algorithm: SearchConfig) -> dict[str, Any]:
    """Draw how tables are cut, for all of them or for each group; return what the recipe says of it."""
    if not layout.groups:
        return {f"search.space.{name}": value for name, value in _cuts(trial, layout, algorithm, "")}
    groups = [
        {"tables": list(tables), **dict(_cuts(trial, layout, algorithm, f"{group}."))}
        for group, tables in layout.groups.items()
    ]
    return {"search.space.groups": groups} if algorithm.cuts_rows or algorithm.cuts_columns else {}


def _cuts(trial: optuna.trial.BaseTrial, layout: Layout, algorithm: SearchConfig, group: str) -> Iterator[tuple[str, Any]]:
    if layout.row_blocks is not None and algorithm.cuts_rows:
        yield "row_blocks", _shares(trial, f"{group}row_blocks", layout.row_blocks, f"{group}row_growth", layout.row_growth)
    if layout.column_chunks is not None and algorithm.cuts_columns:
        name, growth = f"{group}column_chunks", f"{group}column_growth"
        yield "column_chunks", _shares(trial, name, layout.column_chunks, growth, layout.column_growth)


def _shares(trial: optuna.trial.BaseTrial, name: str, counts: Range, growth_name: str, growth: Range) -> list[float]:
    """Draw a number of parts, and how many times as large each is as the one before; return their shares of the whole."""
    count = int(_number(trial, name, counts.low, counts.high, counts))
    low, high = float(growth.low), float(growth.high)
    growths = [_number(trial, f"{growth_name}_{part}", low, high, growth) for part in range(1, count)]
    return shares(growths)


def shares(growths: list[float]) -> list[float]:
    """Return shares that sum to one, of which each is ``growths`` times as large as the one before: (n - 1,) to (n,)."""
    sizes = list(accumulate([1.0, *growths], mul))
    return [float(f"{size / sum(sizes):.7g}") for size in sizes]
