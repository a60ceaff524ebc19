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
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embsearch_plugin import distributed
from embsearch_plugin.autocast import Autocast
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SessionError, UnsupportedCollection
from embsearch_plugin.fused import FusedEmbeddingBags, requested
from embsearch_plugin.lookup.bags import (
    SplitBags,
    check_readers,
    columns_of,
    has_long_bags,
    ids_of,
    one_per_bag,
    ordered,
    rows_at,
    split_by_cell,
)
from embsearch_plugin.lookup.readers import Read, Readers, TableRows
from embsearch_plugin.lookup.single import is_single, rows_of
from embsearch_plugin.lookup.slots import Slot, slots_of
from embsearch_plugin.lookup.tracing import leaf
from embsearch_plugin.space import RowBlocks
from embsearch_plugin.supernet.captured import Captured
from embsearch_plugin.supernet.forms import Form
from embsearch_plugin.supernet.gating import gate_cells, gate_rows
from embsearch_plugin.supernet.pieces import Pieces
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
        self._features = list(dict.fromkeys(slot.feature for slot in self.slots))
        starts = list(accumulate((table.rows for table in tables), initial=0))
        self._readers = Readers(
            self._features,
            [slot.feature for slot in self.slots],
            rows=[tables[slot.table].rows for slot in self.slots],
            starts=[starts[slot.table] for slot in self.slots],
        )
        self._read: Read | None = None  # what they read of the batch that is running, where that is done together
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
        self._used: list[Tensor] = []  # the gates of the forward that is running
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
        return {**self.__dict__, "next_gates": next_gates, "_used": [], "_read": None}

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
        features, self.bags = ordered(features, self._features), features.stride()
        owners = torch.is_grad_enabled() and self._candidates is None and not self.counts_always  # which a search's are not
        weight_step = self.training and owners
        self._used = self._candidates or (self.next_gates if weight_step else None) or self._gates
        self.forwards += owners
        if weight_step:
            self.autocast = Autocast.now(features.values().device.type)
        self._read = self._read_together(features) if self._readers.together(features) else None
        if self._read is None and (self._pieces is None or self.weighs):  # otherwise reading blocks finds ids without a row
            self._check(features)
        output = self._output(features)
        if self.counts is not None and (owners or self.counts_always):  # a frozen model trains in evaluation mode
            self._count(features, self.counts)
        self._read = None
        return output

    def _check(self, features: KeyedJaggedTensor) -> None:
        check_readers(features, [(self.tables[s.table].name, s.feature, self.tables[s.table].rows) for s in self.slots])

    def _read_together(self, features: KeyedJaggedTensor) -> Read:
        """Return what all slots read, all of it ids that have a row."""
        read = self._readers.read(features)
        if not torch.compiler.is_exporting() and not read.have_rows(self._readers.of("rows", read.ids.device)):
            self._check(features)
        return read

    def _output(self, features: KeyedJaggedTensor) -> KeyedTensor:
        values = self._gated(features)
        if len(self.forms):
            values = self._formed(values)
        if self.captured is not None:
            values = values.detach().requires_grad_()
            self.captured.append(Captured(self, features, values))
        return KeyedTensor([s.key for s in self.slots], self.output_dims, values)

    def _gated(self, features: KeyedJaggedTensor) -> Tensor:
        """Return what is looked up, gated where gates multiply rows: (B, sum of widths)."""
        if self._virtual is not None or self._kept:
            return self._pool_by_row(features)
        if self.weighs or self._pieces is None:
            return torch.cat([look_up() for _, look_up in self._lookups(features)], 1)
        if has_long_bags(features):
            by_row = self.is_plain and self._most_cells() > MOST_CELLS
            return self._pool_by_row(features) if by_row else self._pool_split(features)
        rows = self._gate_rows(features)  # before the lookup: it finds ids without a row, which fused kernels overwrite
        pooled = [look_up() for _, look_up in self._lookups(features)]
        return gate_rows(pooled, self._pieces.table(self._used), rows)

    def _formed(self, values: Tensor) -> Tensor:
        """Let every table's form make its output: (B, sum of dims)."""
        forms: list[Form] = list(self.forms)  # type: ignore[arg-type]
        gates = self._used if self.weighs else []
        if len(self.slots) == len(forms) and not any(gate.dim() == 3 for gate in gates):
            made = forms[0].together(forms, values, gates)
            if made is not None:
                return made
        widths = [sum(slot.dim for slot in slots) for _, slots in groupby(self.slots, key=lambda slot: slot.table)]
        return torch.cat([self._form(table, part) for table, part in enumerate(values.split(widths, 1))], 1)

    def _form(self, table: int, pooled: Tensor) -> Tensor:
        """Let a table's form make its output of what is pooled, (B, features x W): all its bags at once."""
        form: Form = self.forms[table]  # type: ignore[assignment]
        bags = pooled.reshape(-1, form.width)
        if not self.weighs:
            return form(bags).reshape(len(pooled), -1)
        gates = self._used[table]
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
        with torch.no_grad(), _steps_kept(self.inner):
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

    def _blocks_of(self, slot: Slot, ids: Tensor) -> Tensor:
        """Return the block of each id of a slot, (n,)."""
        assert self._blocks is not None
        return rows_at(self._blocks.of(slot.table), ids, self.tables[slot.table].name, slot.feature)

    def _slot_blocks(self, ids: Mapping[str, Tensor]) -> dict[Slot, Tensor]:
        """Return for each slot the block of each of its ids, (n,)."""
        if self._read is None:
            return {slot: self._blocks_of(slot, ids[slot.feature]) for slot in self.slots}
        assert self._blocks is not None
        blocks = self._blocks.whole.index_select(0, self._rows_read(self._read)).split(self._read.counts)
        return dict(zip(self.slots, blocks, strict=True))

    def _rows_read(self, read: Read) -> Tensor:
        """Return which of all tables' rows, one table after the other, is read, (n,)."""
        return read.ids + self._readers.of("starts", read.ids.device).index_select(0, read.reader)

    def _gate_rows(self, features: KeyedJaggedTensor) -> Tensor:
        """Return the row of the pieces' table that gates each piece of the output, for bags of at most one id."""
        ids, lengths = ids_of(features), features.lengths().view(len(self._features), -1)
        of_feature = dict(zip(self._features, lengths, strict=True))
        blocks = [one_per_bag(of_feature[slot.feature], of_ids) for slot, of_ids in self._slot_blocks(ids).items()]
        assert self._pieces is not None
        groups = self._groups(len(blocks[0]), len(self._used[0])) if self._used[0].dim() == 3 else None
        return self._pieces.rows(torch.stack(blocks), groups, len(self._used[0]))

    def _pool_split(self, features: KeyedJaggedTensor) -> Tensor:
        """Pool bags of any length, block by block: (B, sum of dims)."""
        cells, digits, size = self._cells(ids_of(features))
        split = split_by_cell(features, cells, size)
        return torch.cat(
            [self._gated_run(slots, look_up(), split, digits) for slots, look_up in self._lookups(split.features)], 1
        )

    def _gated_run(self, slots: Sequence[Slot], pooled: Tensor, split: SplitBags, digits: Mapping[Slot, Tensor]) -> Tensor:
        """Gate and add up what is pooled per cell, (S x B, sum of the slots' dims)."""
        pooled = pooled.view(split.counts.shape[1], -1, pooled.shape[1])
        if any(slot.mean for slot in slots):
            shares = dict(zip(self._features, split.share, strict=True))
            pooled = pooled * _mean_shares(slots, shares)
        rows = torch.cat([self._used[slot.table].index_select(-2, digits[slot]) for slot in slots], dim=-1)
        if rows.dim() == 3:
            rows = rows.index_select(0, self._groups(pooled.shape[1], len(rows))).transpose(0, 1)
            return (pooled * rows).sum(0)
        return gate_cells(pooled, rows, overwrite=isinstance(self.inner, FusedEmbeddingBags))

    def _cells(self, ids: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[Slot, Tensor], int]:
        """Return the cell of each id per feature; per slot, the block that each of the S cells stands for; and S."""
        by_feature = {f: [slot for slot in self.slots if slot.feature == f] for f in ids}
        blocks, size = {slot: self._gates[slot.table].shape[0] for slot in self.slots}, self._most_cells()
        of_ids = self._slot_blocks(ids)
        numbers = torch.arange(size, device=self.device)
        cells, digits = [], {}
        for slots in by_feature.values():
            cell, base = of_ids[slots[0]], blocks[slots[0]]
            digits[slots[0]] = numbers % base
            for slot in slots[1:]:
                cell = cell.int() + of_ids[slot].int() * base
                digits[slot] = (numbers // base) % blocks[slot]
                base *= blocks[slot]
            cells.append(cell)
        return cells, digits, size

    def _most_cells(self) -> int:
        """Return the largest number of cells of any feature: its tables' numbers of blocks multiplied."""
        cells = dict.fromkeys(self._features, 1)
        for slot in self.slots:
            cells[slot.feature] *= self._gates[slot.table].shape[0]
        return max(cells.values())

    def _pool_by_row(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up row by row, gate and pool: (B, sum of dims). For what no kernel does, with operations that can be slow."""
        pooled, bags = [], features.to_dict()
        for slot in self.slots:
            bag = bags[slot.feature]
            gates = None if self.weighs else self._gates_of_ids(slot, bag)  # finds ids without a row
            rows = self._rows(slot.table, bag.values())
            weights = bag.weights_or_none() if self.is_weighted() else None
            pooled.append(_pool(rows if gates is None else rows * gates, bag.lengths().long(), weights, slot.mean))
        return torch.cat(pooled, dim=1)

    def _gates_of_ids(self, slot: Slot, bag: JaggedTensor) -> Tensor:
        """Return the gate row of each id of a slot, (n, D)."""
        blocks, gates = self._blocks_of(slot, bag.values()).long(), self._used[slot.table]
        if gates.dim() == 2:
            return gates.index_select(0, blocks)
        groups = self._groups(len(bag.lengths()), len(gates))
        return gates[groups.repeat_interleave(bag.lengths().long()), blocks]

    def _rows(self, table: int, ids: Tensor) -> Tensor:
        """Return rows, float32 (n, W): as a virtual weight step moved them, and without the weights that take no part."""
        weight = self.table_weight(table)
        if self._virtual is not None:
            rows = self._virtual.lookup((id(self), table), weight, ids)
        else:
            sparse = bool(self.inner.embedding_bags[self.tables[table].name].sparse)
            rows = F.embedding(ids, weight if self._candidates is None else weight.detach(), sparse=sparse)
        return rows.float() * self._kept[table].index_select(0, ids) if self._kept else rows.float()

    def _count(self, features: KeyedJaggedTensor, counts: TableRows) -> None:
        counts = self.counts = counts.on(features.values().device)
        if self._read is not None:
            counts.whole.index_add_(0, self._rows_read(self._read), torch.ones_like(self._read.ids, dtype=counts.whole.dtype))
            return
        ids = ids_of(features)
        for slot in self.slots:
            of_slot = ids[slot.feature]
            counts.of(slot.table).index_add_(0, of_slot, torch.ones_like(of_slot, dtype=counts.whole.dtype))


def _mean_shares(slots: Sequence[Slot], shares: Mapping[str, Tensor]) -> Tensor:
    """Per cell, bag and column: the factor that makes a mean over the cell's ids a part of the mean over the bag.

    Args:
        shares: per feature (S, B).

    Returns:
        (S, B, sum of dims); one where a table is summed.
    """
    columns = [shares[slot.feature] if slot.mean else torch.ones_like(shares[slot.feature]) for slot in slots]
    repeats = torch.tensor([slot.dim for slot in slots], device=columns[0].device)
    return torch.stack(columns, dim=-1).repeat_interleave(repeats, dim=-1)


@contextmanager
def _steps_kept(inner: nn.Module) -> Iterator[None]:
    """Restore the step counters of TBE kernels, which some optimizers (Adam) advance in every forward."""
    kernels = inner.kernels if isinstance(inner, FusedEmbeddingBags) else inner.modules()
    counted = [k for k in kernels if isinstance(k, SplitTableBatchedEmbeddingBagsCodegen) and hasattr(k, "iter")]
    saved = [(k, k.iter.clone(), k.iter_cpu.clone()) for k in counted]
    try:
        yield
    finally:
        for kernel, steps, steps_cpu in saved:
            kernel.iter.copy_(steps)
            kernel.iter_cpu.copy_(steps_cpu)


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
