"""Rewriting a model in place: compact collections filled from the tables they replace, optimizer state with them."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embsearch_plugin.collection import FoundCollection
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection, chunk_name
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.fused import FusedEmbeddingBags, carry_state
from embsearch_plugin.optimizers import (
    Slice,
    add_to_any,
    carried_states,
    exchange,
    groups_in_order,
    put_in_order,
    takers_of_dense,
)
from embsearch_plugin.plan import Chunk, SizePlan, TablePlan
from embsearch_plugin.plugins import build_compact
from embsearch_plugin.search.tables import SearchedTables
from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection

log = logging.getLogger(__name__)


def slices_of(
    compact: CompactEmbeddingBagCollection,
    index: int,
    plan: TablePlan,
    gate: Tensor | None = None,
    lookup: Tensor | None = None,
    fold: Fold = UNFOLDED,
) -> Iterator[Slice]:
    """Yield what each stored tensor of a table keeps of the original.

    Args:
        compact: the compact collection.
        index: the table's place in it.
        plan: what the table keeps.
        gate: (S, W), folded into the weights.
        lookup: (V,), each row's block.
        fold: what the plan's columns are in the searched table.
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
        columns = _kept_columns(plan, fold, chunk)
        gates = None if row_gates is None else _gates_of(*row_gates, rows, columns)
        rotation = None if fold.rotation is None else fold.rotation[:, chunk.start : chunk.start + chunk.width]
        yield Slice(compact.chunk_weight(index, number), rows, columns, gates=gates, rotation=rotation)


def _kept_rows(plan: TablePlan, count: int) -> Tensor | None:
    if plan.order is not None:
        ranked = plan.order.long()
        if count <= ranked.numel():
            return ranked[:count]
    return None if count == plan.table.rows else torch.arange(count)


def _kept_columns(plan: TablePlan, fold: Fold, chunk: Chunk) -> Tensor | None:
    """Return the columns of the searched table that a chunk stores; ``None`` for all of them."""
    if fold.rotation is not None:
        return None
    if fold.columns is not None:
        return fold.columns[chunk.start : chunk.start + chunk.width]
    if chunk.width == plan.table.dim and plan.columns is None:
        return None
    columns = torch.tensor(plan.columns) if plan.columns is not None else torch.arange(plan.table.dim)
    return columns[chunk.start : chunk.start + chunk.width]


def _gates_of(gate: Tensor, lookup: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    blocks = lookup if rows is None else lookup[rows]
    return (gate if columns is None else gate[:, columns]).index_select(0, blocks)


def compact_form(found: FoundCollection, plans: Sequence[TablePlan], training: bool) -> CompactEmbeddingBagCollection:
    """Build a collection's compact form, not yet filled."""
    compact = build_compact(found, plans)
    if isinstance(compact.chunks, EmbeddingBagCollection):
        for table, plan in zip(found.tables, plans, strict=True):
            sparse = found.module.get_submodule(f"embedding_bags.{table.name}").sparse
            for number in range(len(plan.chunks)):
                compact.chunks.embedding_bags[chunk_name(table.name, number)].sparse = sparse
    return compact.train(training)


def rewrite(
    model: nn.Module, tables: SearchedTables, plan: SizePlan, folds: Sequence[Fold], optimizers: Sequence[Optimizer]
) -> list[str]:
    """Replace every searchable collection by its compact form, weights and optimizer state carried over.

    Everything is built, filled and worked out before anything is replaced.

    Returns:
        The tables that can be trained and that no optimizer holds.
    """
    by_collection = zip(tables.split(plan.tables), tables.split(folds), strict=True)
    rewritten = [_rewritten(tables, number, *parts, optimizers) for number, parts in enumerate(by_collection)]
    rotated = sum(fold.rotation is not None for fold in folds)
    if rotated:
        log.info("optimizer state starts anew for %d of %d tables, which are stored in another basis", rotated, len(folds))
    leaving = {id(parameter) for parameter in tables.form_parameters()}  # they may have joined a group late, at its end
    in_order = groups_in_order(optimizers, [p for p in model.parameters() if id(p) not in leaving])
    orphans = []
    for found, supernet, (compact, replacements) in zip(tables.found, tables.supernets, rewritten, strict=True):
        found.replace_in(model, compact)
        for index, (new, states) in enumerate(replacements):
            weight = supernet.table_weight(index)
            _exchange_outputs(compact, supernet, index, optimizers)
            held = [exchange(optimizer, weight, new, state) for optimizer, state in zip(optimizers, states, strict=True)]
            if not any(held) and weight.requires_grad and supernet.is_plain and new:
                orphans.append(str(found.tables[index]))
    put_in_order(in_order, model.parameters())
    return orphans


def _exchange_outputs(
    compact: CompactEmbeddingBagCollection,
    supernet: SearchableEmbeddingBagCollection,
    index: int,
    optimizers: Sequence[Optimizer],
) -> None:
    """Let the optimizers train a table's projection and bias in place of what followed its lookup; their state is new.

    They stand behind the table in its group; where no optimizer holds it (fused kernels train it), or one that takes sparse
    gradients only, they join the first optimizer that takes theirs.
    """
    new = list(compact.index[index].parameters())
    for parameter in supernet.form_parameters(index):
        for optimizer in optimizers:
            exchange(optimizer, parameter, [])
    dense = takers_of_dense(optimizers)
    if new and dense:
        add_to_any(dense, supernet.table_weight(index), new)
    elif new and optimizers:
        log.warning(
            "SparseAdam takes no dense gradients, RowWiseAdagrad no biases: no optimizer holds the projection or bias of %s",
            compact.tables[index],
        )


_Replacement = tuple[list[nn.Parameter], list[list[dict[str, Any]]]]
"""The parameters in the place of a table, and per optimizer the states of them, if it has any."""


def _rewritten(
    tables: SearchedTables, number: int, plans: Sequence[TablePlan], folds: Sequence[Fold], optimizers: Sequence[Optimizer]
) -> tuple[CompactEmbeddingBagCollection, list[_Replacement]]:
    """Build and fill one collection's compact form; return it with what takes the place of each table."""
    found, supernet = tables.found[number], tables.supernets[number]
    compact = compact_form(found, plans, supernet.training).to(supernet.device)
    slices = []
    for index, plan in enumerate(plans):
        cut = None if tables.blocks is None else tables.split(tables.blocks)[number][index]
        gate = None if cut is None else supernet.row_gates(index)
        slices.append(list(slices_of(compact, index, plan, gate, None if cut is None else cut.lookup(), folds[index])))
        for part in slices[-1]:
            part.fill(supernet.table_weight(index))
        _fill_outputs(compact.index[index], folds[index])
    if isinstance(supernet.inner, FusedEmbeddingBags):
        _fuse_alike(supernet.inner, compact, slices)
    return compact, [
        ([part.new for part in parts], [carried_states(each, supernet.table_weight(index), parts) for each in optimizers])
        for index, parts in enumerate(slices)
    ]


@torch.no_grad()
def _fill_outputs(output: nn.Module, fold: Fold) -> None:
    """Write the projection and the bias; where the search has none of its own they stay the identity and zero."""
    for parameter, value in ((output.projection, fold.projection), (output.bias, fold.bias)):
        if isinstance(parameter, nn.Parameter) and value is not None:
            parameter.copy_(value[: len(parameter)])


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
