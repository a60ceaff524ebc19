"""What may follow a table's lookup: forms, gates of groups of examples, gates with a graph; and how they are compacted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support import DEVICE, PLAIN, SUM, WORLDS, World, default_optimizer, relative_error, stored_bytes, task, train
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

import embsearch_plugin as es
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import Fold
from embsearch_plugin.errors import UnsupportedCollection
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.plan import Block, SizePlan, TablePlan
from embsearch_plugin.search.session import Session
from embsearch_plugin.supernet.forms import Form, Projection


class Halves(Form):
    """Two candidates of half the output's width, each with a matrix of its own, weighed."""

    weighs: ClassVar[bool] = True

    def __init__(self, dim: int) -> None:
        super().__init__(width=6, n_gates=2)
        self.maps = nn.ModuleList(nn.Linear(3, dim) for _ in range(2))

    def forward(self, pooled: Tensor, gates: Tensor) -> Tensor:
        parts = [linear(part.float()) for linear, part in zip(self.maps, pooled.split(3, 1), strict=True)]
        return parts[0] * gates[:, :1] + parts[1] * gates[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Toy(SearchConfig):
    """An algorithm that does nothing by itself."""

    name: ClassVar[str] = "toy"
    halves: bool = False

    def form(self, table: Table, space: es.SearchSpace) -> Form:
        return Halves(table.dim) if self.halves else Projection(table.dim)

    def build(self) -> "ToySearch":
        return ToySearch(self)


class ToySearch:
    def __init__(self, config: Toy) -> None:
        self.config = config

    @es.hookimpl
    def embsearch_search_step(self) -> dict[str, float]:
        return {}

    @es.hookimpl
    def embsearch_derive(self, session: Session) -> SizePlan:
        if self.config.halves:
            rows = [torch.arange(spec.rows).int() for spec in session.specs]
            plans = [
                TablePlan.nested(s, [3], [r], projection=True, bias=True) for s, r in zip(session.specs, rows, strict=True)
            ]
            return SizePlan(tuple(plans), 1)
        return SizePlan(tuple(self._blocks(table.spec, table.blocks) for table in session.tables))

    def _blocks(self, spec: Table, blocks: Any) -> TablePlan:
        rows = [blocks.rows_of(block) for block in range(len(blocks.sizes))]
        return TablePlan.nested(spec, [4, 2, 0][: len(rows)], rows, projection=True)

    @es.hookimpl
    def embsearch_fold(self, session: Session, plan: SizePlan) -> Sequence[Fold]:
        return [self._fold(session.form(index), plan.tables[index].width) for index in range(len(plan.tables))]

    def _fold(self, form: Form, width: int) -> Fold:
        if isinstance(form, Halves):
            second = form.maps[1]
            assert isinstance(second, nn.Linear)
            return Fold(torch.tensor([3, 4, 5]), None, second.weight.detach().t(), second.bias.detach())
        assert isinstance(form, Projection)
        kept = torch.arange(form.width).flip(0)[:width]  # the last columns first
        return Fold(kept, None, form.weight.detach()[kept])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None:
        pass


def toy(world: World, **settings: Any) -> tuple[Any, Session, Any]:
    """A searched task whose forms were trained."""
    model = task(world)
    session = es.prepare(model, algorithm=Toy(warm_up=2, **settings), space=es.SearchSpace(row_blocks=(0.1, 0.3, 0.6)))
    optimizer = default_optimizer(world)(model.parameters())
    session.attach(optimizer, validation=[world.batch(seed=900)])
    train(model, optimizer, (world.batch(seed=i) for i in range(8)))
    return model, session, optimizer


@pytest.mark.parametrize("dims", [(3,), (4, 4, 4), (4, 3)])
def test_projections_of_one_width_are_made_together_as_one_by_one(dims: tuple[int, ...]) -> None:
    forms = [Projection(dim) for dim in dims]
    for form in forms:
        nn.init.normal_(form.weight)
    pooled = torch.randn(7, sum(dims), requires_grad=True)
    expected = torch.cat([form(part) for form, part in zip(forms, pooled.split(dims, 1), strict=True)], 1)
    made = Projection.together(forms, pooled, [])
    assert (made is None) == (len(set(dims)) > 1)
    if made is not None:
        weights, leaves = torch.randn_like(expected), [pooled, *(form.weight for form in forms)]
        torch.testing.assert_close(made, expected)
        for mine, theirs in zip(*(torch.autograd.grad((o * weights).sum(), leaves) for o in (made, expected)), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert Projection.together([*forms, Form(2, 2)], pooled, []) is None


@pytest.mark.parametrize("world", WORLDS)
def test_a_projection_starts_as_the_identity_and_trains(world: str) -> None:
    features = WORLDS[world].features(30, seed=1)
    fresh = task(WORLDS[world])
    expected = fresh.collection(features).values()
    es.prepare(fresh, algorithm=Toy())
    assert relative_error(fresh.collection(features).values(), expected) <= 1e-6
    _, session, _ = toy(WORLDS[world])
    assert all(not torch.equal(session.form(t).weight, torch.eye(s.dim, device=DEVICE)) for t, s in enumerate(session.specs))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_projected_plan_computes_what_the_gated_model_does(world: str, training: bool) -> None:
    model, session, optimizer = toy(WORLDS[world])
    plan = session.derive(strict=False)
    gates = [torch.zeros_like(gate) for gate in session.gates]
    for gate in gates:
        for block, dim in enumerate([4, 2, 0][: len(gate)]):
            gate[block, gate.shape[1] - dim :] = 1
    session.set_gates(gates)
    features = WORLDS[world].features(50, seed=3)
    expected = model.train(training).collection(features).values()
    session.compact(plan)
    assert relative_error(model.collection(features).values(), expected) <= (1e-3 if world == "half" else 1e-5)
    assert stored_bytes(model) == plan.size_bytes
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held  # neither more nor less: the forms are gone
    train(model, optimizer, [WORLDS[world].batch(seed=7)])


def test_bags_are_pooled_before_they_are_projected() -> None:
    """nis.txt, 3.2 (MBOW): a product for each bag, however many ids it holds, in the searched model and in the compact one."""
    world = WORLDS["bags"]
    model, session, _ = toy(world)
    specs, features = session.specs, world.features(50, seed=3)
    assert len(features.values()) > 1.5 * features.lengths().numel()

    def products(width: int) -> bool:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.collection(features)
        return counter.get_total_flops() == sum(2 * 50 * len(spec.features) * width * spec.dim for spec in specs)

    assert products(8)
    session.compact(SizePlan(tuple(TablePlan(spec, (Block(spec.rows, 4),), projection=True) for spec in specs), 4))
    assert products(4)


@pytest.mark.parametrize("world", ["one id", "bags", "mean", "several features"])
def test_weighed_candidates_of_another_width(world: str) -> None:
    model, session, _ = toy(WORLDS[world], halves=True)
    assert all(bag.weight.shape[1] == 6 for bag in model.collection.embedding_bags.values())
    session.set_gates([torch.tensor([[0.0, 1.0]]) for _ in session.specs])
    features = WORLDS[world].features(50, seed=3)
    expected = model.collection(features)
    session.compact(session.derive(strict=False))
    got = model.collection(features)
    assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
    assert relative_error(got.values(), expected.values()) <= 1e-5


def test_a_compacted_projection_survives_saving(tmp_path: Any) -> None:
    model, session, _ = toy(PLAIN)
    plan = session.derive(strict=False)
    session.compact(plan)
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, task(PLAIN, seed=5))
    assert torch.equal(loaded.eval()(PLAIN.batch(seed=3))[0], model.eval()(PLAIN.batch(seed=3))[0])
    applied = es.apply(task(PLAIN, seed=5), plan)
    assert torch.equal(applied.collection.index[0].projection, torch.eye(4, 8, device=DEVICE))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("group", [1, 4, 7])
def test_groups_of_examples_have_gates_of_their_own(world: str, group: int) -> None:
    model, session, _ = toy(WORLDS[world])
    torch.manual_seed(3)
    gates = [torch.rand(3, *gate.shape, device=DEVICE) for gate in session.gates]
    batch = WORLDS[world].batch(20, seed=4)
    outcome = session.probe.evaluate(batch, gates, group).logits
    model.eval()
    per_group = [session.probe.evaluate(batch, [gate[number] for gate in gates]).logits for number in range(3)]
    expected = torch.stack([per_group[(example // group) % 3][example] for example in range(20)])
    assert torch.allclose(session.probe.evaluate(batch, gates, group).logits, expected, atol=1e-5)
    assert outcome.shape == expected.shape
    session.use_gates(gates, group)
    eager = model(batch)[1][1]  # evaluation has the gates that were written
    assert torch.allclose(eager, session.probe.evaluate(batch, session.gates).logits, atol=1e-6)


@pytest.mark.parametrize("settings", [{"halves": True}, {}])
def test_gates_may_carry_a_graph(settings: dict[str, Any]) -> None:
    model, session, optimizer = toy(PLAIN, **settings)
    leaves = [torch.full_like(gate, 0.5).requires_grad_() for gate in session.gates]
    session.use_gates([leaf * 1.0 for leaf in leaves])
    batch = PLAIN.batch(seed=5)
    model.over[1].eval(), model.over[3].eval()  # batch statistics and dropout would differ between two forwards
    optimizer.zero_grad()
    model(batch)[0].backward()
    _, expected = session.probe.gate_gradients(batch, leaves, leaves)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, gradient, atol=1e-6)
    before = [leaf.grad.clone() for leaf in leaves]
    session.use_gates(None)
    optimizer.zero_grad()
    model(batch)[0].backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, before, strict=True))


@pytest.mark.parametrize(
    "world", ["one id", "bags", "mean", "weighted", "weighted, one id", "several features", "shared feature"]
)
def test_row_gradients_are_those_of_looked_up_rows(world: str) -> None:
    """Their outer products add up to those of every looked-up row, one lookup at a time; in evaluation, whatever the mode."""
    model, session, _ = toy(WORLDS[world])
    batch = WORLDS[world].batch(12, seed=6)
    before = [t.clone() for t in model.state_dict().values()]
    got, examples = session.probe.row_gradients(batch)
    assert examples == 12
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    model.eval()
    output = model.collection(batch.sparse_features)
    values = output.values().detach().requires_grad_()
    logits = model.over(torch.cat([values, batch.dense_features], 1)).squeeze(-1)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, values)
    by_key = dict(zip(output.keys(), gradient.split(output.length_per_key(), 1), strict=True))
    bags = batch.sparse_features.to_dict()
    for table, slots in enumerate([[s for s in model.collection.slots if s.table == t] for t in range(len(session.specs))]):
        rows = []
        for slot in slots:
            for example, length in enumerate(bags[slot.feature].lengths().tolist()):
                first = int(bags[slot.feature].offsets()[example])
                for place in range(first, first + length):
                    weight = bags[slot.feature].weights()[place] if WORLDS[world].weighted else 1
                    rows.append(weight * by_key[slot.key][example] / (length if slot.mean else 1))
        expected = torch.stack(rows)
        assert torch.allclose(got[table].t() @ got[table], expected.t() @ expected, rtol=1e-4, atol=1e-7)


class Retrieval(nn.Module):
    """Users meet ``items`` candidates each; a collection for either, and one that the loss does not read."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = items
        self.users, self.candidates, self.unread = (World((PLAIN.tables[t],)).collection() for t in (0, 1, 0))

    def forward(self, batch: tuple[Any, Any]) -> Any:
        users, items = batch
        candidates = self.candidates(items).values().unflatten(0, (-1, self.items))
        logits = (self.users(users).values()[:, None] * candidates).sum(2)
        loss = nn.functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
        return loss, (loss.detach(), logits.detach(), torch.zeros(len(logits)))


def test_row_gradients_count_examples_not_bags() -> None:
    """So that tables of which one example reads several bags are worth as much as others."""
    model = Retrieval(items=5)
    counts = {
        f"{name}.t{t}": torch.ones(rows) for name, t, rows in (("users", 0, 200), ("candidates", 1, 300), ("unread", 0, 200))
    }
    session = es.prepare(model, algorithm="dnis", budget="50%", frequencies=counts)
    users, items = World((PLAIN.tables[0],)).features(4, seed=1), World((PLAIN.tables[1],)).features(20, seed=2)
    session.step((users, items))
    got, examples = session.probe.row_gradients((users, items))
    assert examples == 4
    u, c = (
        collection(bags).values().detach().requires_grad_()
        for collection, bags in ((model.users, users), (model.candidates, items))
    )
    logits = (u[:, None] * c.unflatten(0, (-1, 5))).sum(2)
    torch.nn.functional.cross_entropy(logits, logits.new_zeros(4, dtype=torch.int64), reduction="sum").backward()
    by_name = dict(zip(map(str, session.specs), got, strict=True))
    for name, leaf in (("users.t0", u), ("candidates.t1", c)):
        assert leaf.grad is not None
        rows = by_name[name]
        assert torch.allclose(rows.t() @ rows, leaf.grad.t() @ leaf.grad, rtol=1e-4, atol=1e-9)
    assert by_name["unread.t0"].shape == (0, 8)


def test_an_optimizer_that_was_made_before_the_search_trains_the_forms() -> None:
    model = task(PLAIN)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session = es.prepare(model, algorithm=Toy(halves=True))
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(4)))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("world", ["several features", "shared feature"])
def test_weighed_gates_of_groups_reach_every_feature_of_a_table(world: str) -> None:
    model, session, _ = toy(WORLDS[world], halves=True)
    model.eval()
    gates = [torch.rand(3, *gate.shape, device=DEVICE) for gate in session.gates]
    batch = WORLDS[world].batch(20, seed=4)
    got = session.probe.evaluate(batch, gates, 2).logits
    per_group = [session.probe.evaluate(batch, [gate[number] for gate in gates]).logits for number in range(3)]
    expected = torch.stack([per_group[(example // 2) % 3][example] for example in range(20)])
    assert torch.allclose(got, expected, atol=1e-5)


def test_tables_of_another_width_stay_marked_for_fused_kernels() -> None:
    model = task(World((("t0", 50, 8, ("f0",), SUM),)))
    apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": 0.1})
    session = es.prepare(model, algorithm=es.AutoDim(candidates=(4,)))
    assert session.form(0).width == 4
    model.collection.fuse()
    assert isinstance(model.collection.inner, FusedEmbeddingBags)


def test_a_validation_batch_of_one_example_can_be_scored_though_a_search_step_skips_it() -> None:
    model, session, _ = toy(PLAIN)
    one, batch = PLAIN.batch(1, seed=1), PLAIN.batch(seed=2)
    session.step(batch)
    model.eval()
    assert session.probe.evaluate(one, session.gates).logits.shape == (1,)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = task(PLAIN)
    with pytest.raises(UnsupportedCollection, match="'collection' is on the meta device"):
        es.prepare(model, algorithm=Toy())


def test_autocast_rounds_no_projection() -> None:
    """A lookup's output is float32 whatever the rest of the model is in, so what follows it is, too."""
    model, session, _ = toy(PLAIN)
    features = PLAIN.features(16, seed=3)
    for form in ("searched", "compact"):
        if form == "compact":
            session.compact(session.derive())
        expected = model.collection(features).values()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            got = model.collection(features).values()
        assert torch.equal(got, expected)  # in float32, too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_compact_projection_may_be_converted_for_serving(dtype: torch.dtype) -> None:
    model, session, _ = toy(WORLDS["mean"])
    session.compact(session.derive())
    features = WORLDS["mean"].features(16, seed=3)
    expected = model.collection(features).values()
    got = model.collection.to(dtype)(features).values()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
