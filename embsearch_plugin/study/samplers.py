"""Samplers and pruners, which are Optuna's own, by the name of their class."""

import inspect
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning

from embsearch_plugin.errors import RecipeError, did_you_mean
from embsearch_plugin.study.config import DEFAULT_PRUNER, Study


def sampler_of(study: Study) -> optuna.samplers.BaseSampler:
    """Return the study's sampler.

    Raises:
        RecipeError: where Optuna has none of that name, or it does not take the arguments.
    """
    sampler: optuna.samplers.BaseSampler = _built(study.sampler, optuna.samplers, "sampler")
    return sampler


def pruner_of(study: Study) -> optuna.pruners.BasePruner:
    """Return the study's pruner; one that never prunes where there are several objectives.

    Raises:
        RecipeError: as :func:`sampler_of`.
    """
    default = DEFAULT_PRUNER if len(study.objectives) == 1 else {"name": "NopPruner"}
    pruner: optuna.pruners.BasePruner = _built(study.pruner or default, optuna.pruners, "pruner")
    return pruner


def _built(given: Mapping[str, Any], home: ModuleType, field: str) -> Any:
    """Build a class of ``home`` by its name and arguments; an argument with a name is built likewise."""
    arguments = {
        key: _built(value, home, field) if isinstance(value, Mapping) and "name" in value else value
        for key, value in given.items()
        if key != "name"
    }
    known = [name for name in home.__all__ if inspect.isclass(getattr(home, name)) and not name.startswith("Base")]
    if given["name"] not in known:
        wrong = f"Optuna has no {field} {given['name']!r}"
        raise RecipeError(f"{wrong}.{did_you_mean(given['name'], known)} @ recipe.study.{field}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return getattr(home, given["name"])(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"{given['name']} cannot be made with {arguments}: {error} @ recipe.study.{field}") from error
