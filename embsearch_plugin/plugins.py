"""The plugin manager: built-in plugins, then packages with an entry point in the group ``embsearch``."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy
from torch import nn

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.collection import FoundCollection
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.errors import AdapterConflict, EmbsearchError, NoCollectionFound, UnknownAlgorithm, did_you_mean
from embsearch_plugin.hookspecs import PROJECT, GlobalHooks
from embsearch_plugin.plan import TablePlan
from embsearch_plugin.supernet.forms import Form
from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection

Built = TypeVar("Built", bound=nn.Module)

BUILTIN = (
    "embsearch_plugin.algorithms.autodim",
    "embsearch_plugin.algorithms.autoemb",
    "embsearch_plugin.algorithms.darts",
    "embsearch_plugin.algorithms.dnis",
    "embsearch_plugin.algorithms.esapn",
    "embsearch_plugin.algorithms.fixed",
    "embsearch_plugin.algorithms.given",
    "embsearch_plugin.algorithms.grid",
    "embsearch_plugin.algorithms.magnitude",
    "embsearch_plugin.algorithms.mde",
    "embsearch_plugin.algorithms.random",
    "embsearch_plugin.algorithms.spectral",
    "embsearch_plugin.algorithms.nis",
    "embsearch_plugin.algorithms.sam",
    "embsearch_plugin.algorithms.uniform",
    "embsearch_adapters.torchrec_ebc",
)


@cache
def manager() -> pluggy.PluginManager:
    """Return the process's plugin manager, with every plugin loaded and checked.

    Raises:
        EmbsearchError: where a package's plugin cannot be loaded, or implements a hook that does not exist.
    """
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(GlobalHooks)
    for name in BUILTIN:
        plugins.register(import_module(name), name=name.rpartition(".")[2])
    plugins.check_pending()
    for entry_point in entry_points(group=PROJECT):
        _load(plugins, entry_point)
    return plugins


def _load(plugins: pluggy.PluginManager, entry_point: EntryPoint) -> None:
    """Load one entry point. Unlike pluggy's own loader: name it where it fails, and skip none whose name is taken."""
    try:
        plugins.register(entry_point.load(), name=entry_point.name)
        plugins.check_pending()
    except Exception as error:
        package = entry_point.dist.name if entry_point.dist else "an unknown package"
        raise EmbsearchError(
            f"the plugin {entry_point.name!r} ({entry_point.value}, of {package}) cannot be used: "
            f"{type(error).__name__}: {error}\n  Possible solutions: 1) correct it  2) pip uninstall {package}."
        ) from error


@cache
def algorithms() -> dict[str, type[AlgorithmConfig]]:
    """Return every registered algorithm's config class by name."""
    found: dict[str, type[AlgorithmConfig]] = {}
    for configs in manager().hook.embsearch_register_algorithms():
        for config in configs:
            other = found.setdefault(config.name, config)
            if other is not config:
                raise AdapterConflict(
                    f"the algorithm {config.name!r} is registered twice: as {other!r} and as {config!r}. "
                    "Uninstall one, or give one another name."
                )
    return found


def algorithm_config(algorithm: str | AlgorithmConfig) -> AlgorithmConfig:
    """Return the config for a name, with its defaults, or the config that was given.

    Raises:
        UnknownAlgorithm: where no algorithm has that name.
    """
    if isinstance(algorithm, AlgorithmConfig):
        return algorithm
    if not isinstance(algorithm, str):
        raise UnknownAlgorithm(f"an algorithm is a name or a config object, such as es.Dnis(); got {algorithm!r}.")
    if algorithm not in algorithms():
        raise UnknownAlgorithm(f"{algorithm!r}.{did_you_mean(algorithm, algorithms())}")
    return algorithms()[algorithm]()


def find_collections(model: nn.Module) -> list[FoundCollection]:
    """Return the model's collections, each taken by exactly one adapter.

    Raises:
        NoCollectionFound: where there is none.
        AdapterConflict: where two collections hold the same table: two adapters took a module, or a part of it.
    """
    found = [each for answer in manager().hook.embsearch_find_collections(model=model) for each in answer]
    owners: dict[nn.Parameter, FoundCollection] = {}
    for collection in found:
        for parameter in collection.module.parameters():
            other = owners.setdefault(parameter, collection)
            if other is not collection:
                raise AdapterConflict(
                    f"two collections hold the same table: {other.paths[0]!r}, found by the adapter {other.adapter!r}, "
                    f"and {collection.paths[0]!r}, found by the adapter {collection.adapter!r}.\n"
                    "  Possible solutions: 1) uninstall one of the adapters  2) give each collection its own tables."
                )
    if not found:
        raise NoCollectionFound(
            f"no embedding collection in {type(model).__name__} ({sum(1 for _ in model.modules())} modules; adapters "
            f"tried: {', '.join(adapters())}).{_lookalikes(model)}"
        )
    return found


def adapters() -> list[str]:
    """Return the names of the plugins that find collections."""
    hook = manager().hook.embsearch_find_collections
    return sorted(implementation.plugin_name for implementation in hook.get_hookimpls())


def _lookalikes(model: nn.Module) -> str:
    lookalikes = [
        f"{path!r} ({type(module).__module__}.{type(module).__name__})"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    if not lookalikes:
        return "\n  Possible solution: prepare the module that holds the EmbeddingBagCollection."
    shown = ", ".join(lookalikes[:3]) + (", ..." if len(lookalikes) > 3 else "")
    return f"\n  Looks like one but no adapter takes it: {shown}. Put its tables into a torchrec EmbeddingBagCollection."


def build_supernet(collection: FoundCollection, forms: Sequence[Form]) -> SearchableEmbeddingBagCollection:
    """Build the searchable form of a collection by the adapter that found it."""
    answers = manager().hook.embsearch_build_supernet(collection=collection, forms=forms)
    return _only(answers, collection, SearchableEmbeddingBagCollection)


def build_compact(collection: FoundCollection, plan: Sequence[TablePlan]) -> CompactEmbeddingBagCollection:
    """Build the compact form of a collection by the adapter that found it."""
    answers = manager().hook.embsearch_build_compact(collection=collection, plan=plan)
    return _only(answers, collection, CompactEmbeddingBagCollection)


def _only(answers: list[Any], collection: FoundCollection, kind: type[Built]) -> Built:
    """Return the one answer.

    Raises:
        AdapterConflict: where there is none, or more than one, or it is something else.
    """
    if len(answers) != 1:
        raise AdapterConflict(
            f"exactly one adapter must build {collection.paths[0]!r}, found by {collection.adapter!r}; {len(answers)} did."
        )
    if not isinstance(answers[0], kind):
        raise AdapterConflict(
            f"what takes the place of {collection.paths[0]!r}, found by the adapter {collection.adapter!r}, must be a "
            f"{kind.__name__}; got a {type(answers[0]).__name__}."
        )
    return answers[0]
