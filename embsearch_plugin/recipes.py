"""Recipes: a run in YAML, read as a whole, with every problem listed at once."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import cattrs
import yaml
from cattrs.gen import make_dict_structure_fn
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.optim import SGD, Adagrad, Adam, Optimizer

from embsearch_plugin import data, models
from embsearch_plugin.algorithms.base import AlgorithmConfig, SearchConfig
from embsearch_plugin.algorithms.magnitude import Magnitude
from embsearch_plugin.algorithms.uniform import Uniform
from embsearch_plugin.budget import Budget
from embsearch_plugin.data import stream
from embsearch_plugin.data.own import OwnData
from embsearch_plugin.errors import EmbsearchError, RecipeError, did_you_mean
from embsearch_plugin.models.own import OwnModel
from embsearch_plugin.models.stream_mlp import StreamMlp
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.study.config import Study, hidden

Config = TypeVar("Config", bound=AlgorithmConfig)

VARIED = ["study", "fields"]
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
            raise ValueError(f"unknown optimizer {self.optimizer!r}.{did_you_mean(self.optimizer, known)}")


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
    """

    ranges: ClassVar[Ranges] = {"lr": Range(1e-4, 1e-2, log=True), "l2": Range(1e-5, 1e-2, log=True)}
    batch_size: int = 1024
    epochs: int = 30
    patience: int = 2
    optimizer: str = "adam"
    lr: float = 1e-3
    clip_norm: float | None = None
    l2: float = 0.0
    fused: Fused | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}.{did_you_mean(self.optimizer, OPTIMIZERS)}")
        if self.clip_norm is not None and (self.clip_norm <= 0 or self.fused):
            raise ValueError(
                f"clip_norm must be above 0, and null with fused, whose kernels know no norm; got {self.clip_norm}"
            )
        if min(self.batch_size, self.epochs) < 1 or self.patience < 0 or self.lr <= 0 or self.l2 < 0:
            raise ValueError(
                "batch_size and epochs must be at least 1, patience and l2 at least 0, lr above 0; got "
                f"{self.batch_size}, {self.epochs}, {self.patience}, {self.l2}, {self.lr}"
            )


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        algorithm: the algorithm's name and settings.
        baselines: the algorithms it is compared with, under the same budgets, seeds and trials.
        budgets: how large all tables may be, as text: "10%", "2GiB" or "390000 params".
        space: how tables are cut, for all of them; by default as suits each.
    """

    algorithm: SearchConfig
    baselines: tuple[SearchConfig, ...] = (Uniform(), Magnitude())
    budgets: tuple[str, ...] = ("10%",)
    space: SearchSpace | None = None

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ValueError("budgets must hold at least one budget")
        if others := [config.name for config in (self.algorithm, *self.baselines) if not isinstance(config, SearchConfig)]:
            raise ValueError(f"{', '.join(others)} works on streams only, such as data: movielens-csv-stream")
        amounts = [(budget.unit, budget.share is None, budget.amount) for budget in map(Budget.of, self.budgets)]
        if len(set(amounts)) < len(amounts):
            raise ValueError(f"budgets must differ from each other; got {list(self.budgets)}")

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
            raise ValueError(f"seeds must hold at least one, no one twice, each 0 or more; got {list(self.seeds)}")
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
    """Return a recipe as plain data, every default written out; :func:`parse_recipe` reads it back."""
    if is_dataclass(value):
        name = getattr(value, "name", None)
        named = {} if name is None else {"name": name}
        return named | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def recorded(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain data for a run folder, without the password of a study's storage."""
    content: dict[str, Any] = to_plain(recipe)
    if (study := content.get("study")) and study["storage"]:
        study["storage"] = hidden(study["storage"])
    return content


def to_yaml(recipe: Any) -> str:
    """Return a recipe as YAML for a run folder, every default written out."""
    return yaml.safe_dump(recorded(recipe), sort_keys=False)


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
