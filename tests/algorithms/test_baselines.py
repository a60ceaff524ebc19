"""The baselines: uniform dims and magnitude pruning."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PLAIN, WORLDS, relative_error, searched, stored_bytes, task, train
from torch import Tensor

import embsearch_plugin as es
from embsearch_plugin.algorithms.parts.uniform_dims import largest_dim
from embsearch_plugin.bench.workload import FUSED
from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import BudgetError, SpaceError, UnsupportedCollection


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


def test_given_dims_are_those_that_are_given() -> None:
    _, session, _ = searched(WORLDS["unequal dims"], algorithm=es.Given(dims={"t0": 4, "t1": 0}), budget="90%")
    names = [spec.name for spec in session.specs]
    assert [table.width for table in session.derive().tables] == [
        {"t0": 4, "t1": 0}.get(n, s.dim) for n, s in zip(names, session.specs, strict=True)
    ]


@pytest.mark.parametrize(
    ("dims", "budget", "error", "message"),
    [
        ({"t0": 8}, "10%", BudgetError, "the given dims do not fit 10%: they need"),
        ({"t9": 8}, "100%", SpaceError, "there is no 't9'. Available: collection.t0, collection.t1"),
        ({"t0": 3}, "100%", SpaceError, "multiples of align=4"),
    ],
)
def test_given_dims_that_cannot_be(dims: dict[str, int], budget: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        searched(PLAIN, algorithm=es.Given(dims=dims), budget=budget)
    with pytest.raises(ValueError, match="dims must be at least 0"):
        es.Given(dims={"t0": -1})


@pytest.mark.parametrize("fine", [False, True])
def test_magnitude_pruning_reads_the_trained_weights_alone(fine: bool) -> None:
    model, session, _ = searched(PLAIN, algorithm=es.Magnitude(warm_up=2, fine_grained=fine))
    assert all(bool((gate == 1).all()) for gate in session.gates)
    plan = session.derive()
    with torch.no_grad():
        for parameter in model.collection.parameters():
            parameter.mul_(-3.0)
    assert str(session.derive()) == str(plan)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("fine", [False, True])
def test_relative_weights_are_those_of_tables_divided_by_their_root_mean_square(fine: bool, rounds: int) -> None:
    """So the unit of a table's weights says nothing; of weights as they are it says all."""

    def plan(relative: bool, factors: Sequence[float | Tensor]) -> list[Any]:
        algorithm = es.Magnitude(warm_up=3, rounds=rounds, fine_grained=fine, relative=relative)
        space = es.SearchSpace(row_blocks=3, align=1)
        model, session, _ = searched(PLAIN, steps=2, algorithm=algorithm, space=space, budget="40%")
        with torch.no_grad():
            for weight, factor in zip(model.collection.parameters(), factors, strict=True):
                weight.mul_(factor)
        for seed in range(rounds - 1):
            session.step(PLAIN.batch(seed=seed))
        tensors = [(table.blocks, table.columns, table.order, table.mask) for table in session.derive().tables]
        return [[part.tolist() if isinstance(part, Tensor) else part for part in parts] for parts in tensors]

    tables = list(searched(PLAIN, steps=2, algorithm=es.Magnitude())[0].collection.parameters())
    units = [1 / weight.detach().square().mean().sqrt() for weight in tables]
    found = plan(True, [1.0, 1.0])
    assert found == plan(True, [1 / 128, 32.0])
    assert rounds > 1 or found == plan(False, units)  # a second round has a root mean square of its own
    assert plan(False, [1.0, 1.0]) != plan(False, [1 / 128, 32.0])


def test_tables_of_zeros_are_pruned_first_however_weights_are_compared() -> None:
    for fine, relative in itertools.product((False, True), (False, True)):
        algorithm = es.Magnitude(fine_grained=fine, relative=relative)
        model, session, _ = searched(PLAIN, algorithm=algorithm, space=es.SearchSpace(align=1))
        with torch.no_grad():
            next(model.collection.parameters()).zero_()
        first, *others = session.derive("50%").tables
        assert first.size_bytes == 0
        assert all(table.size_bytes for table in others)


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


@pytest.mark.parametrize("world", ["one id", "bags", "unequal dims"])
@pytest.mark.parametrize("budget", [es.Budget.of("25%"), es.Budget(params=700)])
def test_iterative_pruning_closes_gates_round_by_round_and_never_opens_one(world: str, budget: es.Budget) -> None:
    rounds = es.Magnitude(warm_up=2, every=3, rounds=3)
    _, session, _ = searched(WORLDS[world], steps=2, algorithm=rounds, budget=budget)
    whole = sum(spec.n_params for spec in session.specs)
    limit = budget.limit(session.original_bytes)
    share = limit / (whole if budget.unit == "parameters" else session.original_bytes)
    before = [gate.clone() for gate in session.gates]
    for number in range(session.search_steps, 5):
        open_weights = sum(
            size * float(gate.sum())
            for table, gates in zip(session.tables, session.gates, strict=True)
            for size, gate in zip(table.blocks.sizes, gates, strict=True)
        )
        assert open_weights <= share ** (min(number, 3) / 3) * whole + 1
        assert number >= 3 or open_weights > share ** ((number + 1) / 3) * whole  # no round does the work of the next
        assert all(bool((now <= then).all()) for now, then in zip(session.gates, before, strict=True))
        before = [gate.clone() for gate in session.gates]
        session.step(WORLDS[world].batch(seed=number))
    assert {float(value) for gate in session.gates for value in gate.unique()} == {0.0, 1.0}


@pytest.mark.parametrize("world", ["one id", "bags", "mean", "weighted", "several features"])
def test_iterative_pruning_of_single_weights_lowers_their_number_and_never_takes_one_back(world: str) -> None:
    algorithm = es.Magnitude(warm_up=2, every=3, rounds=3, fine_grained=True)
    model, session, optimizer = searched(WORLDS[world], steps=2, algorithm=algorithm, budget="30%")
    whole = session.original_bytes + sum(Unit.BYTES.fine_index(spec, spec.n_params) for spec in session.specs)
    before = None
    for number in range(session.search_steps, 3):
        session.step(WORLDS[world].batch(seed=number))
        kept = session.state_dict()["kept"]
        counts = [int(mask.sum()) for mask in kept]
        cost = sum(4 * n + Unit.BYTES.fine_index(spec, n) for spec, n in zip(session.specs, counts, strict=True))
        share = 0.3 * session.original_bytes / whole
        assert 0.9 < cost / (share ** ((number + 1) / 3) * whole) <= 1
        assert before is None or all(bool((now <= then).all()) for now, then in zip(kept, before, strict=True))
        before = [mask.clone() for mask in kept]
        train(model, optimizer, [WORLDS[world].batch(seed=100 + number)])
    assert len(session.state_dict()["kept"]) == len(session.specs)
    plan = session.derive("90%")  # more than is left: what was removed stays so
    assert all(bool((table.mask <= mask).all()) for table, mask in zip(plan.tables, before, strict=True))


@pytest.mark.parametrize("world", ["one id", "bags", "mean", "weighted", "several features", "half"])
def test_weights_that_take_no_part_are_zero_and_have_no_gradient(world: str) -> None:
    """Output and gradients are those of a collection whose table holds zero there, with its gradient masked."""
    model, session, _ = searched(WORLDS[world])
    original = WORLDS[world].collection()
    kept = [torch.rand(spec.rows, spec.dim) < 0.6 for spec in session.specs]
    for index, (spec, mask) in enumerate(zip(session.specs, kept, strict=True)):
        original.embedding_bags[spec.name].weight.data.copy_(session.merged_weight(index) * mask)
    session.set_gates([torch.ones_like(gate) for gate in session.gates])
    for index, spec in enumerate(session.specs):
        model.collection.embedding_bags[spec.name].weight.data.copy_(original.embedding_bags[spec.name].weight.data)
        model.collection.embedding_bags[spec.name].weight.data.masked_fill_(~kept[index], 7.0)
    session.keep_weights(kept)
    model.zero_grad()
    features = WORLDS[world].features(60, seed=500)
    outputs = [collection.train()(features).values() for collection in (model.collection, original)]
    factors = torch.randn(outputs[0].shape)
    for output in outputs:
        (output.float() * factors).sum().backward()
    close = {"rtol": 1e-2, "atol": 1e-2} if world == "half" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(outputs[0].float(), outputs[1].float(), **close)
    for spec, mask in zip(session.specs, kept, strict=True):
        got, expected = (each.embedding_bags[spec.name].weight.grad for each in (model.collection, original))
        torch.testing.assert_close(got.float(), expected.float() * mask, **close)


def test_pruning_in_rounds_goes_on_from_a_state() -> None:
    algorithm = es.Magnitude(warm_up=2, every=3, rounds=3, fine_grained=True)
    model, session, _ = searched(PLAIN, steps=9, algorithm=algorithm, budget="30%")
    other, second, _ = searched(PLAIN, steps=0, algorithm=algorithm, budget="30%")
    other.load_state_dict(model.state_dict())
    second.load_state_dict(session.state_dict())
    batch = PLAIN.batch(seed=5)
    assert torch.equal(model.eval()(batch)[0], other.eval()(batch)[0])
    assert str(session.derive()) == str(second.derive())


def test_a_state_takes_back_what_was_pruned_since_and_need_not_know_of_it() -> None:
    algorithm = es.Magnitude(warm_up=2, every=3, rounds=3, fine_grained=True)
    _, session, _ = searched(PLAIN, steps=1, algorithm=algorithm, budget="30%")
    before = session.state_dict()
    session.step(PLAIN.batch())
    session.step(PLAIN.batch())
    assert not bool(session.merged_weight(0).bool().all())
    assert session.block_energy(0).sum() == pytest.approx(float(session.merged_weight(0).double().square().sum()))
    session.load_state_dict({name: value for name, value in before.items() if name != "kept"})
    assert bool(session.merged_weight(0).bool().all())


def test_kept_weights_and_gates_of_groups() -> None:
    model, session, _ = searched(WORLDS["bags"])
    session.keep_weights([torch.rand(spec.rows, spec.dim) < 0.6 for spec in session.specs])
    batch, gates = WORLDS["bags"].batch(32, seed=4), [torch.rand(4, *gate.shape) for gate in session.gates]
    model.eval()
    together = session.probe.evaluate(batch, gates, 8).logits
    alone = [session.probe.evaluate(batch, [gate[n] for gate in gates]).logits[8 * n : 8 * n + 8] for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_single_weights_of_fused_tables_cannot_be_pruned_in_rounds() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Magnitude(warm_up=1, rounds=2, fine_grained=True), fused=FUSED)
    optimizer = torch.optim.Adam(model.parameters())
    session.attach(optimizer, validation=[PLAIN.batch(seed=9)])
    with pytest.raises(UnsupportedCollection, match="plain parameters; these are fused or sharded"):
        train(model, optimizer, [PLAIN.batch(seed=i) for i in range(3)])


@pytest.mark.parametrize("fine", [False, True])
def test_what_an_iterative_search_pruned_is_what_its_plan_leaves_out(fine: bool) -> None:
    algorithm = es.Magnitude(warm_up=2, every=4, rounds=3, fine_grained=fine)
    model, session, _ = searched(PLAIN, steps=14, algorithm=algorithm, budget="40%")
    batch = PLAIN.batch(seed=77)
    model.eval()
    before = model(batch)[1][1]
    plan = session.derive()
    assert plan.size_bytes <= es.Budget.of("40%").limit(session.original_bytes)
    session.compact(plan)
    assert relative_error(model(batch)[1][1], before) < 1e-5


@pytest.mark.parametrize("fine", [False, True])
def test_pruned_weights_do_not_train(fine: bool) -> None:
    algorithm = es.Magnitude(warm_up=2, rounds=2, fine_grained=fine)
    model, session, optimizer = searched(PLAIN, steps=3, algorithm=algorithm, budget="40%")
    closed = [gate[table.blocks.lookup().long()] == 0 for table, gate in zip(session.tables, session.gates, strict=True)]
    if fine:
        closed = [~mask for mask in session.state_dict()["kept"]]
    assert any(bool(mask.any()) for mask in closed)
    before = [p.detach().clone() for p in model.collection.parameters()]
    for group in optimizer.param_groups:
        group["betas"] = (0.0, 0.999)
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(50, 53)))
    for weight, old, mask in zip(model.collection.parameters(), before, closed, strict=True):
        assert torch.equal(weight[mask], old[mask])


def test_rounds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        es.Magnitude(rounds=0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("budget", ["60%", "25%", es.Budget(params=500)])
def test_a_fine_grained_plan_keeps_the_largest_weights_that_the_budget_holds(world: str, budget: str | es.Budget) -> None:
    _, session, _ = searched(WORLDS[world], algorithm=es.Magnitude(warm_up=2, fine_grained=True))
    plan, budget = session.derive(budget), es.Budget.of(budget)
    weights = [session.merged_weight(index).abs() for index in range(len(session.tables))]
    masks = [
        torch.zeros_like(w, dtype=torch.bool) if p.mask is None else p.mask for w, p in zip(weights, plan.tables, strict=True)
    ]
    smallest_kept = min(float(w[mask].min()) for w, mask in zip(weights, masks, strict=True) if mask.any())
    largest_cut = max(float(w[~mask].max()) for w, mask in zip(weights, masks, strict=True) if not mask.all())
    assert largest_cut < smallest_kept
    size = plan.size_bytes if budget.unit == "bytes" else plan.n_params
    # The next threshold takes all weights of one magnitude, and with them perhaps the index of a table that had none.
    one_more = [(w >= largest_cut).sum() for w in weights]
    over = sum(map(int, one_more))
    if budget.unit == "bytes":
        widths = [(s, int(n)) for s, n in zip(session.specs, one_more, strict=True) if n]
        over = sum(n * (s.dtype.itemsize + 1) + 4 * (s.rows + 1) for s, n in widths)  # a column number is one byte
    assert size <= budget.limit(session.original_bytes) < over


@pytest.mark.parametrize("world", WORLDS)
def test_a_fine_grained_plan_is_the_pruned_model_and_trains_on(world: str) -> None:
    model, session, optimizer = searched(WORLDS[world], algorithm=es.Magnitude(warm_up=2, fine_grained=True), budget="50%")
    plan = session.derive()
    pruned = WORLDS[world].collection()
    for index, (spec, table) in enumerate(zip(session.specs, plan.tables, strict=True)):
        kept = session.merged_weight(index) * (0 if table.mask is None else table.mask)
        pruned.embedding_bags[spec.name].weight.data.copy_(kept)
    features = WORLDS[world].features(40, seed=5)
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes <= plan.original_bytes // 2
    error = relative_error(model.collection(features).values(), pruned(features).values())
    assert error <= (1e-3 if world == "half" else 1e-5)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in train(model, optimizer, [WORLDS[world].batch(seed=1)]))


@pytest.mark.parametrize("algorithm", [es.Uniform(dim=3), es.Grid(dims=(3, 6))])
def test_dims_that_cannot_be_stored_are_refused(algorithm: Any) -> None:
    with pytest.raises(SpaceError, match="dims must be multiples of align=4; got"):
        searched(PLAIN, algorithm=algorithm, budget="100%")
    assert searched(PLAIN, algorithm=algorithm, budget="100%", space=es.SearchSpace(align=1))[1].derive().size_bytes > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", [es.Magnitude(warm_up=2, fine_grained=True), es.Dnis(warm_up=2, fine_grained=True)])
def test_single_weights_of_diverged_tables_are_not_pruned(algorithm: Any, bad: float) -> None:
    model, session, _ = searched(PLAIN, algorithm=algorithm)
    with torch.no_grad():
        next(model.collection.parameters())[3, 1] = bad
    for strict in (True, False):
        with pytest.raises(es.EmbsearchError, match="must be finite numbers; those of 'collection.t0' are not"):
            session.derive(strict=strict)


@pytest.mark.parametrize(("relative", "threshold"), [(False, 0.3), (True, 0.88)])
@pytest.mark.parametrize("fine_grained", [False, True])
def test_without_a_budget_a_threshold_says_what_is_kept(fine_grained: bool, relative: bool, threshold: float) -> None:
    """Single weights that reach it; of pairs, columns whose root mean square in the block does, and those before them.

    For relative weights it is a number of root mean squares of their table.
    """
    algorithm = es.Magnitude(fine_grained=fine_grained, relative=relative, threshold=threshold)
    _, session, _ = searched(PLAIN, algorithm=algorithm, space=es.SearchSpace(row_blocks=3, align=1))
    with torch.no_grad():
        for table in session.model.collection.parameters():
            table.copy_(torch.rand(table.shape) * torch.linspace(0.1, 1, 8))
    plan = session.derive(strict=False)
    kept = 0
    for index, table in enumerate(session.tables):
        weight = session.merged_weight(index)
        least = threshold * (float(weight.square().mean().sqrt()) if relative else 1.0)
        if fine_grained:
            assert torch.equal(plan.tables[index].mask, weight >= least)
            continue
        columns = list(plan.tables[index].columns or range(8))
        dims = [block.dim for block in plan.tables[index].blocks for _ in range(block.rows)]
        order = plan.tables[index].order
        dim_of = dict(zip(range(len(dims)) if order is None else order.tolist(), dims, strict=True))
        for block in range(3):
            rows = table.blocks.rows_of(block)
            (dim,) = {dim_of[row] for row in rows.tolist()}
            large = weight[rows.long()].square().mean(0).sqrt() >= least
            assert set(large.nonzero().flatten().tolist()) <= set(columns[:dim])
            assert dim == 0 or bool(large[columns[dim - 1]])
            kept += dim
    assert fine_grained or 0 < kept < 2 * 3 * 8


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"xi": -1.0}, {"threshold": -0.1}, {"epsilon": 0.0}, {"patience": 0}, {"window": 0}],
)
def test_settings_of_dnis_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"must be .* got .*{next(iter(settings.values()))}"):
        es.Dnis(**settings)
