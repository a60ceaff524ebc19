"""The streaming collection: growing tables behind the interface of an EmbeddingBagCollection.

    id -> entry, made if it is new -> its row, of a width of its own -> the form makes D columns of it
    output of a bag = base + sum (or mean) over its ids of (output of id - base)

Rows live in host memory and are trained by the plugin's own optimizer in the backward pass, as with fused kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embsearch_plugin import distributed
from embsearch_plugin.errors import UnsupportedCollection
from embsearch_plugin.lookup.bags import ordered
from embsearch_plugin.lookup.slots import slots_of
from embsearch_plugin.streaming.table import GrowingTable


@dataclass(frozen=True)
class Lookup:
    """What one forward pass looked up in one table.

    Args:
        entries: int64 (n,), for each id in turn; -1 for those that are not there.
        examples: int64 (n,), the example that each id is of.
    """

    entries: Tensor
    examples: Tensor


class StreamingEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection whose tables grow; same input, but any integer is an id; same output keys, dims and dtype.

    Args:
        configs: the original configs.
        tables: one for each.
        is_weighted: whether ids come with weights.

    Attributes:
        lookups: of the last forward pass, per table.
        forwards: how often it was run to be trained.
        growth: says which entries (n,) of a table get wider rows, bool (n,): asked in training, before they are read.
    """

    def __init__(self, configs: Sequence[EmbeddingBagConfig], tables: Sequence[GrowingTable], is_weighted: bool) -> None:
        super().__init__()
        self._configs, self.tables, self._weighted = list(configs), list(tables), is_weighted
        self._slots = slots_of(configs)
        self._features = list(dict.fromkeys(slot.feature for slot in self._slots))
        self.forms = nn.ModuleList(table.form for table in tables)
        self.lookups: list[Lookup] = []
        self.forwards = 0
        self.growth: Callable[[GrowingTable, Tensor], Tensor] | None = None
        self._own, self._searching = False, False
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # stands where the model is moved to

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The original configs: what the model around it was built for."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._weighted

    @property
    def device(self) -> torch.device:
        """Where outputs are."""
        return self._anchor.device

    @property
    def _trains(self) -> bool:
        """Whether a forward pass now is one of the loop's, to train on."""
        return self.training and torch.is_grad_enabled() and not self._own

    @contextmanager
    def own_forward(self, *, searching: bool) -> Iterator[None]:
        """Within it, nothing is admitted, counted or trained; ``searching``: architecture parameters get gradients."""
        before = self._own, self._searching
        self._own, self._searching = True, searching
        try:
            yield
        finally:
            self._own, self._searching = before

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool: (B, sum of dims), keyed as the original."""
        if distributed.world_size() > 1:
            raise UnsupportedCollection(
                "growing tables live in one process: DistributedModelParallel and DistributedDataParallel cannot share them.\n"
                "  Possible solution: train the stream in one process; its compact model can be sharded."
            )
        features = ordered(features, self._features)
        bags = dict(zip(self._features, self._bags_of(features), strict=True))
        self.lookups, columns = [], []
        self.forwards += self._trains
        for number, table in enumerate(self.tables):
            slots = [slot for slot in self._slots if slot.table == number]
            columns += self._looked_up(table, [bags[slot.feature] for slot in slots], slots[0].mean)
        return KeyedTensor([s.key for s in self._slots], [s.dim for s in self._slots], torch.cat(columns, dim=1))

    def _bags_of(self, features: KeyedJaggedTensor) -> Iterator["_Bags"]:
        lengths = features.lengths().view(len(self._features), -1)
        weights = features.weights().split(features.length_per_key()) if self._weighted else [None] * len(self._features)
        for ids, of_feature, weight in zip(features.values().split(features.length_per_key()), lengths, weights, strict=True):
            yield _Bags(ids.cpu().long(), of_feature, weight)

    def _looked_up(self, table: GrowingTable, bags: Sequence["_Bags"], mean: bool) -> list[Tensor]:
        """Return the output (B, D) of each of the features that are looked up in a table."""
        ids, inverse, times = torch.cat([each.ids for each in bags]).unique(return_inverse=True, return_counts=True)
        entries = self._admitted(table, ids, times) if self._trains else table.find(ids)
        outputs = table.read(entries, self.device, training=self._trains, searching=self._searching)
        self.lookups.append(Lookup(entries[inverse], torch.cat([each.examples.cpu() for each in bags])))
        base = table.form.base()
        outputs = self._centred(outputs, entries, base)
        inverse = inverse.to(self.device)
        return [
            each.pooled(outputs, positions, base, mean)
            for each, positions in zip(bags, inverse.split([len(each.ids) for each in bags]), strict=True)
        ]

    def _admitted(self, table: GrowingTable, ids: Tensor, times: Tensor) -> Tensor:
        entries = table.admit(ids, times)
        if self.growth is not None:
            known = entries[entries >= 0]
            table.widen(known[self.growth(table, known)])
        return entries

    def _centred(self, outputs: Tensor, entries: Tensor, base: Tensor | None) -> Tensor:
        """Return how far outputs are from the base; those of ids that are not there are at it."""
        centred = outputs if base is None else outputs - base
        known = entries >= 0
        return centred if bool(known.all()) else torch.where(known.to(centred.device)[:, None], centred, 0.0)


@dataclass(frozen=True)
class _Bags:
    """The bags of one feature: ids (n,) on the host, lengths (B,), perhaps weights (n,)."""

    ids: Tensor
    lengths: Tensor
    weights: Tensor | None

    @property
    def examples(self) -> Tensor:
        """The example that each id is of, int64 (n,)."""
        return torch.repeat_interleave(self.lengths)

    def pooled(self, outputs: Tensor, positions: Tensor, base: Tensor | None, mean: bool) -> Tensor:
        """Return the bags' outputs (B, D), of the distinct ids' (n, D) and the position of each id there."""
        rows = F.embedding(positions, outputs)
        rows = rows if self.weights is None else rows * self.weights[:, None]
        if len(rows) != len(self.lengths) or not bool((self.lengths == 1).all()):
            rows = rows.new_zeros(len(self.lengths), rows.shape[1]).index_add(0, self.examples, rows)
        rows = rows / self.lengths.clamp(min=1)[:, None] if mean else rows
        return rows if base is None else rows + base
