"""Bags of one id in plain tables: their rows, without what ``nn.EmbeddingBag`` does for bags of any length.

On a CPU that sorts the ids of each table in the backward, and takes several passes over them. Here rows are gathered, and their
gradients are added up where they lie. Sparse gradients, which are not added up, have nothing to gain.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.module import _has_any_global_hook
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.lookup.bags import has_long_bags


def is_single(collection: nn.Module, features: KeyedJaggedTensor) -> bool:
    """Whether every bag holds one id, and :func:`rows_of` does for this collection what its own forward would."""
    return (
        type(collection) is EmbeddingBagCollection
        and not _is_traced()
        and _is_plain(collection)
        and _are_plain(features)
        and features.values().numel() == features.lengths().numel()
        and not has_long_bags(features)
    )


def _is_traced() -> bool:
    """Whether what runs is written down or transformed: for other bags, or where a Function of ours could not follow."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or get_proxy_mode() is not None
        or torch._C._are_functorch_transforms_active()
    )


def _are_plain(features: KeyedJaggedTensor) -> bool:
    ids = features.values()
    return (
        ids.device.type == "cpu"
        and ids.dtype in (torch.int32, torch.int64)
        and not ids.is_inference()
        and features.inverse_indices_or_none() is None
    )


def _is_plain(collection: EmbeddingBagCollection) -> bool:
    """Whether nobody but autograd would notice that a forward of the collection, or of a bag in it, did not run."""
    bags = list(collection.embedding_bags.children())
    return (
        not collection.is_weighted()
        and not _has_any_global_hook()
        and not any(map(is_changed, (collection, *bags)))
        and all(type(bag) is nn.EmbeddingBag and _is_dense(bag) for bag in bags)
    )


def is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward that is not its type's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _is_dense(bag: nn.EmbeddingBag) -> bool:
    """Whether a bag is what TorchRec makes, with gradients for all of its rows."""
    weight = bag.weight
    as_made = bag.max_norm is None and bag.padding_idx is None and not bag.scale_grad_by_freq and bag.mode in ("sum", "mean")
    of_its_size = type(weight) is nn.Parameter and weight.shape == (bag.num_embeddings, bag.embedding_dim)
    return as_made and of_its_size and weight.dtype == torch.float32 and not (bag.sparse and torch.is_grad_enabled())


def rows_of(weight: Tensor, ids: Tensor, *, partial: bool = False) -> Tensor:
    """Return the row of each id, (B, D).

    Args:
        weight: (V, D).
        ids: (B,).
        partial: whether there may be ids from V on; those contribute zero and train nothing.

    Raises:
        IndexError: where an id has no row, and may not.
    """
    rows: Tensor = _Rows.apply(weight, ids, partial)
    return rows


class _Rows(torch.autograd.Function):
    """One table: a Function of several would hold the gradients of all of them at once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, partial: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.partial = weight.shape, partial
        if not partial:
            return weight.index_select(0, ids)
        last = len(weight) - 1
        return weight.index_select(0, ids.clamp(max=last)).masked_fill_((ids > last)[:, None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,), (rows, width), gradient = ctx.saved_tensors, ctx.shape, gradient.contiguous()
        if not ctx.partial:
            return gradient.new_zeros(rows, width).index_add_(0, ids, gradient), None, None
        # One row more, for all ids that have none.
        return gradient.new_zeros(rows + 1, width).index_add_(0, ids.clamp(max=rows), gradient)[:-1], None, None
