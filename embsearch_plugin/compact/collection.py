"""The compact collection: multi-size tables behind the original interface.

A table's rows stand in plan order and its columns in chunks. A chunk is a table of its own, holding the rows that keep it:
a prefix, since blocks nest. All chunks of all tables are the tables of one plain EmbeddingBagCollection inside. An id that
a chunk does not hold is left out of the bag before the lookup: it contributes zero and trains nothing.

    id -> remap -> place;  chunk c looks up the places below its rows;  outputs concatenate to K columns;
    zeros fill up to D, or the table's projection (K, D) makes D of them;  the table's bias is added
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embsearch_plugin.compact.columns import Layout, take_columns
from embsearch_plugin.compact.fine import FineTable, FixedIndex
from embsearch_plugin.compact.places import Holder, Places
from embsearch_plugin.costs import PROJECTION_DTYPE
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.lookup.bags import check_readers, ids_of, ordered
from embsearch_plugin.lookup.readers import Readers
from embsearch_plugin.lookup.single import is_single, rows_of
from embsearch_plugin.lookup.slots import Slot, slots_of
from embsearch_plugin.lookup.tracing import leaf
from embsearch_plugin.plan import Chunk, TablePlan
from embsearch_plugin.randomness import private_random


class TableIndex(FixedIndex):
    """Where a table's columns went, and what makes D columns of those that are stored; only what the plan needs.

    A projection starts as the identity: the first K columns of the output are the stored ones.
    """

    def __init__(self, plan: TablePlan, device: torch.device) -> None:
        super().__init__()
        self.placement: Tensor | None
        self.projection: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_buffer("placement", _placement(plan))
        width, dim = plan.width, plan.table.dim
        projection = torch.eye(width, dim, dtype=PROJECTION_DTYPE, device=device) if plan.projection else None
        bias = torch.zeros(dim, dtype=PROJECTION_DTYPE, device=device) if plan.bias else None
        self.register_parameter("projection", None if projection is None else nn.Parameter(projection))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def outputs(self, columns: Tensor) -> Tensor:
        """Return the table's output (B, D), of its stored columns: (B, K) where it has a projection, else padded, (B, D)."""
        if self.projection is not None:
            with torch.autocast(columns.device.type, enabled=False):  # as in a lookup, which autocast leaves alone
                columns = columns.float() @ self.projection.float()  # whatever the model was converted to
        return columns if self.bias is None else columns + self.bias.float()


def _placement(plan: TablePlan) -> Tensor | None:
    """Return for each original column its place in the column order, int32 (D,); a projection's rows follow that order."""
    if plan.columns is None or plan.projection:
        return None
    placement = torch.empty(plan.table.dim, dtype=torch.int32, device="cpu")
    placement[torch.tensor(plan.columns, device="cpu")] = torch.arange(plan.table.dim, dtype=torch.int32, device="cpu")
    return placement


@dataclass(frozen=True)
class _Part:
    """One slot's share of one chunk: its feature in the collection inside is named by its number.

    Args:
        slot: its number.
        chunk: of the slot's table.
        name: the chunk's, in the collection inside.
        partial: whether the chunk holds some of the table's rows only.
    """

    slot: int
    chunk: Chunk
    name: str
    partial: bool


class CompactEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection stored as a size plan says; same input, same output keys, dims and dtype.

    Args:
        configs: the original configs.
        plans: what each table keeps, in the same order.
        is_weighted: whether ids come with weights.
        device: where to build it.

    The bytes of its parameters and buffers are the plan's ``size_bytes``.
    """

    def __init__(
        self,
        configs: Sequence[EmbeddingBagConfig],
        plans: Sequence[TablePlan],
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        device = device or torch.device("cpu")
        self.tables = tuple(plan.table for plan in plans)
        self._configs = list(configs)
        self._weighted = is_weighted
        self._slots = slots_of(configs)
        self._features = list(dict.fromkeys(slot.feature for slot in self._slots))
        self._parts = [  # in the order in which the collection inside looks them up
            _Part(i, chunk, chunk_name(configs[table].name, number), chunk.rows < plan.table.rows)
            for table, plan in enumerate(plans)
            for number, chunk in enumerate(plan.chunks)
            for i, slot in enumerate(self._slots)
            if slot.table == table
        ]
        self._layouts: dict[tuple[tuple[str, ...], torch.device], Layout] = {}
        tables = _chunk_configs(configs, plans, self._parts, self._slots)
        self.chunks: EmbeddingBagCollectionInterface | None
        self.chunks = _chunk_tables(tables, plans, is_weighted, device) if tables else None
        self.index = nn.ModuleList(TableIndex(plan, device) for plan in plans)
        reads = [slot.feature for slot in self._slots]
        self._readers = Readers(self._features, reads, rows=[configs[slot.table].num_embeddings for slot in self._slots])
        self.places = Places(plans, self._features, [self._holder(part) for part in self._parts], is_weighted)
        # What is put together of the lookup: the K stored columns of a table that has a projection, else D.
        self._widths = [plans[s.table].width if plans[s.table].projection else s.dim for s in self._slots]
        self._plain = not any(s.mean for s in self._slots) and all(
            plan.mask is None and not plan.projection and not plan.bias for plan in plans
        )
        self.fine = nn.ModuleDict({str(i): FineTable(plan, device) for i, plan in enumerate(plans) if plan.mask is not None})
        if device.type != "meta":
            self.to(device)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The original configs: what the model around it was built for."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._weighted

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    def chunk_weight(self, table: int, chunk: int) -> nn.Parameter:
        """Return the weights (rows, width) of a table's chunk."""
        assert self.chunks is not None
        weight = self.chunks.embedding_bags[chunk_name(self._configs[table].name, chunk)].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def fuse(self, fused_params: Mapping[str, Any]) -> None:
        """Train the chunks by FBGEMM's fused kernels; ``fused_params`` are TorchRec's."""
        assert isinstance(self.chunks, EmbeddingBagCollection)
        self.chunks = FusedEmbeddingBags(self.chunks, fused_params, ids_checked=True)

    @leaf
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool: (B, sum of dims), keyed as the original."""
        features = ordered(maybe_td_to_kjt(features), self._features)
        self._check(features)
        output = self._stored_columns(features)
        if not self._plain:
            output = self._finished(output, features)
        return KeyedTensor([s.key for s in self._slots], [s.dim for s in self._slots], output)

    def _finished(self, output: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Put in fine-grained tables' columns, divide sums where means are wanted, project: (B, sum of dims)."""
        columns = list(output.split(self._widths, dim=1))
        lengths = dict(zip(self._features, features.lengths().view(len(self._features), -1), strict=True))
        bags = features.to_dict() if self.fine else {}
        for number, slot in enumerate(self._slots):
            if str(slot.table) in self.fine:
                columns[number] = self.fine[str(slot.table)](bags[slot.feature], self._weighted)
            if slot.mean:
                columns[number] = columns[number] / lengths[slot.feature].clamp(min=1)[:, None]
            columns[number] = self._index(slot).outputs(columns[number])
        return torch.cat(columns, dim=1)

    def _stored_columns(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up every part and put its columns where they belong: (B, sum of widths), zero where none is stored."""
        if self.chunks is None:
            return torch.zeros(features.stride(), sum(self._widths), device=features.device())
        pooled = self._looked_up(self.chunks, features)
        source = self._source(pooled)
        return pooled.values() if source is None else take_columns(pooled.values(), source)

    def _looked_up(self, chunks: EmbeddingBagCollectionInterface, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up every part: (B, sum of the chunks' widths)."""
        leaves_out = any(part.partial for part in self._parts)  # in a forward alone FBGEMM does that as quickly, or more so
        if (leaves_out and not torch.is_grad_enabled()) or not is_single(chunks, features):
            pooled: KeyedTensor = chunks(self._of_parts(features))
            return pooled
        ids, bags = ids_of(features), chunks.embedding_bags
        places = [self.places.of(slot.table, slot.feature, ids[slot.feature]) for slot in self._slots]
        rows = [rows_of(bags[part.name].weight, places[part.slot], partial=part.partial) for part in self._parts]
        widths = [part.chunk.width for part in self._parts]
        return KeyedTensor([str(number) for number in range(len(widths))], widths, torch.cat(rows, dim=1))

    def _of_parts(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Return the bags of every part, of the ids that it holds: a feature of the collection inside for each."""
        values, lengths, weights = self.places.held(features)
        keys = [str(number) for number in range(len(self._parts))]
        return KeyedJaggedTensor(keys, values, weights, lengths, stride=features.stride())

    def _holder(self, part: _Part) -> Holder:
        slot = self._slots[part.slot]
        return Holder(slot.feature, slot.table, part.chunk.rows if part.partial else None)

    def _source(self, pooled: KeyedTensor) -> Tensor | None:
        """Return for each column of the output its column in ``pooled``, or -1; ``None`` where they are the same."""
        order = tuple(pooled.keys()), pooled.values().device
        layout = self._layouts.get(order)
        if layout is None:  # a sharded collection answers in an order of its own
            widths = dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
            starts = dict(zip(widths, accumulate(widths.values(), initial=0), strict=False))
            parts = [
                [(starts[str(n)], part.chunk.width) for n, part in enumerate(self._parts) if part.slot == number]
                for number in range(len(self._slots))
            ]
            layout = Layout.of(parts, self._widths, order[1])
            if not torch.compiler.is_compiling():  # then its tensors may have no content
                self._layouts[order] = layout
        return layout.source([self._index(slot).placement for slot in self._slots], self._widths)

    def _index(self, slot: Slot) -> TableIndex:
        index = self.index[slot.table]
        assert isinstance(index, TableIndex)
        return index

    def _have_rows(self, features: KeyedJaggedTensor) -> bool:
        read = self._readers.read(features)
        return read.have_rows(self._readers.of("rows", read.ids.device))

    def _check(self, features: KeyedJaggedTensor) -> None:
        """Raise an InputError where an id has no row that nothing else checks: on a CPU a remap does."""
        together = self._readers.together(features)
        if together and (torch.compiler.is_exporting() or self._have_rows(features)):
            return
        slots = [(self._configs[s.table], s) for s in self._slots if together or not self.places.is_moved(s.table)]
        check_readers(features, [(config.name, slot.feature, config.num_embeddings) for config, slot in slots])


def chunk_name(table: str, chunk: int) -> str:
    """Name a chunk's table. The last ``#`` ends the original name, so names of two tables' chunks cannot meet."""
    return f"{table}#{chunk}"


def _chunk_tables(
    configs: list[EmbeddingBagConfig], plans: Sequence[TablePlan], is_weighted: bool, device: torch.device
) -> EmbeddingBagCollection:
    """Build the chunks' tables, in the types that the original weights have, whatever their configs say."""
    with private_random(0):
        chunks = EmbeddingBagCollection(configs, is_weighted, device)
    dtypes = [plan.table.dtype for plan in plans for _ in plan.chunks]
    for bag, dtype in zip(chunks.embedding_bags.values(), dtypes, strict=True):
        bag.to(dtype)
    return chunks


def _initialize(init_fn: Callable[[Tensor], Any], weight: Tensor) -> None:
    """Draw a chunk's first weights; a function that knows only the original's shape is replaced by a normal draw."""
    try:
        init_fn(weight)
    except (RuntimeError, ValueError, IndexError):
        nn.init.normal_(weight, std=0.01)


def _chunk_configs(
    configs: Sequence[EmbeddingBagConfig], plans: Sequence[TablePlan], parts: Sequence[_Part], slots: Sequence[Slot]
) -> list[EmbeddingBagConfig]:
    """Return a config per chunk. Weights are drawn as the original's: in a range that depends on its number of rows."""
    return [
        replace(
            config,
            name=chunk_name(config.name, number),
            num_embeddings=chunk.rows,
            embedding_dim=chunk.width,
            pooling=PoolingType.SUM,
            init_fn=partial(_initialize, config.init_fn),
            feature_names=[str(i) for i, part in enumerate(parts) if slots[part.slot].table == t and part.chunk is chunk],
        )
        for t, (config, plan) in enumerate(zip(configs, plans, strict=True))
        for number, chunk in enumerate(plan.chunks)
    ]
