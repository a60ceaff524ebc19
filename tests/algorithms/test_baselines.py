"""The baselines: uniform dims and magnitude pruning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PLAIN, WORLDS, searched, train

import embsearch_plugin as es
from embsearch_plugin.algorithms.uniform import largest_dim
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import BudgetError


@given(
    rows=st.lists(st.integers(1, 500), min_size=1, max_size=4),
    dims=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    limit=st.integers(1, 80_000),
    align=st.sampled_from([1, 4]),
)
def test_the_largest_dim_is_the_largest_that_fits(rows: list[int], dims: list[int], limit: int, align: int) -> None:
    specs = [Table("c", f"t{i}", n, d, torch.float32, ("f",)) for i, (n, d) in enumerate(zip(rows, dims, strict=False))]
    widest = max(spec.dim for spec in specs)
    candidates = [d for d in range(1, widest + 1) if d % align == 0 or d == widest]
    fitting = [d for d in candidates if sum(4 * s.rows * min(d, s.dim) for s in specs) <= limit]
    if fitting:
        assert largest_dim(specs, es.Budget(bytes=limit), align) == fitting[-1]
    else:
        with pytest.raises(BudgetError, match="no uniform dim fits"):
            largest_dim(specs, es.Budget(bytes=limit), align)


def test_a_uniform_search_trains_the_first_columns_and_no_others() -> None:
    model, session, optimizer = searched(PLAIN, steps=1, algorithm=es.Uniform(), budget="50%")
    before = [p.detach().clone() for p in model.collection.parameters()]
    for group in optimizer.param_groups:
        group["betas"] = (0.0, 0.999)  # without momentum, a column without a gradient stands still
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(1, 6)))
    for weight, old in zip(model.collection.parameters(), before, strict=True):
        assert torch.equal(weight[:, 4:], old[:, 4:])
        assert not torch.equal(weight[:, :4], old[:, :4])
    plan = session.derive()
    assert [block.dim for table in plan.tables for block in table.blocks] == [4, 4]
    assert plan.size_bytes == plan.original_bytes // 2


def test_uniform_dims_of_unequal_tables_end_at_their_width() -> None:
    _, session, _ = searched(WORLDS["unequal dims"], algorithm=es.Uniform(dim=8), budget="90%")
    assert [table.width for table in session.derive().tables] == [8, 8, 4]


@pytest.mark.parametrize("fine", [False, True])
def test_magnitude_pruning_reads_the_trained_weights_alone(fine: bool) -> None:
    model, session, _ = searched(PLAIN, algorithm=es.Magnitude(warm_up=2, fine_grained=fine))
    assert all(bool((gate == 1).all()) for gate in session.gates)
    plan = session.derive()
    with torch.no_grad():
        for parameter in model.collection.parameters():
            parameter.mul_(-3.0)
    assert str(session.derive()) == str(plan)


def test_magnitude_pruning_keeps_the_rows_and_columns_that_were_planted() -> None:
    model, session, _ = searched(PLAIN, algorithm=es.Magnitude(warm_up=2), space=es.SearchSpace(row_blocks=(0.5, 0.5)))
    strong = {}
    with torch.no_grad():
        for index, table in enumerate(session.tables):
            weight = model.collection.embedding_bags[table.spec.name].weight
            strong[index] = (table.blocks.rows_of(1).long(), torch.tensor([1, 3, 4, 6]))
            weight.fill_(1e-3)
            weight[strong[index][0][:, None], strong[index][1]] = 1.0
    plan = session.derive("40%")
    for index, table in enumerate(plan.tables):
        rows, columns = strong[index]
        assert table.blocks[0].dim == 4 and table.blocks[0].rows == rows.numel()
        assert set(table.columns[:4]) == set(columns.tolist())
        assert set(table.order.tolist()) == set(rows.tolist())
