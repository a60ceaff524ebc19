"""Rewriting a model in place: compact collections filled from the tables they replace, optimizer state with them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from embsearch_plugin.collection import FoundCollection
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection, chunk_name
from embsearch_plugin.fused import FusedEmbeddingBags, carry_state
from embsearch_plugin.optimizers import Slice, replace_parameter
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.plugins import build_compact
from embsearch_plugin.search.tables import SearchedTables
from embsearch_plugin.space import RowBlocks


def slices_of(
    compact: CompactEmbeddingBagCollection, index: int, gate: Tensor | None = None, lookup: Tensor | None = None
) -> Iterator[Slice]:
    """Yield what each stored tensor of a table keeps of the original.

    Args:
        compact: the compact collection.
        index: the table's place in it.
        gate: (S, D), folded into the weights.
        lookup: (V,), each row's block.
    """
    plan = compact.plans[index]
    row_gates = None if gate is None or lookup is None or bool((gate == 1).all()) else (gate.cpu(), lookup.long())
    if plan.mask is not None:
        values = compact.fine[str(index)].values
        assert isinstance(values, nn.Parameter)
        gates = None if row_gates is None else row_gates[0][row_gates[1]][plan.mask]
        yield Slice(values, mask=plan.mask, gates=gates)
        return
    for number, chunk in enumerate(plan.chunks):
        rows = _kept_rows(plan, chunk.rows)
        columns = _kept_columns(plan, chunk.start, chunk.width)
        gates = None if row_gates is None else _gates_of(*row_gates, rows, columns)
        yield Slice(compact.chunk_weight(index, number), rows, columns, gates=gates)


def _kept_rows(plan: TablePlan, count: int) -> Tensor | None:
    if plan.order is not None:
        ranked = plan.order.long()
        if count <= ranked.numel():
            return ranked[:count]
    return None if count == plan.table.rows else torch.arange(count)


def _kept_columns(plan: TablePlan, start: int, width: int) -> Tensor | None:
    if width == plan.table.dim and plan.columns is None:
        return None
    columns = torch.tensor(plan.columns) if plan.columns is not None else torch.arange(plan.table.dim)
    return columns[start : start + width]


def _gates_of(gate: Tensor, lookup: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    blocks = lookup if rows is None else lookup[rows]
    return (gate if columns is None else gate[:, columns]).index_select(0, blocks)


@torch.no_grad()
def fill(part: Slice, weight: Tensor) -> None:
    """Write the kept weights, times their gates, into the new parameter."""
    kept = part.of(weight)
    part.new.copy_(kept if part.gates is None else kept.float() * part.gates.to(kept.device))


def put_in_place(model: nn.Module, found: FoundCollection, plans: Sequence[TablePlan]) -> CompactEmbeddingBagCollection:
    """Build a compact collection and put it where ``model`` holds the original."""
    compact = build_compact(found, plans)
    assert isinstance(compact, CompactEmbeddingBagCollection)
    compact.train(found.module.training)
    found.replace_in(model, compact)
    return compact


def rewrite(model: nn.Module, tables: SearchedTables, plan: SizePlan, optimizers: Sequence[Optimizer]) -> None:
    """Replace every searchable collection by its compact form, weights and optimizer state carried over."""
    gates = tables.split(tables.gates if tables.blocks is not None else [None] * len(tables.specs))
    blocks: list[RowBlocks | None] = [None] * len(tables.specs)
    if tables.blocks is not None:
        blocks = list(tables.blocks)
    lookups = tables.split([None if cut is None else cut.lookup() for cut in blocks])
    for found, supernet, plans, gate, lookup in zip(
        tables.found, tables.supernets, tables.split(plan.tables), gates, lookups, strict=True
    ):
        compact = put_in_place(model, found, plans)
        slices = [list(slices_of(compact, i, gate[i], lookup[i])) for i in range(len(plans))]
        for index, parts in enumerate(slices):
            weight = supernet.table_weight(index)
            for part in parts:
                fill(part, weight)
            for optimizer in optimizers:
                replace_parameter(optimizer, weight, parts)
        if isinstance(supernet.inner, FusedEmbeddingBags):
            _fuse_alike(supernet.inner, compact, slices)


def _fuse_alike(old: FusedEmbeddingBags, compact: CompactEmbeddingBagCollection, slices: Sequence[Sequence[Slice]]) -> None:
    """Put the compact tables on fused kernels too, with the optimizer state of the old ones."""
    if compact.chunks is None:
        return
    compact.fuse(old.fused_params)
    assert isinstance(compact.chunks, FusedEmbeddingBags)
    names = {
        config.name: [(chunk_name(config.name, number), part) for number, part in enumerate(parts)]
        for config, parts in zip(compact.embedding_bag_configs(), slices, strict=True)
    }
    carry_state(old, compact.chunks, names)
