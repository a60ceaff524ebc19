"""The plugin manager: built-in plugins, then packages with an entry point in the group ``embsearch``."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module

import pluggy
from torch import nn

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.collection import FoundCollection
from embsearch_plugin.errors import AdapterConflict, EmbsearchError, NoCollectionFound, UnknownAlgorithm, did_you_mean
from embsearch_plugin.hookspecs import PROJECT, GlobalHooks
from embsearch_plugin.plan import TablePlan
from embsearch_plugin.space import SearchSpace

BUILTIN = (
    "embsearch_plugin.algorithms.dnis",
    "embsearch_adapters.torchrec_ebc",
)


@cache
def manager() -> pluggy.PluginManager:
    """Return the process's plugin manager, with every plugin loaded and checked."""
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(GlobalHooks)
    for name in BUILTIN:
        plugins.register(import_module(name), name=name.rpartition(".")[2])
    plugins.load_setuptools_entrypoints(PROJECT)
    try:
        plugins.check_pending()
    except pluggy.PluginValidationError as error:
        raise EmbsearchError(f"a plugin implements a hook that does not exist: {error}") from error
    return plugins


@cache
def algorithms() -> dict[str, type[AlgorithmConfig]]:
    """Return every registered algorithm's config class by name."""
    found: dict[str, type[AlgorithmConfig]] = {}
    for configs in manager().hook.embsearch_register_algorithms():
        for config in configs:
            if config.name in found:
                raise AdapterConflict(
                    f"the algorithm {config.name!r} is registered by {found[config.name].__module__} and by "
                    f"{config.__module__}. Uninstall one, or give one another name."
                )
            found[config.name] = config
    return found


def algorithm_config(algorithm: str | AlgorithmConfig) -> AlgorithmConfig:
    """Return the config for a name, with its defaults, or the config that was given.

    Raises:
        UnknownAlgorithm: where no algorithm has that name.
    """
    if isinstance(algorithm, AlgorithmConfig):
        return algorithm
    if algorithm not in algorithms():
        raise UnknownAlgorithm(f"{algorithm!r}.{did_you_mean(str(algorithm), algorithms())}")
    return algorithms()[algorithm]()


def find_collections(model: nn.Module) -> list[FoundCollection]:
    """Return the model's collections, each taken by exactly one adapter.

    Raises:
        NoCollectionFound: where there is none.
        AdapterConflict: where two adapters take the same module.
    """
    found: dict[int, FoundCollection] = {}
    for collections in manager().hook.embsearch_find_collections(model=model):
        for collection in collections:
            other = found.setdefault(id(collection.module), collection)
            if other is not collection:
                raise AdapterConflict(
                    f"the adapters {other.adapter!r} and {collection.adapter!r} both take {collection.paths[0]!r}. "
                    "Uninstall one of them."
                )
    if not found:
        raise NoCollectionFound(
            f"no embedding collection in {type(model).__name__} ({sum(1 for _ in model.modules())} modules; adapters "
            f"tried: {', '.join(adapters())}).{_lookalikes(model)}"
        )
    return list(found.values())


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
    return (
        f"\n  Looks like one but no adapter takes it: {shown}. Put its tables into a torchrec EmbeddingBagCollection."
    )


def build_supernet(collection: FoundCollection, space: SearchSpace) -> nn.Module:
    """Build the searchable form of a collection by the adapter that found it."""
    return _only(manager().hook.embsearch_build_supernet(collection=collection, space=space), collection)


def build_compact(collection: FoundCollection, plan: Sequence[TablePlan]) -> nn.Module:
    """Build the compact form of a collection by the adapter that found it."""
    return _only(manager().hook.embsearch_build_compact(collection=collection, plan=plan), collection)


def _only(answers: list[nn.Module], collection: FoundCollection) -> nn.Module:
    if len(answers) != 1:
        raise AdapterConflict(
            f"exactly one adapter must build {collection.paths[0]!r}, found by {collection.adapter!r}; {len(answers)} did."
        )
    return answers[0]
