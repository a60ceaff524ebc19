"""Rewriting: what follows the weights, and what is left behind."""

from dataclasses import replace

import pytest
import torch
from support import DEVICE, PLAIN, WORLDS, searched, stored_bytes, task, train
from tensordict import TensorDict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import InputError, PlanError
from embsearch_plugin.lookup.bags import ordered
from embsearch_plugin.lookup.readers import Readers
from embsearch_plugin.plan import SizePlan, TablePlan


def plan_for(world: str, dims: tuple[tuple[int, ...], ...]) -> SizePlan:
    """A plan by hand: per table, a dim for each of a few row blocks in a scrambled order."""
    torch.manual_seed(1)
    tables = []
    for (name, rows, dim, features, _), kept in zip(WORLDS[world].tables, dims, strict=True):
        blocks = list(torch.randperm(rows, dtype=torch.int32).tensor_split(len(kept)))
        spec = Table("collection", name, rows, dim, torch.float32, features)
        tables.append(TablePlan.nested(spec, kept, blocks, torch.randperm(dim).tolist()))
    return SizePlan(tuple(tables))


@pytest.mark.parametrize("dims", [((8, 4, 0), (0, 4)), ((0,), (8,)), ((4, 8), (4, 0, 8)), ((8,), (8,)), ((0,), (0,))])
@pytest.mark.parametrize(
    "world", ["one id", "bags", "mean", "weighted", "weighted, one id", "several features", "shared feature"]
)
def test_a_plan_keeps_the_weights_it_names(world: str, dims: tuple[tuple[int, ...], ...]) -> None:
    plan, original, model = plan_for(world, dims), task(WORLDS[world]), task(WORLDS[world])
    for table in plan.tables:
        weight = original.collection.embedding_bags[table.table.name].weight.data
        kept = torch.zeros_like(weight)
        order = torch.arange(table.table.rows) if table.order is None else table.order.long()
        columns = torch.tensor(table.columns or range(8))
        for chunk in table.chunks:
            places = torch.meshgrid(order[: chunk.rows], columns[chunk.start : chunk.start + chunk.width], indexing="ij")
            kept[places] = 1
        weight.mul_(kept)
    es.apply(model, plan)
    assert stored_bytes(model) == plan.size_bytes
    features = WORLDS[world].features(50, seed=3)
    torch.testing.assert_close(
        model.collection(features).values(), original.collection(features).values(), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dims", [((8, 4, 0), (0, 4)), ((4, 8), (4, 0, 8))])
@pytest.mark.parametrize("world", ["one id", "bags", "mean", "weighted", "several features", "shared feature"])
def test_gradients_are_the_originals(world: str, dims: tuple[tuple[int, ...], ...]) -> None:
    plan, original, model = plan_for(world, dims), task(WORLDS[world]), task(WORLDS[world])
    es.apply(model, plan)
    features = WORLDS[world].features(50, seed=3)
    width = original.collection(features).values().shape[1]
    for collection in (model.collection, original.collection):
        (collection(features).values() * torch.arange(50 * width, device=DEVICE).view(50, width).sin()).sum().backward()
    for index, table in enumerate(plan.tables):
        gradient = original.collection.embedding_bags[table.table.name].weight.grad
        order = torch.arange(table.table.rows) if table.order is None else table.order.long()
        columns = torch.tensor(table.columns or range(8))
        for number, chunk in enumerate(table.chunks):
            expected = gradient[order[: chunk.rows]][:, columns[chunk.start : chunk.start + chunk.width]]
            torch.testing.assert_close(model.collection.chunk_weight(index, number).grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["momentum", "adam", "adagrad"])
def test_training_goes_on_as_if_nothing_had_happened(name: str) -> None:
    """With gates at one and nothing dropped, a compact model follows the original step by step, state included."""
    make = {
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    }[name]
    losses = []
    for rewritten in (False, True):
        model, session, optimizer = searched(PLAIN, 6, algorithm=es.Dnis(warm_up=2, lr=1e-30), optimizer=make)
        if rewritten:
            rows = [[torch.arange(s.rows, dtype=torch.int32).flip(0).split(s.rows // 2)] for s in session.specs]
            plans = [TablePlan.nested(s, [8, 8], r[0]) for s, r in zip(session.specs, rows, strict=True)]
            session.compact(SizePlan(tuple(plans)))
        else:
            session.detach()
        torch.manual_seed(3)
        losses.append(train(model, optimizer, (PLAIN.batch(seed=40 + i) for i in range(6))))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dims", [((8, 4, 0), (0, 4)), ((8,), (4, 0, 8)), ((8, 4), (8,)), ((8,), (8,))])
@pytest.mark.parametrize("world", ["one id", "bags", "weighted", "several features", "shared feature"])
def test_what_leaves_ids_out_on_a_gpu_does_what_does_it_on_the_cpu(world: str, dims: tuple[tuple[int, ...], ...]) -> None:
    plan = plan_for(world, dims)
    names = list(dict.fromkeys(name for table in plan.tables for name in table.table.features))
    unmoved = tuple(replace(table, order=None) if len(table.chunks) == 1 else table for table in plan.tables)
    for tables in (plan.tables, unmoved):
        places = es.apply(task(WORLDS[world]), SizePlan(tables)).collection.places.cpu()
        for seed in range(5):
            features = ordered(WORLDS[world].features(50, seed).to(torch.device("cpu")), names)
            for mine, theirs in zip(places.held_together(features), places.held_one_by_one(features), strict=True):
                assert mine is theirs is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


def test_folded_gates_rescale_the_state() -> None:
    """SGD with momentum on E' = g E: its buffer is the old one over g."""
    make = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
    model, session, optimizer = searched(PLAIN, optimizer=make)
    session.set_gates([torch.full_like(gate, 0.5) for gate in session.gates])
    weights = [p.detach().clone() for p in model.collection.parameters()]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in model.collection.parameters()]
    session.compact(SizePlan(tuple(TablePlan.nested(s, [8], [torch.arange(s.rows)]) for s in session.specs)))
    for new, weight, buffer in zip(model.collection.parameters(), weights, buffers, strict=True):
        torch.testing.assert_close(new.detach(), weight * 0.5)
        torch.testing.assert_close(optimizer.state[new]["momentum_buffer"], buffer / 0.5)


def test_dropped_rows_give_zero_and_train_nothing() -> None:
    plan = plan_for("one id", ((8, 0), (4, 0)))
    model = es.apply(task(PLAIN), plan)
    dropped = sorted(set(range(200)) - set(plan.tables[0].order.tolist()))[:32]
    features = PLAIN.features(32, seed=1, keys=["f0", "f1"])
    features.values()[:32] = torch.tensor(dropped)
    output = model.collection(features)
    assert output["f0"].abs().sum() == 0
    output["f0"].square().sum().backward()
    gradients = [p.grad for p in model.collection.parameters() if p.grad is not None]
    assert all(float(g.abs().sum()) == 0 for g in gradients)


@pytest.mark.parametrize("dims", [((8, 4), (8, 0)), ((4,), (8,)), ((0,), (4,))])
def test_ids_without_a_row_are_named(dims: tuple[tuple[int, ...], ...]) -> None:
    model = es.apply(task(PLAIN), plan_for("one id", dims))
    for bad in (200, -1):
        features = PLAIN.features(8, seed=1, keys=["f0", "f1"])
        features.values()[3] = bad
        with pytest.raises(InputError, match=r"'f0' must be in \[0, 200\)"):
            model.collection(features)


def test_a_plan_for_another_model_is_refused_and_nothing_is_lost() -> None:
    model, session, _ = searched(PLAIN)
    plan = session.derive()
    other = task(WORLDS["unequal dims"])
    before = type(other.collection)
    with pytest.raises(PlanError, match="this size plan is for another model: .*'collection.t2'"):
        es.apply(other, plan)
    assert type(other.collection) is before
    with pytest.raises(PlanError, match="another model"):
        session.compact(plan_for("unequal dims", ((12,), (8,), (4,))))
    assert es.session(model) is session


def test_save_takes_a_compact_model_of_the_plan(tmp_path: object) -> None:
    _, session, _ = searched(PLAIN)
    with pytest.raises(PlanError, match="save takes a compact model and its plan"):
        es.save(task(PLAIN), session.derive(), tmp_path)


def test_a_tensordict_is_looked_up_as_by_torchrec() -> None:
    model, session, _ = searched(PLAIN)
    plan = session.derive()
    features = PLAIN.features(16, seed=3)
    bags = features.to_dict().items()
    given = TensorDict({key: torch.nested.nested_tensor_from_jagged(bag.values(), bag.offsets()) for key, bag in bags})
    for collection in (model.eval().collection, session.compact(plan).collection):
        assert torch.equal(collection(given).values(), collection(features).values())


@pytest.mark.parametrize("together", [False, True])
def test_a_compact_model_can_be_exported(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any forward, and it goes on afterwards."""
    if together:
        monkeypatch.setattr(Readers, "together", lambda *_: True)
    compact = es.apply(task(PLAIN), plan_for("one id", ((8, 4, 0), (0, 4)))).collection.eval()
    features = PLAIN.features(16, seed=3)

    class Unpacked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compact = compact

        def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.compact(KeyedJaggedTensor(features.keys(), values, lengths=lengths)).values()

    given = (features.values(), features.lengths())
    with torch.no_grad():
        exported = torch.export.export(Unpacked(), given, strict=False)
        assert torch.allclose(exported.module()(*given), compact(features).values())


def test_applying_twice_is_refused() -> None:
    model = es.apply(task(PLAIN), plan_for("one id", ((8,), (4,))))
    with pytest.raises(es.EmbsearchError, match="'collection' is compact already"):
        es.apply(model, plan_for("one id", ((8,), (4,))))
