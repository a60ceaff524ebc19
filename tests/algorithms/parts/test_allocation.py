"""Dims in proportion to weights, against a slow search over scales."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PLAIN, WORLDS, searched

import embsearch_plugin as es
from embsearch_plugin.algorithms.parts.allocation import Dims, padded_plan, proportional
from embsearch_plugin.collection import Table
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.search.tables import SearchTable
from embsearch_plugin.space import RowBlocks


def table_of(name: str, sizes: list[int], dim: int, dtype: torch.dtype) -> SearchTable:
    """A table whose rows are ranked backwards, so that every plan of several dims has a remap."""
    rows = sum(sizes)
    return SearchTable(
        Table("c", name, rows, dim, dtype, ("f",)), RowBlocks(tuple(sizes), torch.arange(rows, dtype=torch.int32).flip(0))
    )


def size_of(tables: list[SearchTable], dims: Dims, unit: str, projected: bool) -> int:
    plans = [
        TablePlan.nested(
            t.spec,
            chosen,
            [t.blocks.rows_of(b) for b in range(len(t.blocks.sizes))],
            projection=projected and max(chosen) < t.spec.dim < t.spec.rows,
        )
        for t, chosen in zip(tables, dims, strict=True)
    ]
    plan = SizePlan(tuple(plans), 1)
    # Rows that happen to stand in plan order need no remap; one is paid for all the same, as nobody knows before.
    spared = [p for p, chosen in zip(plans, dims, strict=True) if p.order is None and len(set(chosen)) > 1]
    remaps = sum(4 * p.table.rows for p in spared)
    return plan.size_bytes + remaps if unit == "bytes" else plan.n_params


def rounded(value: float, align: int, width: int, least: int) -> int:
    """The nearest of 0, align, 2 * align, ... and the width; the larger of two that are equally near."""
    candidates = [dim for dim in range(width + 1) if dim % align == 0 or dim == width]
    nearest = min(candidates, key=lambda dim: (abs(dim - value), -dim))
    return min(max(nearest, least), width)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[SearchTable], list[torch.Tensor]]:
    tables, weights = [], []
    for number in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.float16]))
        tables.append(table_of(f"t{number}", sizes, draw(st.integers(1, 12)), dtype))
        # Eighths are exact in floating point, so that both sides break ties alike.
        eighths = draw(st.lists(st.integers(0, 40), min_size=len(sizes), max_size=len(sizes)))
        weights.append(torch.tensor(eighths, dtype=torch.float64) / 8)
    return tables, weights


@settings(deadline=None, max_examples=60)
@given(worlds(), st.integers(1, 100), st.sampled_from([1, 2, 4]), st.sampled_from(["bytes", "parameters"]), st.booleans())
def test_the_largest_scale_within_the_budget_is_taken(
    world: tuple[list[SearchTable], list[torch.Tensor]], percent: int, align: int, unit: str, projected: bool
) -> None:
    tables, weights = world
    if unit == "bytes":
        budget = es.Budget(share=f"{percent}%")
    else:
        budget = es.Budget(params=max(sum(t.spec.n_params for t in tables) * percent // 100, 1))
    limit = budget.limit(sum(t.spec.size_bytes for t in tables))
    smallest = [(min(align, t.spec.dim),) * len(t.blocks.sizes) for t in tables]
    least = align if size_of(tables, smallest, unit, projected) <= limit else 0

    def at(scale: float) -> Dims:
        return [
            tuple(rounded(scale * float(weight), align, t.spec.dim, least) for weight in row)
            for t, row in zip(tables, weights, strict=True)
        ]

    middles = {w: sorted({a + b for a in range(w + 1) for b in range(w + 1)}) for w in {t.spec.dim for t in tables}}
    scales = {  # a little above, so that the product does not round to just below the middle
        middle / 2 / float(weight) * (1 + 1e-12)
        for t, row in zip(tables, weights, strict=True)
        for weight in row
        if weight
        for middle in middles[t.spec.dim]
    }
    slow = [dims for scale in sorted({0.0, *scales}) if size_of(tables, dims := at(scale), unit, projected) <= limit]
    fast = proportional(tables, weights, budget, align, projected)
    assert size_of(tables, fast, unit, projected) <= limit
    assert size_of(tables, fast, unit, projected) == size_of(tables, slow[-1], unit, projected)


def test_equal_weights_are_a_uniform_dim_and_no_weight_is_the_least() -> None:
    tables = [table_of("a", [3, 7], 8, torch.float32), table_of("b", [90], 8, torch.float32)]
    ones = [torch.ones(2), torch.ones(1)]
    assert proportional(tables, ones, es.Budget.of("50%"), 1) == [(4, 4), (4,)]
    assert proportional(tables, [torch.tensor([1.0, 0.0]), torch.zeros(1)], es.Budget.of("90%"), 2) == [(8, 2), (2,)]
    assert proportional(tables, [torch.tensor([1.0, 0.0]), torch.zeros(1)], es.Budget.of("20%"), 2) == [(8, 0), (0,)]


@pytest.mark.parametrize("world", ["one id", "bags", "unequal dims"])
@pytest.mark.parametrize("algorithm", [es.Random(warm_up=2, by="block"), es.Mde(warm_up=2, temperature=0.8, blocks=3)])
def test_what_was_trained_is_what_is_kept(world: str, algorithm: Any) -> None:
    _, session, _ = searched(WORLDS[world], algorithm=algorithm, budget="50%", space=es.SearchSpace((0.1, 0.3, 0.6), align=1))
    dims = [tuple(gate.sum(1).int().tolist()) for gate in session.gates]
    assert len({dim for chosen in dims for dim in chosen}) > 1
    for gate, chosen in zip(session.gates, dims, strict=True):
        for row, dim in zip(gate, chosen, strict=True):
            assert row.tolist() == [1.0] * dim + [0.0] * (len(row) - dim)
    for budget in ("50%", "90%"):
        assert str(session.derive(budget)) == str(padded_plan(session, dims, isinstance(algorithm, es.Mde)))
    assert str(session.derive(strict=False)) == str(padded_plan(session, dims, isinstance(algorithm, es.Mde)))
    smaller = session.derive("30%")
    assert smaller.size_bytes <= es.Budget.of("30%").limit(session.original_bytes)


def test_padding_leaves_the_dropped_columns_zero() -> None:
    model, session, _ = searched(PLAIN, algorithm=es.Random(warm_up=2, by="block", draw=1), budget="50%")
    plan = session.derive()
    session.compact(plan)
    batch = PLAIN.batch(seed=3)
    pooled = model.collection(batch.sparse_features)
    for table in plan.tables:
        (feature,) = table.table.features
        assert not pooled[feature][:, table.width :].any()
        assert pooled[feature][:, : table.width].any()


def test_projections_take_the_place_of_zeros_and_are_trained() -> None:
    model, session, optimizer = searched(PLAIN, algorithm=es.Mde(warm_up=2, temperature=0.3, blocks=1), budget="50%")
    plan = session.derive()
    padded = {path: module for path, module in model.named_modules() if path == "collection"}["collection"]
    batch = PLAIN.batch(seed=3)
    model.eval()
    with torch.no_grad():
        before = padded(batch.sparse_features).values().clone()
    session.compact(plan)
    projected = [table for table in plan.tables if table.projection]
    assert projected
    for table in plan.tables:
        assert table.projection == (0 < table.width < table.table.dim < table.table.rows)
    with torch.no_grad():
        torch.testing.assert_close(model.collection(batch.sparse_features).values(), before)
    model.train()
    for seed in range(3):
        optimizer.zero_grad()
        model(PLAIN.batch(seed=seed))[0].backward()
        optimizer.step()
    pooled = model.collection(batch.sparse_features)
    for table in projected:
        (feature,) = table.table.features
        assert pooled[feature][:, table.width :].any()
