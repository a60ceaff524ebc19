"""Bags of ids: reading them from a KeyedJaggedTensor, and splitting each by row block.

Shapes: B examples, F features, S cells. A *cell* of a feature is a row block of the table it reads; where a feature reads
several tables, it is a combination of their blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embsearch_plugin.errors import InputError


def bags_of(features: KeyedJaggedTensor, names: Sequence[str]) -> dict[str, JaggedTensor]:
    """Return the bags of the named features.

    Raises:
        InputError: where a feature is missing, the batch is empty, or it has a stride per key (variable batch size).
    """
    if features.variable_stride_per_key():
        raise InputError(
            "a batch size of its own per feature (variable stride) is not supported by searchable and compact collections.\n"
            "  Possible solution: build the KeyedJaggedTensor with one stride, without deduplication."
        )
    if not features.stride():
        raise InputError("a batch must hold at least one example; got a batch of size 0. Skip it in the loop.")
    bags: dict[str, JaggedTensor] = features.to_dict()
    missing = [name for name in names if name not in bags]
    if missing:
        raise InputError(f"the batch must hold the features {list(names)}; it lacks {missing} (it has {features.keys()}).")
    return bags


def columns_of(pooled: KeyedTensor) -> dict[str, Tensor]:
    """Return the columns of each key, (B, D): by one split, whose gradient is one concatenation.

    Indexing a KeyedTensor by key would, in the backward, fill zeros of its whole width for every key.
    """
    return dict(zip(pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1), strict=True))


def describe_bad_ids(table: str, feature: str, rows: int, ids: Tensor) -> str:
    """Say which ids no row answers for."""
    bad = ids[(ids < 0) | (ids >= rows)]
    shown = ", ".join(str(int(i)) for i in bad[:3])
    return (
        f"the ids of feature {feature!r} must be in [0, {rows}), the rows of table {table!r}; got {shown}"
        f"{', ...' if bad.numel() > 3 else ''} ({bad.numel()} of {ids.numel()} ids).\n"
        "  Possible solutions: 1) raise the table's num_embeddings  2) hash or clip the ids before the batch is built."
    )


def check_ids(table: str, feature: str, rows: int, ids: Tensor) -> None:
    """Raise an InputError where an id has no row. Costs one pass over the ids."""
    if ids.numel() and bool(((ids < 0) | (ids >= rows)).any()):
        raise InputError(describe_bad_ids(table, feature, rows, ids))


def rows_at(values: Tensor, ids: Tensor, table: str, feature: str) -> Tensor:
    """Return ``values[ids]`` for a (V, ...) tensor, with a readable error where an id has no row.

    On the CPU the gather itself finds such an id; on a GPU it would end the process, so there the ids are checked.
    """
    if ids.is_cuda:
        check_ids(table, feature, values.shape[0], ids)
    try:
        return values.index_select(0, ids)
    except IndexError:
        raise InputError(describe_bad_ids(table, feature, values.shape[0], ids)) from None


def has_long_bags(features: KeyedJaggedTensor) -> bool:
    """Whether any bag holds more than one id."""
    lengths = features.lengths()
    return bool(lengths.numel()) and int(lengths.max()) > 1


def one_per_bag(bag: JaggedTensor, values: Tensor) -> Tensor:
    """Spread a value per id, (n,), to a value per bag, (B,), for bags of at most one id; empty bags get any value."""
    lengths = bag.lengths()
    if values.numel() == lengths.numel():
        return values
    if not values.numel():
        return values.new_zeros(lengths.numel())
    return values.index_select(0, bag.offsets()[:-1].clamp(max=values.numel() - 1))


@dataclass(frozen=True)
class SplitBags:
    """Every bag split by cell.

    Args:
        features: the split bags, stride S x B, cell-major: bag ``s * B + b`` holds the ids of bag b that are in cell s.
        share: (F, S, B), the part of each bag's ids that is in each cell; an empty bag has none.
    """

    features: KeyedJaggedTensor
    share: Tensor


def split_by_cell(bags: Mapping[str, JaggedTensor], cells: Sequence[Tensor], size: int) -> SplitBags:
    """Split bags by the cell of their ids, keeping the order of ids within a cell, and the order of the features.

    TorchRec's sharded collection remembers the order of the features of its first batch, so every batch must keep it.

    Args:
        bags: the bags of every feature, (F,) x B.
        cells: per feature the cell of each of its ids, (n,).
        size: S, the number of cells.
    """
    n_features = len(bags)
    lengths = torch.cat([bag.lengths() for bag in bags.values()])
    batch = lengths.numel() // n_features
    weights = [bag.weights_or_none() for bag in bags.values()]
    # FBGEMM's bucketize sorts by id; given the cell as the "id", it sorts the real ids by cell. Its result is cell-major
    # over all features, and is then permuted to be feature-major.
    new_lengths, _, _, _, place = torch.ops.fbgemm.block_bucketize_sparse_features(
        lengths,
        torch.cat(list(cells)).to(lengths.dtype),
        bucketize_pos=False,
        sequence=True,
        block_sizes=torch.ones(n_features, dtype=lengths.dtype, device=lengths.device),
        my_size=size,
    )
    ids = _scatter(torch.cat([bag.values() for bag in bags.values()]), place)
    spread = _scatter(torch.cat([w for w in weights if w is not None]), place) if weights[0] is not None else None
    order = torch.arange(size * n_features, dtype=torch.int32, device=lengths.device).view(size, n_features).t()
    split_lengths, ids, spread = torch.ops.fbgemm.permute_2D_sparse_data(
        order.reshape(-1), new_lengths.view(size * n_features, batch), ids, spread, ids.numel()
    )
    counts = split_lengths.view(n_features, size, batch)
    features = KeyedJaggedTensor(
        keys=list(bags), values=ids, weights=spread, lengths=split_lengths.flatten(), stride=size * batch
    )
    return SplitBags(features, counts / counts.sum(1, keepdim=True).clamp(min=1))


def _scatter(values: Tensor, place: Tensor) -> Tensor:
    moved = torch.empty_like(values)
    moved[place.long()] = values
    return moved
