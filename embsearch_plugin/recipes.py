"""Recipes: a run in YAML, read as a whole, with every problem listed at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.optim import SGD, Adagrad, Adam, Optimizer

from embsearch_plugin import data, models
from embsearch_plugin.algorithms.base import AlgorithmConfig, SearchConfig
from embsearch_plugin.algorithms.magnitude import Magnitude
from embsearch_plugin.algorithms.uniform import Uniform
from embsearch_plugin.budget import Budget
from embsearch_plugin.data import stream
from embsearch_plugin.errors import RecipeError, SettingsError, did_you_mean
from embsearch_plugin.limits import Limits, above, at_least, check_limits
from embsearch_plugin.machine import check_device
from embsearch_plugin.plain import structured, to_plain
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.recipe_files import put, read_content
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.study.config import Study, hidden

Config = TypeVar("Config", bound=AlgorithmConfig)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adagrad": Adagrad, "sgd": SGD}


@dataclass(frozen=True)
class Fused:
    """Train the tables by FBGEMM's fused kernels.

    Args:
        optimizer: name of one of ``fbgemm_gpu``'s EmbOptimType (``EXACT_SGD``, ``EXACT_ROWWISE_ADAGRAD``, ...).
        learning_rate: of the tables.
    """

    optimizer: str = "EXACT_ROWWISE_ADAGRAD"
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        if self.optimizer not in EmbOptimType.__members__:
            known = list(EmbOptimType.__members__)
            raise SettingsError(f"unknown optimizer {self.optimizer!r}.{did_you_mean(self.optimizer, known)}")


@dataclass(frozen=True)
class Train:
    """How models are trained, each to convergence: until the validation loss has stopped improving.

    Args:
        batch_size: examples per step.
        epochs: at most so many passes over the training split.
        patience: so many epochs without a better validation loss are put up with, the next one ends the training; the best
            epoch's weights are kept.
        optimizer: ``adam``, ``adagrad`` or ``sgd``.
        lr: its learning rate.
        clip_norm: the norm of all gradients together is clipped to it, as by TensorFlow's ``clip_by_global_norm``.
        l2: weight of the squared looked-up embeddings (after gates), summed per example, in the loss.
        fused: put the tables on fused kernels with an optimizer of their own.
        device: where models are trained and measured: ``cpu``, ``cuda`` or ``cuda:1``.
    """

    ranges: ClassVar[Ranges] = {"lr": Range(1e-4, 1e-2, log=True), "l2": Range(1e-5, 1e-2, log=True)}
    limits: ClassVar[Limits] = {
        "batch_size": at_least(1),
        "epochs": at_least(1),
        "patience": at_least(0),
        "lr": above(0),
        "l2": at_least(0),
    }
    batch_size: int = 1024
    epochs: int = 30
    patience: int = 2
    optimizer: str = "adam"
    lr: float = 1e-3
    clip_norm: float | None = None
    l2: float = 0.0
    fused: Fused | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.optimizer not in OPTIMIZERS:
            raise SettingsError(f"unknown optimizer {self.optimizer!r}.{did_you_mean(self.optimizer, OPTIMIZERS)}")
        if self.clip_norm is not None and (self.clip_norm <= 0 or self.fused):
            raise SettingsError(
                f"clip_norm must be above 0, and null with fused, whose kernels know no norm; got {self.clip_norm}"
            )
        check_limits(self)


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        algorithm: the algorithm's name and settings.
        baselines: the algorithms it is compared with, under the same budgets, seeds and trials.
        budgets: how large all tables may be, as text: "10%", "2GiB" or "390000 params".
        space: how tables are cut, for all of them; by default as suits each.
        strict: keep the budget, to the byte. Otherwise each search derives its plan by its paper's own rule, and the size is
            what that gives; sizes that are not searched (uniform, random, ...) keep the budget all the same.
    """

    algorithm: SearchConfig
    baselines: tuple[SearchConfig, ...] = (Uniform(), Magnitude())
    budgets: tuple[str, ...] = ("10%",)
    space: SearchSpace | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if not self.budgets:
            raise SettingsError("budgets must hold at least one budget")
        if others := [config.name for config in (self.algorithm, *self.baselines) if not isinstance(config, SearchConfig)]:
            raise SettingsError(f"{', '.join(others)} works on streams only, such as data: movielens-csv-stream")
        amounts = [(budget.unit, budget.share is None, budget.amount) for budget in map(Budget.of, self.budgets)]
        if len(set(amounts)) < len(amounts):
            raise SettingsError(f"budgets must differ from each other; got {list(self.budgets)}")

    @property
    def methods(self) -> dict[str, SearchConfig]:
        """The algorithm and its baselines by name; where two share a name, their settings tell them apart."""
        return methods_of((self.algorithm, *self.baselines))


@dataclass(frozen=True)
class Tune:
    """Which training settings every method tries, each combination once: so all are tuned with the same number of trials.

    The trials run from the first seed; for each method and budget the one with the best validation loss is kept, and the
    other seeds use it.

    Args:
        l2: values of ``train.l2``.
        lr: values of ``train.lr``; fused tables have a rate of their own, which stays as it is.
    """

    l2: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()

    def trials(self) -> list[dict[str, Any]]:
        """Return the combinations; one that changes nothing where there is nothing to tune."""
        tuned = {name: values for name, values in vars(self).items() if values}
        return [dict(zip(tuned, values, strict=True)) for values in product(*tuned.values())]


@dataclass(frozen=True)
class Recipe:
    """A matrix of runs: every method at every budget, from every seed.

    Args:
        data: the data set; its splits are the same for all.
        model: the model.
        search: the methods and the budgets.
        train: how models are trained.
        tune: which training settings are tried.
        seeds: of weights, batches and searches; results are means over them.
        study: what ``embsearch study`` varies; a run does without.
    """

    data: data.DataConfig
    model: models.ModelConfig
    search: Search
    train: Train = field(default_factory=Train)
    tune: Tune = field(default_factory=Tune)
    seeds: tuple[int, ...] = (0,)
    study: Study | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SettingsError(f"seeds must hold at least one, no one twice, each 0 or more; got {list(self.seeds)}")
        for trial in self.tune.trials():
            replace(self.train, **trial)


def methods_of(configs: Sequence[Config]) -> dict[str, Config]:
    """Return configs by name, each once; where two share a name, their settings tell them apart."""
    differing: list[Config] = []
    for config in configs:
        if config not in differing:  # another package's config may have a field that cannot be hashed
            differing.append(config)
    names = [config.name for config in differing]
    return {config.name if names.count(config.name) == 1 else _described(config): config for config in differing}


def _described(config: AlgorithmConfig) -> str:
    """Name a config by its name and what was set otherwise than by default."""
    return f"{config.name} ({', '.join(settings(config))})" if settings(config) else config.name


def settings(config: AlgorithmConfig) -> list[str]:
    """Return what was set otherwise than by default, as ``name=value``."""
    return [f"{f.name}={getattr(config, f.name)}" for f in fields(config) if getattr(config, f.name) != f.default]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides, keys with dots (``train.epochs=3``), values in YAML.

    A recipe that ``extends`` another (a path, from its own folder) says only what differs. Mappings are merged, unless they
    have different names; null takes back what the other one says, and where that says nothing it is a value as any.

    Raises:
        RecipeError: where the file cannot be read or something in it is wrong; lists all problems.
    """
    return parse_recipe(read_content(path, overrides), str(path))


def overridden(recipe: Recipe, values: Mapping[str, Any], source: str) -> Recipe:
    """Return a recipe with other values, plain ones by key (``train.lr``); ``source`` is named in errors."""
    content: dict[str, Any] = to_plain(recipe)
    for key, value in values.items():
        put(content, key, value)
    return parse_recipe(content, source)


def parse_recipe(content: Mapping[str, Any], source: str) -> Recipe:
    """Turn plain data into a recipe; ``source`` is named in errors.

    Raises:
        RecipeError: where something in it is wrong (lists all problems), or where it is the recipe of a stream.
    """
    if is_stream(content):
        raise RecipeError(f"{source} is the recipe of a stream, which embsearch run takes and this does not.")
    recipe: Recipe = structured(content, Recipe, source)
    return recipe


def is_stream(content: Mapping[str, Any]) -> bool:
    """Whether a recipe's plain data is that of a stream."""
    data = content.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    return name in [config.name for config in stream.CONFIGS]


def recorded(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain data for a run folder, without the password of a study's storage."""
    content: dict[str, Any] = to_plain(recipe)
    if (study := content.get("study")) and study["storage"]:
        study["storage"] = hidden(study["storage"])
    return content


def to_yaml(recipe: Any) -> str:
    """Return a recipe as YAML for a run folder, every default written out."""
    return yaml.safe_dump(recorded(recipe), sort_keys=False)
