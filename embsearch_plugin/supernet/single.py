"""Bags of at most one id in plain tables: their rows, without what ``nn.EmbeddingBag`` does for bags of any length.

On a CPU that sorts the ids of each table in the backward, and takes several passes over them. Here rows are gathered, and their
gradients are added up where they lie. Sparse gradients, which are not added up, have nothing to gain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.supernet.bags import has_long_bags, one_per_bag


@dataclass(frozen=True)
class Single:
    """At most one id of a table for each example.

    Args:
        bag: the table, (V, D).
        ids: (B,); those from V on, where ``partial``, contribute zero and train nothing.
        partial: whether there may be such ids.
    """

    bag: nn.EmbeddingBag
    ids: Tensor
    partial: bool


def is_single(collection: nn.Module, features: KeyedJaggedTensor) -> bool:
    """Whether no bag holds more than one id, and :func:`rows_of` does for this collection what its own forward would."""
    return (
        type(collection) is EmbeddingBagCollection
        and features.values().device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _is_plain(collection)
        and not has_long_bags(features)
    )


def _is_plain(collection: EmbeddingBagCollection) -> bool:
    """Whether nobody but autograd would notice that a forward of the collection, or of a bag in it, did not run."""
    bags = list(collection.embedding_bags.children())
    return (
        not collection.is_weighted()
        and not _has_any_global_hook()
        and not any(map(_has_hooks, (collection, *bags)))
        and all(type(bag) is nn.EmbeddingBag and _is_dense(bag) for bag in bags)
    )


def _is_dense(bag: nn.EmbeddingBag) -> bool:
    weight = bag.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and not (bag.sparse and torch.is_grad_enabled())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def single(bag: nn.EmbeddingBag, ids: Tensor, lengths: Tensor, *, partial: bool = False) -> Single:
    """Return the lookup of ids (n,) in bags of ``lengths`` (B,), none of which is longer than one; an empty bag is zero."""
    if ids.numel() == lengths.numel():
        return Single(bag, ids, partial)
    return Single(bag, one_per_bag(lengths, ids).masked_fill_(lengths == 0, bag.num_embeddings), True)


def rows_of(lookups: Sequence[Single]) -> Tensor:
    """Return the rows side by side, (B, sum of D).

    Raises:
        IndexError: where an id has no row, and its lookup is not ``partial``.
    """
    rows: Tensor = _Rows.apply(lookups, *(lookup.bag.weight for lookup in lookups))
    return rows


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lookups: Sequence[Single], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*(lookup.ids for lookup in lookups))
        ctx.tables = [(weight.shape, lookup.partial) for weight, lookup in zip(weights, lookups, strict=True)]
        return torch.cat([_gathered(w, look.ids, look.partial) for w, look in zip(weights, lookups, strict=True)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = gradient.split([shape[1] for shape, _ in ctx.tables], 1)
        by_lookup = zip(ctx.needs_input_grad[1:], parts, ctx.saved_tensors, ctx.tables, strict=True)
        return None, *(_added(part, ids, *table) if wanted else None for wanted, part, ids, table in by_lookup)


def _gathered(weight: Tensor, ids: Tensor, partial: bool) -> Tensor:
    """Return the rows of a table, (B, D)."""
    if not partial:
        return weight.index_select(0, ids)
    last = len(weight) - 1
    return weight.index_select(0, ids.clamp(max=last)).masked_fill_((ids > last)[:, None], 0.0)


def _added(part: Tensor, ids: Tensor, shape: torch.Size, partial: bool) -> Tensor:
    """Return the gradient of a table's weights, (V, D), given that of its rows, (B, D)."""
    if not partial:
        return part.new_zeros(shape).index_add_(0, ids, part.contiguous())
    # One row more, for all ids that have none.
    return part.new_zeros(shape[0] + 1, shape[1]).index_add_(0, ids.clamp(max=shape[0]), part.contiguous())[:-1]
