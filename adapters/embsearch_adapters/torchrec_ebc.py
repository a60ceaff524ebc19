"""TorchRec's EmbeddingBagCollection.

Takes exactly that type. What derives from it, or wraps it in a way that a rewrite would lose, is refused by name.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface

from embsearch_plugin.collection import FoundCollection, Table
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.errors import UnsupportedCollection
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.lookup.single import is_changed
from embsearch_plugin.plan import TablePlan
from embsearch_plugin.streaming.collection import StreamingEmbeddingBagCollection
from embsearch_plugin.supernet.forms import Form
from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection

NAME = "torchrec_ebc"
FUSED_MARKS = ("_optimizer_classes", "_optimizer_kwargs")  # of TorchRec's apply_optimizer_in_backward

# Matched by name along the type's ancestry, so that nothing is imported just to be refused.
REFUSED = {
    "ManagedCollisionEmbeddingBagCollection": "its ids move between rows while it trains, so a row has no fixed frequency. "
    "Search with a plain EmbeddingBagCollection on hashed ids, then put managed collision in front of the result",
    "ManagedCollisionEmbeddingCollection": "its ids move between rows while it trains. Search with a plain collection",
    "ITEPEmbeddingBagCollection": "it prunes rows by itself while it trains. Remove ITEP: a size plan drops rows too",
    "FeatureProcessedEmbeddingBagCollection": "its sharder would be lost. Apply the feature processor to the "
    "KeyedJaggedTensor in your model, and search a weighted EmbeddingBagCollection",
    "FusedEmbeddingBagCollection": "it mislabels its outputs where pooling types are mixed. Use an EmbeddingBagCollection, "
    "and prepare(..., fused=...) for FBGEMM's fused optimizers",
    "EmbeddingTowerCollection": "it shards towers as a whole. Search the EmbeddingBagCollection before it is put in a tower",
    "EmbeddingTower": "it shards towers as a whole. Search the EmbeddingBagCollection before it is put in a tower",
}


@hookimpl
def embsearch_find_collections(model: nn.Module) -> list[FoundCollection]:
    """Return every plain EmbeddingBagCollection of the model with all its aliases."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        _refuse(path, module)
        if type(module) is EmbeddingBagCollection:
            paths.setdefault(id(module), []).append(path)
            modules[id(module)] = module
    return [_found(modules[key], tuple(paths[key])) for key in modules]


def _found(module: nn.Module, paths: tuple[str, ...]) -> FoundCollection:
    assert isinstance(module, EmbeddingBagCollection)
    if "" in paths:
        raise UnsupportedCollection(
            "the model is itself an EmbeddingBagCollection, so nothing holds it that it could be replaced in.\n"
            "  Possible solution: prepare the model around it, or a small nn.Module with it as an attribute."
        )
    _refuse_changes(paths[0], module)
    tables = tuple(
        Table(
            paths[0],
            config.name,
            config.num_embeddings,
            config.embedding_dim,
            _dtype_of(module, config.name),
            tuple(config.feature_names),
        )
        for config in module.embedding_bag_configs()
    )
    return FoundCollection(NAME, paths, module, tables)


def _refuse_changes(path: str, collection: EmbeddingBagCollection) -> None:
    """Raise where the collection, or a bag in it, does more than TorchRec made it do: a rewrite would lose that."""
    bags = {f"{path}.embedding_bags.{name}": bag for name, bag in collection.embedding_bags.items()}
    for name, module in {path: collection, **bags}.items():
        if what := _change(module):
            raise UnsupportedCollection(
                f"{name!r} {what}, which compact tables would not have.\n  Possible solution: do it in the module around the "
                "EmbeddingBagCollection, on its input or output."
            )


def _change(module: nn.Module) -> str:
    """Say what a collection, or a bag in it, does that TorchRec did not make it do; nothing where it does no more."""
    if is_changed(module):
        return "has hooks or a forward of its own"
    if isinstance(module, EmbeddingBagCollection):
        return ""
    if type(module) is not nn.EmbeddingBag:
        return f"is a {type(module).__name__}"
    settings = {"max_norm": module.max_norm, "padding_idx": module.padding_idx, "scale_grad_by_freq": module.scale_grad_by_freq}
    found = [name for name, value in settings.items() if value is not None and value is not False]
    return f"sets {', '.join(found)}" if found else ""


def _dtype_of(module: EmbeddingBagCollection, table: str) -> torch.dtype:
    weight = module.embedding_bags[table].weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype


def _refuse(path: str, module: nn.Module) -> None:
    """Raise for a collection that must not be searched; ``path`` is where the model holds it."""
    if isinstance(module, SearchableEmbeddingBagCollection | StreamingEmbeddingBagCollection):
        raise UnsupportedCollection(f"{path!r} is being searched already. Use es.session(model), or build a new model.")
    if isinstance(module, CompactEmbeddingBagCollection):
        raise UnsupportedCollection(f"{path!r} is compact already. Search a model built anew: build_model.original().")
    for ancestor in type(module).__mro__:
        if ancestor.__name__ in REFUSED:
            raise UnsupportedCollection(f"{path!r} is a {type(module).__name__}: {REFUSED[ancestor.__name__]}.")
    if isinstance(module, ShardedModule):
        raise UnsupportedCollection(
            f"{path!r} is a {type(module).__name__}: the model is sharded already.\n"
            "  Possible solution: prepare (or apply) first, then DistributedModelParallel, then the optimizer, then attach."
        )
    if isinstance(module, EmbeddingBagCollectionInterface) and type(module) is not EmbeddingBagCollection:
        raise UnsupportedCollection(
            f"{path!r} is a {type(module).__module__}.{type(module).__name__}, a collection this adapter does not know; a "
            "rewrite could lose what it adds.\n  Possible solutions: 1) use a plain EmbeddingBagCollection  2) write an "
            "adapter for it (hook embsearch_find_collections)."
        )


@hookimpl
def embsearch_build_supernet(collection: FoundCollection, forms: Sequence[Form]) -> nn.Module | None:
    """Put the collection into a searchable one."""
    if collection.adapter != NAME:
        return None
    original = collection.module
    assert isinstance(original, EmbeddingBagCollection)
    inner = _of_widths(original, [form.width for form in forms]) if forms else original
    return SearchableEmbeddingBagCollection(inner, collection.tables, original.embedding_bag_configs(), forms)


def _of_widths(original: EmbeddingBagCollection, widths: Sequence[int]) -> EmbeddingBagCollection:
    """Return the collection itself, or one with tables of these widths where they differ."""
    configs = original.embedding_bag_configs()
    if [config.embedding_dim for config in configs] == list(widths):
        return original
    wanted = [replace(c, embedding_dim=width, init_fn=nn.init.zeros_) for c, width in zip(configs, widths, strict=True)]
    resized = EmbeddingBagCollection(wanted, original.is_weighted(), next(original.parameters()).device)
    for old, new in zip(original.embedding_bags.values(), resized.embedding_bags.values(), strict=True):
        new.to(old.weight.dtype).weight.data.copy_(_columns(old.weight.detach(), new.weight.shape[1]))
        new.weight.requires_grad_(old.weight.requires_grad)
        for mark in FUSED_MARKS:
            if hasattr(old.weight, mark):
                setattr(new.weight, mark, getattr(old.weight, mark))
        new.sparse = old.sparse
    return resized.train(original.training)


def _columns(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Return a table's first columns; where there are too few, followed by those of other rows: as random, not drawn anew."""
    copies = -(-width // weight.shape[1])
    return torch.cat([weight.roll(shift, 0) for shift in range(copies)], 1)[:, :width]


@hookimpl
def embsearch_build_compact(collection: FoundCollection, plan: Sequence[TablePlan]) -> nn.Module | None:
    """Build compact tables on the device of the originals."""
    if collection.adapter != NAME:
        return None
    module = collection.module
    assert isinstance(module, EmbeddingBagCollection)
    device = next(module.parameters()).device
    return CompactEmbeddingBagCollection(module.embedding_bag_configs(), plan, module.is_weighted(), device)
