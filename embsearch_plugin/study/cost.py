"""What a study costs, in plain training runs: how often the dense model could be trained for it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.cells import DENSE
from embsearch_plugin.errors import RecipeError
from embsearch_plugin.recipes import Recipe, overridden
from embsearch_plugin.study.parameters import BUDGETS, Parameter, parameters, possible_algorithms, study_of

LONG = 100  # epochs of a dense training, to see which part of them a fine-tuning takes at most


@dataclass(frozen=True)
class Estimate:
    """A ceiling, in plain training runs, where no stage takes longer than training the dense model.

    Args:
        once: the dense model, and what all trials share.
        each: a trial.
        baselines: of the report.
        trials: how many.
    """

    once: float
    each: float
    baselines: float
    trials: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.once + self.trials * self.each + self.baselines

    def __str__(self) -> str:
        return (
            f"{self.trials} trials cost at most {self.total:.3g} plain training runs ({self.once:.3g} for what all share, "
            f"{self.each:.3g} for each trial, {self.baselines:.3g} for the baselines), if no search takes longer than one. "
            "Trained models that trials share are trained once, and pruning saves more."
        )


def estimate(recipe: Recipe, trials: int) -> Estimate:
    """Return what a study of so many trials costs at most."""
    varied, study, seeds = parameters(recipe), study_of(recipe), len(recipe.seeds)
    only_budget = all(parameter.key == BUDGETS for parameter in varied) and study.layout is None
    own_dense = any(parameter.key.split(".")[0] in ("model", "train") for parameter in varied)
    possible = [each for config in possible_algorithms(recipe) for each in _settings_of(config, recipe, varied)]
    shared = only_budget and any(_serves_every_budget(config) for config in possible)
    each = max(
        _last_stage(config)
        + (config.trains and not (only_budget and _serves_every_budget(config)))
        + (own_dense and config.starts_from == "dense")
        for config in possible
    )
    compared = sum(_last_stage(config) + config.trains for config in recipe.search.baselines)
    return Estimate(seeds * (1.0 + shared), seeds * each, compared * len(recipe.search.budgets), trials)


def _settings_of(config: SearchConfig, recipe: Recipe, varied: list[Parameter]) -> Iterator[SearchConfig]:
    """Yield an algorithm with its settings, and with each choice and each end of a range that is tried for one of them."""
    yield config
    base = replace(recipe, study=None, search=replace(recipe.search, algorithm=config))
    for parameter in varied:
        for value in parameter.tried if parameter.algorithm == config.name else ():
            with suppress(RecipeError):  # a value that does not go with the other settings makes no trial
                yield overridden(base, {parameter.key: parameter.plain(value)}, "it").search.algorithm


def _serves_every_budget(config: SearchConfig) -> bool:
    return config.trains and not config.searches_within_budget


def _last_stage(config: SearchConfig) -> float:
    """Return what training the compact model takes at most."""
    limit = config.fine_tuning_epochs(LONG) if config.starts_from == DENSE else None
    return 1.0 if limit is None else min(limit / LONG, 1.0)
