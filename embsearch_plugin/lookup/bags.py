"""Bags of ids: reading them from a KeyedJaggedTensor, and splitting each by row block.

Shapes: B examples, F features, S cells. A *cell* of a feature is a row block of the table it reads; where a feature reads
several tables, it is a combination of their blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embsearch_plugin.errors import InputError


def ordered(features: KeyedJaggedTensor, names: Sequence[str]) -> KeyedJaggedTensor:
    """Return the named features, in that order; the batch itself where it has just these.

    Raises:
        InputError: where a feature is missing, the batch is empty or deduplicated, or it has a stride per key (variable batch
            size).
    """
    if features.inverse_indices_or_none() is not None:
        raise InputError(
            "a deduplicated batch (with inverse indices) is not supported by searchable and compact collections.\n"
            "  Possible solution: build the KeyedJaggedTensor with a bag for each example, without inverse_indices."
        )
    if features.variable_stride_per_key():
        raise InputError(
            "a batch size of its own per feature (variable stride) is not supported by searchable and compact collections.\n"
            "  Possible solution: build the KeyedJaggedTensor with one stride, without deduplication."
        )
    if not features.stride():
        raise InputError("a batch must hold at least one example; got a batch of size 0. Skip it in the loop.")
    keys = features.keys()
    missing = [name for name in names if name not in keys]
    if missing:
        raise InputError(f"the batch must hold the features {list(names)}; it lacks {missing} (it has {keys}).")
    return features if keys == list(names) else features.permute([keys.index(name) for name in names])


def ids_of(features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """Return the ids of each feature, (n,)."""
    return dict(zip(features.keys(), features.values().split(features.length_per_key()), strict=True))


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
    if ids.numel() and not torch.compiler.is_exporting():  # what is exported cannot depend on ids
        least, greatest = torch.stack(torch.aminmax(ids)).tolist()
        if least < 0 or greatest >= rows:
            raise InputError(describe_bad_ids(table, feature, rows, ids))


def check_readers(features: KeyedJaggedTensor, readers: Sequence[tuple[str, str, int]]) -> None:
    """Raise an InputError where an id has no row in a table that reads it.

    Args:
        features: the batch.
        readers: the tables' names, the features they read, and their rows.
    """
    if readers and not torch.compiler.is_exporting():
        ids = ids_of(features)
        for table, feature, rows in readers:
            check_ids(table, feature, rows, ids[feature])


def rows_at(values: Tensor, ids: Tensor, table: str, feature: str) -> Tensor:
    """Return ``values[ids]`` for a (V, ...) tensor, with a readable error where an id has no row.

    On the CPU the gather itself finds such an id; on a GPU it would end the process: there ids are checked first.
    """
    try:
        return values.index_select(0, ids)
    except IndexError:
        raise InputError(describe_bad_ids(table, feature, values.shape[0], ids)) from None


def has_long_bags(features: KeyedJaggedTensor) -> bool:
    """Whether any bag holds more than one id."""
    lengths = features.lengths()
    return bool(lengths.numel()) and int(lengths.max()) > 1


def one_per_bag(lengths: Tensor, values: Tensor) -> Tensor:
    """Spread a value per id, (n,), to a value per bag, (B,), for bags of at most one id; empty bags get any value."""
    if values.numel() == lengths.numel():
        return values
    if not values.numel():
        return values.new_zeros(lengths.numel())
    return values.index_select(0, (lengths.cumsum(0) - lengths).clamp(max=values.numel() - 1))


@dataclass(frozen=True)
class SplitBags:
    """Every bag split by cell.

    Args:
        features: the split bags, stride S x B, cell-major: bag ``s * B + b`` holds the ids of bag b that are in cell s.
        counts: (F, S, B), how many ids of each bag are in each cell.
    """

    features: KeyedJaggedTensor
    counts: Tensor

    @property
    def share(self) -> Tensor:
        """The part of each bag's ids that is in each cell, (F, S, B); an empty bag has none."""
        return self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)


def split_by_cell(features: KeyedJaggedTensor, cells: Sequence[Tensor], size: int) -> SplitBags:
    """Split bags by the cell of their ids, keeping the order of ids within a cell, and the order of the features.

    TorchRec's sharded collection remembers the order of the features of its first batch, so every batch must keep it.

    Args:
        features: F features, a batch of B.
        cells: per feature the cell of each of its ids, (n,).
        size: S, the number of cells.
    """
    lengths, batch, n_features = features.lengths(), features.stride(), len(features.keys())
    # Sorting is quickest by the smallest type that numbers all parts; FBGEMM's bucketize takes twice as long.
    dtype = torch.int16 if n_features * size <= torch.iinfo(torch.int16).max else torch.int32
    part = torch.cat([cell.to(dtype) + number * size for number, cell in enumerate(cells)])
    place = torch.argsort(part, stable=True)
    example = torch.repeat_interleave(torch.arange(batch, device=part.device).repeat(n_features), lengths)
    counts = torch.bincount(example.add_(part, alpha=batch), minlength=n_features * size * batch)
    weights = features.weights_or_none()
    split = KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values().index_select(0, place),
        weights=None if weights is None else weights.index_select(0, place),
        lengths=counts.to(lengths.dtype),
        stride=size * batch,
    )
    return SplitBags(split, counts.view(n_features, size, batch))
