"""The searchable collection: the user's own EmbeddingBagCollection, and gates on what it looks up.

    output of a bag = T( sum over ids i of  w_i * E[i] * G[block(i), :] )          G: S x W per table

T is the table's form, where the algorithm has one (:mod:`embsearch_plugin.supernet.forms`); otherwise W is D and T nothing.

The collection itself is kept inside, untouched: its parameters, its kernels and (once sharded) its communication are what
they were. Gates act on what comes out. A bag of one id comes out as one row, to be multiplied by one gathered gate row. A
longer bag is split by row block first, so that every part of it has one gate row.

Shapes: gates of a table are (S, C), or (N, S, C) for gates that groups of examples share: example b reads those of group
(b // examples of a group) modulo N. C is W, or the number of candidates where the form weighs them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embsearch_plugin import distributed
from embsearch_plugin.autocast import Autocast
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SessionError, UnsupportedCollection
from embsearch_plugin.fused import FusedEmbeddingBags, requested, steps_kept
from embsearch_plugin.lookup.bags import SplitBags, columns_of, has_long_bags, ids_of, one_per_bag, split_by_cell
from embsearch_plugin.lookup.readers import TableRows
from embsearch_plugin.lookup.single import is_single, rows_of
from embsearch_plugin.lookup.slots import Slot, slots_of
from embsearch_plugin.lookup.tracing import leaf
from embsearch_plugin.space import RowBlocks
from embsearch_plugin.supernet.captured import Captured
from embsearch_plugin.supernet.cells import Cells, mean_shares, most_cells
from embsearch_plugin.supernet.forms import Form
from embsearch_plugin.supernet.gating import gate_cells, gate_rows
from embsearch_plugin.supernet.pieces import Pieces
from embsearch_plugin.supernet.rows import BatchRows, RowReaders
from embsearch_plugin.supernet.virtual import VirtualRows

# Of long bags each kernel's output is S times as large as the collection's; smaller ones can take each other's memory. A GPU
# has one kernel: there a step of 26 tables is mostly the time that it takes to launch them.
KERNEL_COLUMNS = 256
MOST_CELLS = 64  # of a feature that several tables read, whose blocks multiply; beyond, plain tables' rows are gated one by one


class TooSmallBatch(Exception):
    """A search step met a batch with too few examples to say anything; the next one is taken."""


class SearchableEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection whose output is gated by row block and column.

    Input, output keys, their order, dims and dtype are the original's. ``state_dict`` keys too: the collection inside
    does not show in them; forms add theirs.

    Args:
        inner: the original collection; one of the forms' widths, where these differ.
        tables: the original tables.
        configs: the original configs.
        forms: one per table, all of a kind; or none.
    """

    def __init__(
        self,
        inner: EmbeddingBagCollectionInterface,
        tables: Sequence[Table],
        configs: Sequence[EmbeddingBagConfig],
        forms: Sequence[Form] = (),
    ) -> None:
        super().__init__()
        self.inner = inner
        self.tables = tuple(tables)
        self.forms = nn.ModuleList(forms).to(self.device)
        self.weighs = any(form.weighs for form in forms)
        self._configs = list(configs)
        self._weighted: bool = inner.is_weighted()
        self.slots = slots_of(inner.embedding_bag_configs())  # as looked up, W columns each
        self._widths = [config.embedding_dim for config in inner.embedding_bag_configs()]
        self.output_dims = [slot.dim for slot in slots_of(configs)]
        self._readers = RowReaders(tables, self.slots)
        self.counts: TableRows | None = None  # how often each row was read, while ids are counted
        self.counts_always = False  # in forwards without gradients, too
        self.fused_params: Mapping[str, Any] | None = None
        self.folds_gates = True  # whether gates are part of the weights, or only say which take part
        self.autocast: Autocast | None = None  # of the last training forward
        self.forwards = 0  # by the owner of the model, with gradients
        # Not buffers: they are made after the model, and a copy of it made before (for averaging, say) has none; and they
        # must stay float32 where the model is converted.
        self._gates: list[Tensor] = []
        self._blocks: TableRows | None = None
        if self.weighs:
            self._gates = [torch.full((1, form.n_gates), 1 / form.n_gates, device=self.device) for form in forms]
        self.next_gates: list[Tensor] | None = None  # of training forwards, in place of the gates; may carry a graph
        self._candidates: list[Tensor] | None = None  # gates of a search step, in place of either
        self.bags = 0  # per feature, of the last forward: examples, unless the model looks up more for each
        self.group = 1  # examples that share gates, where gates are those of groups
        self._virtual: VirtualRows | None = None
        self._kept: list[Tensor] = []  # per table (V, W): the single weights that take part; empty where all do
        self.captured: list[Captured] | None = None  # outputs, while a gradient is wanted there
        self.smallest_batch = 1
        self._pieces: Pieces | None = None
        self.register_state_dict_post_hook(_hide_inner)
        self.register_load_state_dict_pre_hook(_find_inner)

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return next(self.inner.parameters()).device

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The original configs."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._weighted

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model belongs to no search: it has the gates that are in use, and none of a search's graph."""
        next_gates = None if self.next_gates is None else [gate.detach() for gate in self.next_gates]
        return {**self.__dict__, "next_gates": next_gates}

    def set_blocks(self, blocks: Sequence[RowBlocks], device: torch.device) -> None:
        """Say which row is in which block. Gates start at one; later calls keep them."""
        self._blocks = TableRows([cut.lookup() for cut in blocks], device)
        if self._pieces is None and not self.weighs:
            self._gates = [
                torch.ones(len(b.sizes), width, device=device) for width, b in zip(self._widths, blocks, strict=True)
            ]
        self._pieces = Pieces(self.slots, [len(cut.sizes) for cut in blocks])

    def set_gates(self, gates: Sequence[Tensor]) -> None:
        """Write the gates, per table (S, C)."""
        for mine, gate in zip(self._gates, gates, strict=True):
            mine.copy_(gate)

    @property
    def gates(self) -> list[Tensor]:
        """The gates, per table float32 (S, C); none before :meth:`set_blocks`, unless forms weigh."""
        return self._gates

    def row_gates(self, table: int) -> Tensor:
        """Return the gates that are part of a table's weights, float32 (S, W).

        One where they only say which weights take part, and where the table's form weighs candidates instead.
        """
        gates = self._gates[table]
        if self.weighs or not self.folds_gates:
            return gates.new_ones(len(gates), self._widths[table])
        return gates

    def keep_weights(self, kept: Sequence[Tensor]) -> None:
        """Let only these single weights take part, per table bool (V, W); the others are looked up as zero, and do not train.

        Raises:
            UnsupportedCollection: where tables are fused or sharded: their kernels look up whole rows.
        """
        if kept:
            self.fuse()  # where no forward has run yet
        if kept and not self.is_plain:
            raise UnsupportedCollection(
                "single weights can be left out of tables only that are plain parameters; these are fused or sharded.\n"
                "  Possible solutions: 1) train without fused= on one device  2) an algorithm that prunes blocks and columns."
            )
        self._kept = [mask.to(self.device) for mask in kept]

    @property
    def kept(self) -> list[Tensor]:
        """Which single weights take part, per table bool (V, W); empty where all do."""
        return self._kept

    def form_parameters(self, table: int) -> list[nn.Parameter]:
        """Return the parameters of a table's form."""
        return list(self.forms[table].parameters()) if len(self.forms) else []

    @property
    def is_plain(self) -> bool:
        """Whether the tables are plain parameters of this process."""
        return type(self.inner) is EmbeddingBagCollection

    @property
    def is_local(self) -> bool:
        """Whether whole tables are on this process, plain or fused; not so once they are sharded."""
        return self.is_plain or isinstance(self.inner, FusedEmbeddingBags)

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """The tables by name, as the original has them."""
        return self.inner.embedding_bags

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SearchableEmbeddingBagCollection":
        super()._apply(fn, recurse)
        self._gates = [gate.to(self.device) for gate in self._gates]
        self.next_gates = None
        self._blocks = None if self._blocks is None else self._blocks.on(self.device)
        self._kept = [mask.to(self.device) for mask in self._kept]
        return self

    def fuse(self) -> None:
        """Put plain tables on fused kernels, where that was asked for; the first forward does, where they stay."""
        if isinstance(self.inner, EmbeddingBagCollection):
            params = requested(self.inner, self.fused_params)
            if params is not None:
                if distributed.world_size() > 1:
                    raise SessionError(
                        "fused kernels train each process's tables by themselves, and replicas would drift apart.\n  Possible "
                        "solutions: 1) DistributedModelParallel, which shards them  2) plain tables and a dense optimizer."
                    )
                columns = KERNEL_COLUMNS if self.device.type == "cpu" else None
                self.inner = FusedEmbeddingBags(self.inner, params, kernel_columns=columns, ids_checked=True)

    def table_weight(self, table: int) -> nn.Parameter:
        """Return a table's weights, (V, D), where whole tables are on this process."""
        weight = self.inner.embedding_bags[self.tables[table].name].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def weight_pieces(self, table: int) -> list[tuple[int, int, Tensor]]:
        """Return the parts of a table's weights that this process answers for: (first row, first column, weights)."""
        if self.is_local:
            return [(0, 0, self.table_weight(table).detach())]
        weight = self.inner.state_dict()[f"embedding_bags.{self.tables[table].name}.weight"]
        if isinstance(weight, ShardedTensor):
            shards = [(shard.metadata.shard_offsets, shard.tensor) for shard in weight.local_shards()]
            return [(row, column, part) for (row, column), part in shards]
        return [(0, 0, weight)] if distributed.is_first() else []  # replicated

    @contextmanager
    def searching(self, candidates: Sequence[Tensor], virtual: VirtualRows | None = None, group: int = 1) -> Iterator[None]:
        """Within it, ``candidates`` take the place of the gates and are all that gets a gradient here.

        Rows are looked up under ``no_grad``, so that no backward reaches a table; with ``virtual`` they are looked up as
        they would be after a weight step.
        """
        before, self.group = self.group, group
        self._candidates, self._virtual = list(candidates), virtual
        try:
            yield
        finally:
            self._candidates = self._virtual = None
            self.group = before

    # What it does depends on ids and on the step; a compiled model is compiled around it, once.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @leaf
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up, gate and pool: (B, sum of dims), keyed as the original."""
        features = maybe_td_to_kjt(features)
        if self._candidates is not None and features.stride() < self.smallest_batch:
            raise TooSmallBatch
        self.fuse()
        rows = self._readers.read(features)
        self.bags = rows.features.stride()
        owners = torch.is_grad_enabled() and self._candidates is None and not self.counts_always  # which a search's are not
        weight_step = self.training and owners
        self.forwards += owners
        if weight_step:
            self.autocast = Autocast.now(rows.features.values().device.type)
        output = self._output(rows, self._candidates or (self.next_gates if weight_step else None) or self._gates)
        if self.counts is not None and (owners or self.counts_always):  # a frozen model trains in evaluation mode
            self.counts = self.counts.on(rows.features.values().device)
            rows.count(self.counts)
        return output

    def _output(self, rows: BatchRows, gates: Sequence[Tensor]) -> KeyedTensor:
        values = self._gated(rows, gates)
        if len(self.forms):
            values = self._formed(values, gates)
        if self.captured is not None:
            values = values.detach().requires_grad_()
            self.captured.append(Captured(self, rows.features, values))
        return KeyedTensor([s.key for s in self.slots], self.output_dims, values)

    def _gated(self, rows: BatchRows, gates: Sequence[Tensor]) -> Tensor:
        """Return what is looked up, gated where gates multiply rows: (B, sum of widths)."""
        if self._blocks is None or self.weighs:
            rows.check()  # below, reading blocks finds ids without a row, before fused kernels overwrite them
            if self._virtual is not None or self._kept:
                return self._pool_by_row(rows)
            return torch.cat([look_up() for _, look_up in self._lookups(rows.features)], 1)
        blocks = rows.blocks(self._blocks)
        if self._virtual is not None or self._kept:
            return self._pool_by_row(rows, self._gates_of_ids(rows, blocks, gates))
        if not has_long_bags(rows.features):
            return self._pool_single(rows, blocks, gates)
        if self.is_plain and most_cells(self.slots, self._n_blocks) > MOST_CELLS:
            return self._pool_by_row(rows, self._gates_of_ids(rows, blocks, gates))
        return self._pool_split(rows, blocks, gates)

    def _formed(self, values: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Let every table's form make its output: (B, sum of dims)."""
        forms: list[Form] = list(self.forms)  # type: ignore[arg-type]
        weights = gates if self.weighs else []
        if len(self.slots) == len(forms) and not any(weight.dim() == 3 for weight in weights):
            made = forms[0].together(forms, values, weights)
            if made is not None:
                return made
        widths = [sum(slot.dim for slot in slots) for _, slots in groupby(self.slots, key=lambda slot: slot.table)]
        parts = enumerate(values.split(widths, 1))
        return torch.cat([self._form(forms[table], part, weights[table] if weights else None) for table, part in parts], 1)

    def _form(self, form: Form, pooled: Tensor, gates: Tensor | None) -> Tensor:
        """Let a table's form make its output of what is pooled, (B, features x W): all its bags at once."""
        bags = pooled.reshape(-1, form.width)
        if gates is None:
            return form(bags).reshape(len(pooled), -1)
        if gates.dim() == 3:
            gates = gates[:, 0].index_select(0, self._groups(len(pooled), len(gates)))
            gates = gates.repeat_interleave(len(bags) // len(pooled), 0)
        return form(bags, gates).reshape(len(pooled), -1)

    def _groups(self, batch: int, n_groups: int) -> Tensor:
        """Return the group of each example, (B,)."""
        return (torch.arange(batch, device=self.device) // self.group) % n_groups

    def _lookups(self, features: KeyedJaggedTensor) -> list[tuple[Sequence[Slot], Callable[[], Tensor]]]:
        """Return runs of slots, one after the other, and what pools their rows without gates: (B, sum of their dims)."""
        if isinstance(self.inner, FusedEmbeddingBags) and self.inner.kernels_in_order:
            runs = self.inner.lookups(features)
        else:
            runs = [(self.slots, partial(self._pooled, features))]
        return [(slots, partial(self._without_trace, look_up)) for slots, look_up in runs]

    def _without_trace(self, look_up: Callable[[], Tensor]) -> Tensor:
        """Look up; for a search so that no backward reaches a table, and no kernel takes it for a step."""
        if self._candidates is None and not self.counts_always:
            return look_up()
        with torch.no_grad(), steps_kept(self.inner):
            return look_up()

    def _pooled(self, features: KeyedJaggedTensor) -> Tensor:
        """Return what the collection inside looks up, in the order of the slots: (B, sum of their dims)."""
        if is_single(self.inner, features):
            ids = ids_of(features)
            return torch.cat([rows_of(self.table_weight(slot.table), ids[slot.feature]) for slot in self.slots], dim=1)
        pooled: KeyedTensor = self.inner(features)
        if pooled.keys() == [slot.key for slot in self.slots]:
            return pooled.values()
        columns = columns_of(pooled)
        return torch.cat([columns[slot.key] for slot in self.slots], dim=1)

    @property
    def _n_blocks(self) -> list[int]:
        return [gates.shape[0] for gates in self._gates]

    def _pool_single(self, rows: BatchRows, blocks: Mapping[Slot, Tensor], gates: Sequence[Tensor]) -> Tensor:
        """Pool bags of at most one id, and multiply each by the gate row of its block: (B, sum of dims)."""
        lengths = rows.features.lengths().view(len(rows.ids), -1)
        of_feature = dict(zip(rows.ids, lengths, strict=True))
        of_bags = torch.stack([one_per_bag(of_feature[slot.feature], of_ids) for slot, of_ids in blocks.items()])
        groups = self._groups(of_bags.shape[1], len(gates[0])) if gates[0].dim() == 3 else None
        assert self._pieces is not None
        pieces = self._pieces.rows(of_bags, groups, len(gates[0]))
        pooled = [look_up() for _, look_up in self._lookups(rows.features)]
        return gate_rows(pooled, self._pieces.table(gates), pieces)

    def _pool_split(self, rows: BatchRows, blocks: Mapping[Slot, Tensor], gates: Sequence[Tensor]) -> Tensor:
        """Pool bags of any length, block by block: (B, sum of dims)."""
        cells = Cells.of(blocks, self._n_blocks, self.device)
        split = split_by_cell(rows.features, cells.of_ids, cells.size)
        runs = self._lookups(split.features)
        return torch.cat([self._gated_run(slots, look_up(), split, cells, gates) for slots, look_up in runs], 1)

    def _gated_run(
        self, slots: Sequence[Slot], pooled: Tensor, split: SplitBags, cells: Cells, gates: Sequence[Tensor]
    ) -> Tensor:
        """Gate and add up what is pooled per cell, (S x B, sum of the slots' dims)."""
        pooled = pooled.view(cells.size, -1, pooled.shape[1])
        if any(slot.mean for slot in slots):
            shares = dict(zip(split.features.keys(), split.share, strict=True))
            pooled = pooled * mean_shares(slots, shares)
        rows = torch.cat([gates[slot.table].index_select(-2, cells.blocks[slot]) for slot in slots], dim=-1)
        if rows.dim() == 3:
            rows = rows.index_select(0, self._groups(pooled.shape[1], len(rows))).transpose(0, 1)
            return (pooled * rows).sum(0)
        return gate_cells(pooled, rows, overwrite=isinstance(self.inner, FusedEmbeddingBags))

    def _pool_by_row(self, rows: BatchRows, gates: Mapping[Slot, Tensor] | None = None) -> Tensor:
        """Look up row by row, gate and pool: (B, sum of dims). For what no kernel does, with operations that can be slow.

        Args:
            rows: of the batch.
            gates: for each slot the gate row of each id, (n, D), where rows are gated.
        """
        pooled, bags = [], rows.features.to_dict()
        for slot in self.slots:
            bag = bags[slot.feature]
            looked_up = self._rows(slot.table, bag.values())
            weights = bag.weights_or_none() if self.is_weighted() else None
            gated = looked_up if gates is None else looked_up * gates[slot]
            pooled.append(_pool(gated, bag.lengths().long(), weights, slot.mean))
        return torch.cat(pooled, dim=1)

    def _gates_of_ids(self, rows: BatchRows, blocks: Mapping[Slot, Tensor], gates: Sequence[Tensor]) -> dict[Slot, Tensor]:
        """Return for each slot the gate row of each id, (n, D)."""
        if gates[0].dim() == 2:
            return {slot: gates[slot.table].index_select(0, of_ids.long()) for slot, of_ids in blocks.items()}
        groups = self._groups(rows.features.stride(), len(gates[0]))
        bags = rows.features.to_dict()
        of_ids = {name: groups.repeat_interleave(bag.lengths().long()) for name, bag in bags.items()}
        return {slot: gates[slot.table][of_ids[slot.feature], block.long()] for slot, block in blocks.items()}

    def _rows(self, table: int, ids: Tensor) -> Tensor:
        """Return rows, float32 (n, W): as a virtual weight step moved them, and without the weights that take no part."""
        weight = self.table_weight(table)
        if self._virtual is not None:
            rows = self._virtual.lookup((id(self), table), weight, ids)
        else:
            sparse = bool(self.inner.embedding_bags[self.tables[table].name].sparse)
            rows = F.embedding(ids, weight if self._candidates is None else weight.detach(), sparse=sparse)
        return rows.float() * self._kept[table].index_select(0, ids) if self._kept else rows.float()


def _pool(rows: Tensor, lengths: Tensor, weights: Tensor | None, mean: bool) -> Tensor:
    """Pool rows (n, D), weighed, into bags (B, D) with operations that can be differentiated twice."""
    rows = rows if weights is None else rows * weights[:, None]
    of_bag = torch.repeat_interleave(torch.arange(lengths.numel(), device=rows.device), lengths)
    pooled = rows.new_zeros(lengths.numel(), rows.shape[1]).index_add(0, of_bag, rows)
    return pooled / lengths.clamp(min=1)[:, None] if mean else pooled


def _hide_inner(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}inner.")]:
        state[prefix + key.removeprefix(f"{prefix}inner.")] = state.pop(key)


def _find_inner(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith((f"{prefix}inner.", f"{prefix}forms."))]:
        state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
