"""Where the rows of a compact collection went, and which ids each of its parts holds.

A part is a slot's share of a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.compact.fine import FixedIndex
from embsearch_plugin.lookup.bags import ids_of, rows_at
from embsearch_plugin.lookup.readers import Readers
from embsearch_plugin.plan import TablePlan

Bags = tuple[Tensor, Tensor, Tensor | None]
"""Values (n,), lengths (bags,), and weights (n,) where ids have weights."""


@dataclass(frozen=True)
class Holder:
    """What a part holds of its feature's ids.

    Args:
        feature: that it reads.
        table: the number of the table that it is a chunk of.
        limit: it holds the rows whose place is below; ``None`` where these are all.
    """

    feature: str
    table: int
    limit: int | None


class Places(FixedIndex):
    """The place in plan order of each row, for the tables whose rows do not stand in their own.

    All remaps are one int32 tensor, one after the other: on a GPU one gather reads them all. Dropped rows have the place
    behind all others.

    Args:
        plans: of the collection's tables.
        features: those that the collection reads, in the order of its batches.
        holders: its parts.
        weighted: whether ids come with weights.
    """

    def __init__(self, plans: Sequence[TablePlan], features: Sequence[str], holders: Sequence[Holder], weighted: bool) -> None:
        super().__init__()
        self._names, self._features, self._holders = [plan.table.name for plan in plans], list(features), list(holders)
        self._weighted = weighted
        remaps = [None if plan.order is None else _remap(plan) for plan in plans]
        starts = accumulate((0 if remap is None else len(remap) for remap in remaps), initial=0)
        self._spans = [None if r is None else (start, len(r)) for r, start in zip(remaps, starts, strict=False)]
        spans = [self._spans[holder.table] for holder in holders]
        self._readers = Readers(
            features,
            [holder.feature for holder in holders],
            starts=[0 if span is None else span[0] for span in spans],
            is_moved=[span is not None for span in spans],
            limits=[torch.iinfo(torch.int64).max if holder.limit is None else holder.limit for holder in holders],
        )
        self._all_moved, self._all_held = None not in spans, all(holder.limit is None for holder in holders)
        self.remap: Tensor | None
        moved = [remap for remap in remaps if remap is not None]
        self.register_buffer("remap", torch.cat(moved) if moved else None)

    def is_moved(self, table: int) -> bool:
        """Whether the table's rows stand in another order than their own."""
        return self._spans[table] is not None

    def of(self, table: int, feature: str, ids: Tensor) -> Tensor:
        """Return the place of each of a feature's ids, (n,).

        Raises:
            InputError: on the CPU, where an id has no row in a table whose rows moved.
        """
        span = self._spans[table]
        if span is None or self.remap is None:
            return ids
        return rows_at(self.remap.narrow(0, *span), ids, self._names[table], feature).to(ids.dtype)

    def held(self, features: KeyedJaggedTensor) -> Bags:
        """Return the bags of every part, one part after the other: the places of the ids that it holds."""
        return self.held_together(features) if self._readers.together(features) else self.held_one_by_one(features)

    def held_one_by_one(self, features: KeyedJaggedTensor) -> Bags:
        """Do it part by part."""
        ids, lengths = ids_of(features), features.lengths().view(len(self._features), -1)
        of_feature, weights = dict(zip(self._features, lengths, strict=True)), self._weights(features)
        reads = dict.fromkeys((holder.table, holder.feature) for holder in self._holders)
        places = {(table, feature): self.of(table, feature, ids[feature]) for table, feature in reads}
        parts = []
        for holder in self._holders:
            bags = places[holder.table, holder.feature], of_feature[holder.feature], weights.get(holder.feature)
            parts.append(bags if holder.limit is None else _below(*bags, holder.limit))
        values, kept, of_ids = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(kept), torch.cat(of_ids) if weights else None

    def held_together(self, features: KeyedJaggedTensor) -> Bags:
        """Do the same by a fixed number of operations, whatever the parts: on a GPU launching each is what takes the time.

        The caller has checked the ids. The host waits for the number of those that are left, where some are left out.
        """
        read, of = self._readers.read(features), partial(self._readers.of, device=features.values().device)
        places, lengths = read.ids, read.lengths.flatten()
        weights = self._readers.spread(features, features.weights()) if self._weighted else None
        if self.remap is not None:
            rows = (places + of("starts").index_select(0, read.reader)).clamp_(max=len(self.remap) - 1)
            moved = self.remap.index_select(0, rows).to(places.dtype)
            places = moved if self._all_moved else torch.where(of("is_moved").index_select(0, read.reader), moved, places)
        if self._all_held:
            return places, lengths, weights
        keep = places < of("limits").index_select(0, read.reader)
        seen = torch.ops.fbgemm.asynchronous_complete_cumsum(keep.int())
        ends = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.long())
        kept = seen.index_select(0, ends).diff().to(lengths.dtype)
        return places.masked_select(keep), kept, None if weights is None else weights.masked_select(keep)

    def _weights(self, features: KeyedJaggedTensor) -> Mapping[str, Tensor]:
        """Return the weights of each feature's ids; empty where they have none."""
        if not self._weighted:
            return {}
        return dict(zip(self._features, features.weights().split(features.length_per_key()), strict=True))


def _remap(plan: TablePlan) -> Tensor:
    """Return the place of each row, int32 (V,); dropped rows are behind every chunk."""
    assert plan.order is not None
    remap = torch.full((plan.table.rows,), plan.order.numel(), dtype=torch.int32, device="cpu")
    remap[plan.order.long()] = torch.arange(plan.order.numel(), dtype=torch.int32, device="cpu")
    return remap


def _below(places: Tensor, lengths: Tensor, weights: Tensor | None, limit: int) -> Bags:
    """Leave out the ids whose place is not below the limit; FBGEMM's operation is for the CPU only."""
    keep = places < limit
    held, kept = torch.ops.fbgemm.masked_select_jagged_1d(places, lengths, keep)
    return held, kept, None if weights is None else weights.masked_select(keep)
