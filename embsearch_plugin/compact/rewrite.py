"""Rewriting a model in place: compact collections filled from the tables they replace, optimizer state with them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embsearch_plugin.collection import FoundCollection
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection, chunk_name
from embsearch_plugin.fused import FusedEmbeddingBags, carry_state
from embsearch_plugin.optimizers import Slice, replace_parameter
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.plugins import build_compact
from embsearch_plugin.search.tables import SearchedTables


def slices_of(
    compact: CompactEmbeddingBagCollection,
    index: int,
    plan: TablePlan,
    gate: Tensor | None = None,
    lookup: Tensor | None = None,
) -> Iterator[Slice]:
    """Yield what each stored tensor of a table keeps of the original.

    Args:
        compact: the compact collection.
        index: the table's place in it.
        plan: what the table keeps.
        gate: (S, D), folded into the weights.
        lookup: (V,), each row's block.
    """
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
def fill(part: Slice, weight: nn.Parameter) -> None:
    """Write the kept weights, times their gates, into the new parameter; frozen tables stay frozen."""
    kept = part.of(weight)
    part.new.copy_(kept if part.gates is None else kept.float() * part.gates.to(kept.device))
    part.new.requires_grad_(weight.requires_grad)


def compact_form(found: FoundCollection, plans: Sequence[TablePlan], training: bool) -> CompactEmbeddingBagCollection:
    """Build a collection's compact form, not yet filled."""
    compact = build_compact(found, plans)
    assert isinstance(compact, CompactEmbeddingBagCollection)
    if isinstance(compact.chunks, EmbeddingBagCollection):
        for table, plan in zip(found.tables, plans, strict=True):
            sparse = found.module.get_submodule(f"embedding_bags.{table.name}").sparse
            for number in range(len(plan.chunks)):
                compact.chunks.embedding_bags[chunk_name(table.name, number)].sparse = sparse
    return compact.train(training)


def rewrite(model: nn.Module, tables: SearchedTables, plan: SizePlan, optimizers: Sequence[Optimizer]) -> list[str]:
    """Replace every searchable collection by its compact form, weights and optimizer state carried over.

    Everything is built and filled before anything is replaced.

    Returns:
        The tables that can be trained and that no optimizer holds.
    """
    rewritten = [_rewritten(tables, number, plans) for number, plans in enumerate(tables.split(plan.tables))]
    orphans = []
    for found, supernet, (compact, slices) in zip(tables.found, tables.supernets, rewritten, strict=True):
        found.replace_in(model, compact)
        for index, parts in enumerate(slices):
            weight = supernet.table_weight(index)
            held = [replace_parameter(optimizer, weight, parts) for optimizer in optimizers]
            if not any(held) and weight.requires_grad and supernet.is_plain and parts:
                orphans.append(str(found.tables[index]))
    return orphans


def _rewritten(
    tables: SearchedTables, number: int, plans: Sequence[TablePlan]
) -> tuple[CompactEmbeddingBagCollection, list[list[Slice]]]:
    """Build and fill one collection's compact form; return it with what each of its parameters keeps of each table."""
    found, supernet = tables.found[number], tables.supernets[number]
    compact = compact_form(found, plans, supernet.training)
    slices = []
    for index, plan in enumerate(plans):
        cut = None if tables.blocks is None else tables.split(tables.blocks)[number][index]
        gate = None if cut is None else supernet.gates[index]
        slices.append(list(slices_of(compact, index, plan, gate, None if cut is None else cut.lookup())))
        for part in slices[-1]:
            fill(part, supernet.table_weight(index))
    if isinstance(supernet.inner, FusedEmbeddingBags):
        _fuse_alike(supernet.inner, compact, slices)
    return compact, slices


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
