"""The compact collection: multi-size tables behind the original interface.

A table's rows stand in plan order and its columns in chunks. A chunk is a table of its own, holding the rows that keep it:
a prefix, since blocks nest. All chunks of all tables are the tables of one plain EmbeddingBagCollection inside. An id that
a chunk does not hold is left out of the bag before the lookup: it contributes zero and trains nothing.

    id -> remap -> place;  chunk c looks up the places below its rows;  outputs concatenate, zeros fill up to D
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embsearch_plugin.compact.fine import FineTable, FixedIndex
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.plan import Chunk, TablePlan
from embsearch_plugin.randomness import private_random
from embsearch_plugin.supernet.bags import check_ids, columns_of, ordered, rows_at
from embsearch_plugin.supernet.slots import Slot, slots_of


class TableIndex(FixedIndex):
    """Where a table's rows and columns went. Holds a remap and a placement only where the plan needs them."""

    def __init__(self, plan: TablePlan) -> None:
        super().__init__()
        self.remap: Tensor | None
        self.placement: Tensor | None
        self.register_buffer("remap", _remap(plan))
        self.register_buffer("placement", _placement(plan))


def _remap(plan: TablePlan) -> Tensor | None:
    """Return the place of each row, int32 (V,); dropped rows are behind every chunk."""
    if plan.order is None:
        return None
    remap = torch.full((plan.table.rows,), plan.order.numel(), dtype=torch.int32, device="cpu")
    remap[plan.order.long()] = torch.arange(plan.order.numel(), dtype=torch.int32, device="cpu")
    return remap


def _placement(plan: TablePlan) -> Tensor | None:
    """Return for each original column its place in the column order, int32 (D,)."""
    if plan.columns is None:
        return None
    placement = torch.empty(plan.table.dim, dtype=torch.int32, device="cpu")
    placement[torch.tensor(plan.columns, device="cpu")] = torch.arange(plan.table.dim, dtype=torch.int32, device="cpu")
    return placement


@dataclass(frozen=True)
class _Part:
    """One slot's share of one chunk: its feature in the collection inside is named by its number."""

    slot: int
    chunk: Chunk


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
        self._parts = [_Part(i, chunk) for i, slot in enumerate(self._slots) for chunk in plans[slot.table].chunks]
        tables = _chunk_configs(configs, plans, self._parts, self._slots)
        self.chunks: EmbeddingBagCollectionInterface | None
        self.chunks = _chunk_tables(tables, plans, is_weighted, device) if tables else None
        self.index = nn.ModuleList(TableIndex(plan) for plan in plans)
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
        self.chunks = FusedEmbeddingBags(self.chunks, fused_params)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool: (B, sum of dims), keyed as the original."""
        bags = ordered(features, self._features).to_dict()
        pooled = self._pooled_chunks(bags)
        columns = [self._columns_of(i, slot, bags[slot.feature], pooled) for i, slot in enumerate(self._slots)]
        return KeyedTensor([s.key for s in self._slots], [s.dim for s in self._slots], torch.cat(columns, dim=1))

    def _columns_of(self, number: int, slot: Slot, bag: JaggedTensor, pooled: Mapping[str, Tensor]) -> Tensor:
        """Assemble one slot's output, (B, D)."""
        if str(slot.table) in self.fine:
            check_ids(self._configs[slot.table].name, slot.feature, self._configs[slot.table].num_embeddings, bag.values())
            output: Tensor = self.fine[str(slot.table)](bag, self._weighted)
        else:
            output = self._concatenated(number, slot, bag, pooled)
        return output / bag.lengths().clamp(min=1)[:, None] if slot.mean else output

    def _concatenated(self, number: int, slot: Slot, bag: JaggedTensor, pooled: Mapping[str, Tensor]) -> Tensor:
        parts = [pooled[str(i)] for i, part in enumerate(self._parts) if part.slot == number]
        missing = slot.dim - sum(part.shape[1] for part in parts)
        if missing:
            parts.append(torch.zeros(bag.lengths().numel(), missing, device=bag.lengths().device))
        output = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        placement = self._index(slot).placement
        return output if placement is None else output.index_select(1, placement)

    def _pooled_chunks(self, bags: dict[str, JaggedTensor]) -> dict[str, Tensor]:
        """Return what each part looked up, (B, width), by the part's number."""
        if self.chunks is None:
            return {}
        places = [self._places_of(slot, bags[slot.feature]) for slot in self._slots]
        held = [_held(places[p.slot], bags[self._slots[p.slot].feature], p.chunk, self._rows(p)) for p in self._parts]
        weights = torch.cat([w for _, _, w in held if w is not None]) if self._weighted else None
        pooled = self.chunks(
            KeyedJaggedTensor(
                keys=[str(i) for i in range(len(held))],
                values=torch.cat([values for values, _, _ in held]),
                lengths=torch.cat([lengths for _, lengths, _ in held]),
                weights=weights,
                stride=held[0][1].numel(),
            )
        )
        return columns_of(pooled)

    def _index(self, slot: Slot) -> TableIndex:
        index = self.index[slot.table]
        assert isinstance(index, TableIndex)
        return index

    def _rows(self, part: _Part) -> int:
        return self._configs[self._slots[part.slot].table].num_embeddings

    def _places_of(self, slot: Slot, bag: JaggedTensor) -> Tensor:
        """Return the place in plan order of each id, (n,)."""
        config = self._configs[slot.table]
        remap = self._index(slot).remap
        if remap is not None:
            return rows_at(remap, bag.values(), config.name, slot.feature).to(bag.values().dtype)
        if str(slot.table) not in self.fine:
            check_ids(config.name, slot.feature, config.num_embeddings, bag.values())
        return bag.values()


def _held(places: Tensor, bag: JaggedTensor, chunk: Chunk, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leave out the ids that a chunk does not hold; return the rest's values, lengths and weights."""
    lengths, weights = bag.lengths(), bag.weights_or_none()
    if chunk.rows == rows:
        return places, lengths, weights
    keep = places < chunk.rows
    running = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    kept = running.index_select(0, bag.offsets()).diff()
    return places[keep], kept.to(lengths.dtype), None if weights is None else weights[keep]


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
