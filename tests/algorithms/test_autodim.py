"""AutoDim against the equations of its paper."""

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import MEAN, PLAIN, SUM, WORLDS, World, relative_error, searched, stored_bytes, task, train
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.algorithms.autodim import AutoDimSearch
from embsearch_plugin.algorithms.parts.candidates import CandidateForm
from embsearch_plugin.algorithms.parts.scoring import losses
from embsearch_plugin.algorithms.parts.selection import temperature
from embsearch_plugin.bench.workload import FUSED
from embsearch_plugin.collection import Table
from embsearch_plugin.data.dataset import Collate, Field, Schema
from embsearch_plugin.errors import BudgetError, PlanError, SpaceError
from embsearch_plugin.models.fm import Fm
from embsearch_plugin.plan import Block, SizePlan, TablePlan
from embsearch_plugin.search.session import Session
from embsearch_plugin.tasks import CLICK

VARIANTS = [{"lookup": lookup, "transform": t} for lookup, t in product(("shared", "separate"), ("padding", "linear"))]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
WIDE = World((("t0", 60, 12, ("f0",), SUM), ("t1", 80, 10, ("f1", "g"), MEAN), ("t2", 7, 4, ("f2",), SUM)), longest_bag=3)
ONE_EACH = World((("t0", 60, 12, ("f0",), SUM), ("t1", 80, 10, ("f1",), SUM), ("t2", 7, 4, ("f2",), SUM)))


def autodim(world: World, align: int = 1, steps: int = 12, **settings: Any) -> tuple[Any, Session, Any]:
    config = es.AutoDim(**{"warm_up": 1, "every": 2, **settings})
    return searched(world, steps, algorithm=config, space=es.SearchSpace(align=align))


def form_of(dim: int, align: int = 1, **variant: Any) -> CandidateForm:
    torch.manual_seed(0)
    form = es.AutoDim(**variant).form(Table("", "t", 9, dim, torch.float32, ("f",)), es.SearchSpace(align=align))
    for parameter in form.parameters():
        nn.init.normal_(parameter)
    return form


def slow_output(form: CandidateForm, pooled: Tensor, gates: Tensor, training: bool) -> Tensor:
    """Eq. 1 to 4 and 7, candidate by candidate and column by column."""
    output = torch.zeros(len(pooled), form.dim)
    for number, (dim, _, start) in enumerate(form.candidates):
        columns = pooled[:, start : start + dim]
        if hasattr(form, "layers"):
            columns = columns @ form.layers[number].weight.t() + form.layers[number].bias
            means, variances = (v.view(-1, form.dim)[number] for v in (form.norm.running_mean, form.norm.running_var))
        else:
            means, variances = (v[start : start + dim] for v in (form.norm.running_mean, form.norm.running_var))
        for k in range(columns.shape[1]):
            column = columns[:, k]
            mean = column.mean() if training else means[k]
            variance = (column - column.mean()).square().mean() if training else variances[k]
            output[:, k] += gates[:, number] * (column - mean) / (variance + 1e-5).sqrt()
    return output


@variants
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("align", [1, 4])
def test_the_output_is_that_of_the_equations(variant: dict[str, Any], training: bool, per_example: bool, align: int) -> None:
    form = form_of(11, align, **variant)
    assert [c.dim for c in form.candidates] == [2, 4, 6, 8, 10]
    assert [c.stored for c in form.candidates] == ([2, 4, 6, 8, 10] if align == 1 else [4, 4, 8, 8, 11])
    pooled = torch.randn(50, form.width) * 3 + 1
    form(torch.randn(50, form.width), torch.ones(1, 5))  # running statistics that are not those at the start
    gates = torch.rand(50 if per_example else 1, 5)
    expected = slow_output(form, pooled, gates.expand(50, 5), training)
    assert torch.allclose(form.train(training)(pooled, gates), expected, atol=1e-5)


def test_a_single_bag_is_normed_as_in_evaluation() -> None:
    form = form_of(10)
    form(torch.randn(50, form.width), torch.ones(1, 5))
    one, gates = torch.randn(1, form.width), torch.rand(1, 5)
    assert torch.equal(form.train()(one, gates), form.eval()(one, gates))


@pytest.mark.parametrize("lookup", ["shared", "separate"])
@pytest.mark.parametrize("training", [True, False])
def test_all_tables_at_once_give_what_each_gives(lookup: str, training: bool) -> None:
    forms = [form_of(dim, lookup=lookup).train(training) for dim in (10, 12, 4)]
    twins = [form_of(dim, lookup=lookup).train(training) for dim in (10, 12, 4)]
    pooled = [torch.randn(20, form.width) for form in forms]
    gates = [torch.rand(1, form.n_gates) for form in forms]
    made = forms[0].together(forms, torch.cat(pooled, 1), gates)
    expected = torch.cat([twin(part, gate) for twin, part, gate in zip(twins, pooled, gates, strict=True)], 1)
    assert torch.allclose(made, expected, atol=1e-6)
    for form, twin in zip(forms, twins, strict=True):
        assert torch.allclose(form.norm.running_mean, twin.norm.running_mean)
        assert torch.allclose(form.norm.running_var, twin.norm.running_var)


def test_a_shared_lookup_costs_the_largest_candidate_and_a_separate_one_all_of_them() -> None:
    for lookup, widths in (("shared", [10, 10, 4]), ("separate", [30, 30, 6])):
        model, _, _ = autodim(ONE_EACH, steps=0, lookup=lookup)
        tables = model.collection.embedding_bags.values()
        assert [bag.weight.shape[1] for bag in tables] == widths
        assert sum(p.numel() for p in model.collection.parameters()) == 60 * widths[0] + 80 * widths[1] + 7 * widths[2]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("to_none", [True, False])
def test_the_tables_that_were_there_before_take_no_memory_while_others_are_searched(kind: Any, to_none: bool) -> None:
    model = task(ONE_EACH)
    before = list(model.collection.parameters())
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, [ONE_EACH.batch(seed=50)])  # it has gradients and a state
    session = es.prepare(model, algorithm=es.AutoDim(every=2, candidates=(2, 3)), space=es.SearchSpace(align=1))
    assert not any(weight.untyped_storage().nbytes() for weight in before)
    session.attach(optimizer, validation=[ONE_EACH.batch(seed=900)])
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not any(id(weight) in held or weight in optimizer.state or weight.grad is not None for weight in before)
    optimizer.zero_grad(set_to_none=to_none)
    train(model, optimizer, (ONE_EACH.batch(seed=seed) for seed in range(4)))
    session.compact(session.derive("70%"))
    train(model, optimizer, [ONE_EACH.batch(seed=20)])


# Eq. 5 and 6


def test_the_temperature_falls_to_a_half() -> None:
    assert [temperature(t) for t in (0, 1, 1000, 2999, 3000, 10**6)] == pytest.approx([2, 1.9995, 1.5, 0.5005, 0.5, 0.5])


def test_samples_are_those_of_a_gumbel_softmax() -> None:
    """Eq. 6 with the same uniform numbers; its argmax is drawn by alpha (Eq. 5)."""
    search = es.AutoDim().build()
    search._set_vectors(torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -torch.inf]]))
    search._random.manual_seed(3)
    u = torch.exp(-torch.empty(2, 3).exponential_(generator=search._random))
    search._random.manual_seed(3)
    p, alpha = search.sample(1000).detach(), search.alpha.detach()
    for row in range(2):
        scores = [float(torch.exp((alpha[row, n].log() - torch.log(-torch.log(u[row, n]))) / 1.5)) for n in range(3)]
        assert p[row].tolist() == pytest.approx([score / sum(scores) for score in scores], rel=1e-4)
    drawn = torch.stack([search.sample(0).argmax(1) for _ in range(4000)])
    shares = torch.stack([(drawn == n).float().mean(0) for n in range(3)], 1)
    assert torch.allclose(shares, alpha, atol=0.03)


def seen_gates(session: Session) -> list[Tensor]:
    return [torch.cat(supernet.next_gates, 1).detach() for supernet in session._tables.supernets]


def test_every_weight_step_draws_anew_and_evaluation_weighs_by_alpha() -> None:
    model, session, optimizer = autodim(PLAIN)
    seen = []
    for seed in range(3):
        train(model, optimizer, [PLAIN.batch(seed=seed)])
        seen += seen_gates(session)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(torch.cat(session.gates), session.algorithm.alpha.detach())
    assert not torch.equal(session.algorithm.alpha[0], session.algorithm.alpha[1])


def test_alpha_follows_adam_along_the_validation_gradient() -> None:
    """Algorithm 1, lines 2 and 3, with the gradient that the session gives for the same noise."""
    _, session, _ = autodim(PLAIN, lr=0.03)
    search, twin = session.algorithm, es.AutoDim(lr=0.03).build()
    twin.load_state_dict(copy.deepcopy(search.state_dict()))
    for seed in range(4):
        batch = PLAIN.batch(seed=seed)
        gates = twin._gates(session, twin.sample(session.step_count))
        loss, (gradient,) = session.probe.gate_gradients(batch, gates, [twin.vectors])
        twin.vectors.grad = gradient
        twin._optimizer.step()
        assert session.step(batch)["loss"] == pytest.approx(loss, abs=1e-6)
        assert torch.allclose(search.vectors, twin.vectors, atol=1e-6)


searches = pytest.mark.parametrize("algorithm", [es.AutoDim, es.Sam])


@searches
@pytest.mark.parametrize("every", [2, 3])
def test_alpha_takes_a_step_after_so_many_weight_steps(algorithm: Any, every: int) -> None:
    model, session, optimizer = searched(PLAIN, 1, algorithm=algorithm(every=every))
    search, steps = session.algorithm, []
    for step in range(2, 8):
        before = search.vectors.detach().clone()
        train(model, optimizer, [PLAIN.batch(seed=step)])
        if not torch.equal(search.vectors, before):
            steps.append(step)
    assert steps == list(range(every, 8, every))


@pytest.mark.parametrize(("algorithm", "training"), [(es.AutoDim, False), (es.Sam, True)])
def test_autodims_alpha_learns_from_validation_batches_and_sams_from_training_batches(algorithm: Any, training: bool) -> None:
    """Algorithm 1 and III.D. The model's weights stand still: AutoDim would see the training batches through them."""

    def alpha(of_training: int, of_validation: int) -> Tensor:
        model = task(PLAIN)
        session = es.prepare(model, algorithm=algorithm(every=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        session.attach(optimizer, validation=[PLAIN.batch(seed=900 + of_validation)])
        train(model, optimizer, [PLAIN.batch(seed=of_training)] * 3)
        return session.algorithm.alpha.detach()

    assert torch.equal(alpha(0, 0), alpha(1, 0)) == (not training)
    assert torch.equal(alpha(0, 0), alpha(0, 1)) == training


def test_weight_steps_have_samples_of_their_steps_temperature() -> None:
    """Line 5 of Algorithm 1, with Eq. 6 at the temperature of III.B."""
    model, session, _ = autodim(PLAIN, steps=40)
    twin = es.AutoDim().build()
    twin.load_state_dict(copy.deepcopy(session.algorithm.state_dict()))
    model(PLAIN.batch(seed=1))
    expected = twin._gates(session, twin.sample(session.step_count))
    assert temperature(session.step_count) < temperature(0)
    for gates, wanted in zip(model.collection.next_gates, expected, strict=True):
        assert torch.equal(gates, wanted)


@pytest.mark.parametrize(("budget", "warns"), [("10%", True), ("75%", False), ("100 params", True)])
def test_a_budget_too_small_for_the_smallest_candidates_is_said_before_the_search(
    budget: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _, session, _ = searched(PLAIN, 1, algorithm=es.AutoDim(), budget=budget)
    assert ("the smallest candidates take" in caplog.text) == warns
    if warns:
        session.step(PLAIN.batch(seed=1))
        with pytest.raises(BudgetError):
            session.derive()


@variants
@pytest.mark.parametrize("world", [ONE_EACH, WIDE], ids=["one id", "bags"])
def test_gradients_of_alpha_are_those_of_finite_differences(variant: dict[str, Any], world: World) -> None:
    model, session, _ = autodim(world, **variant)
    smooth(model)
    batch, search = world.batch(64, seed=5), session.algorithm
    state = search._random.get_state()

    def loss_at(vectors: Tensor) -> tuple[float, list[Tensor]]:
        search._random.set_state(state)
        search._set_vectors(vectors)
        return session.probe.gate_gradients(batch, search._gates(session, search.sample(100)), [search.vectors])

    at = search.vectors.detach() + torch.where(search.vectors.isinf(), 0.0, torch.randn(search.vectors.shape))
    _, (gradient,) = loss_at(at)
    for place in [place for place in product(range(len(at)), range(at.shape[1])) if at[place] > -torch.inf]:
        shift = torch.zeros_like(at)
        shift[place] = 0.02
        expected = (loss_at(at + shift)[0] - loss_at(at - shift)[0]) / 0.04
        assert float(gradient[place]) == pytest.approx(expected, rel=0.05, abs=3e-5)


def smooth(model: Any) -> None:
    """Dropout and ReLU's kink would disturb differences."""
    model.over[2], model.over[3] = nn.Tanh(), nn.Identity()


@variants
def test_second_order_gradients_are_those_of_finite_differences(variant: dict[str, Any]) -> None:
    """Eq. 12: the validation loss after one real step of SGD on a training batch, under the same weights of candidates."""
    batch, train_batch = ONE_EACH.batch(64, seed=1), ONE_EACH.batch(64, seed=2)
    model, session, _ = autodim(ONE_EACH, **variant)
    smooth(model)
    session._train_batch = train_batch
    weights = [torch.rand_like(gate).requires_grad_() for gate in session.gates]
    _, first = session.probe.gate_gradients(batch, weights, weights)
    _, second = session.probe.gate_gradients(batch, weights, weights, 1.0)
    assert max(relative_error(a, b) for a, b in zip(first, second, strict=True)) > 0.02
    for table in range(3):
        values = []
        for sign in (1, -1):
            shifted = [w.detach().clone() for w in weights]
            shifted[table][0, 0] += sign * 5e-3
            session.use_gates(shifted)
            values.append(loss_after_step(model, train_batch, batch))
        assert float(second[table][0, 0]) == pytest.approx((values[0] - values[1]) / 0.01, rel=0.05, abs=3e-4)


@torch.no_grad()
def loss_after_step(model: Any, train_batch: Any, batch: Any) -> float:
    """The slow way: copy the model, which then has no session that draws weights, and take a real step of SGD, of rate 1."""
    moved = copy.deepcopy(model)
    moved.zero_grad()
    with torch.enable_grad():
        moved(train_batch)[0].backward()
    for parameter in moved.parameters():
        parameter.sub_(0.0 if parameter.grad is None else parameter.grad)
    with torch.enable_grad():  # otherwise it would be an evaluation
        return float(moved(batch)[0].detach())


def test_a_second_order_search_runs_and_differs() -> None:
    first, second = (autodim(PLAIN, xi=xi)[1].algorithm.vectors for xi in (0.0, 1.0))
    assert not torch.equal(first, second)


@variants
def test_a_search_step_leaves_no_trace_but_alpha(variant: dict[str, Any]) -> None:
    model, session, optimizer = autodim(WIDE, **variant)
    optimizer.zero_grad()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    alpha = session.algorithm.alpha.clone()
    session.step(WIDE.batch(seed=77))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any("running_mean" in key and "forms" in key for key in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(session.algorithm.alpha, alpha)


def test_forms_draw_from_the_searchs_seed_and_not_from_the_callers_random_numbers() -> None:
    weights = []
    for _ in range(2):
        model = task(PLAIN)
        torch.manual_seed(len(weights))
        state = torch.get_rng_state()
        session = es.prepare(model, algorithm=es.AutoDim(transform="linear"), seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(torch.cat([p.flatten() for p in session.form(0).parameters()]))
    assert torch.equal(*weights)


# Plans


def plan_of(session: Session, dims: list[int]) -> SizePlan:
    linear = session.config.transform == "linear"
    plans = [TablePlan(s, (Block(s.rows, d),), projection=linear, bias=True) for s, d in zip(session.specs, dims, strict=True)]
    return SizePlan(tuple(plans), session.space.align)


def gate_as(session: Session, plan: SizePlan) -> None:
    """Let through what a plan keeps: the largest candidate that is stored in as many columns."""
    forms = [session.form(table) for table in range(len(session.specs))]
    pairs = zip(forms, plan.tables, strict=True)
    largest = [max(n for n, c in enumerate(form.candidates) if c.stored == table.width) for form, table in pairs]
    session.set_gates([torch.eye(form.n_gates)[[number]] for form, number in zip(forms, largest, strict=True)])


@variants
@pytest.mark.parametrize("world", ["wide", *WORLDS])
@pytest.mark.parametrize("align", [1, 4])
def test_the_compact_model_equals_the_gated_one_in_evaluation(variant: dict[str, Any], world: str, align: int) -> None:
    """Whatever candidate is chosen; with bags of any length, the empty ones among them."""
    where = WIDE if world == "wide" else WORLDS[world]
    model, session, _ = autodim(where, align, **variant)
    stored = [sorted({c.stored for c in session.form(table).candidates}) for table in range(len(session.specs))]
    batch, plan = where.batch(50, seed=3), plan_of(session, [widths[t % len(widths)] for t, widths in enumerate(stored)])
    gate_as(session, plan)
    expected = model.eval().collection(batch.sparse_features).values(), model(batch)[1][1]
    session.compact(plan)
    tolerance = 1e-3 if world == "half" else 1e-5
    assert relative_error(model.collection(batch.sparse_features).values(), expected[0]) <= tolerance
    assert torch.allclose(model(batch)[1][1], expected[1], atol=10 * tolerance)
    assert stored_bytes(model) == plan.size_bytes


@variants
def test_what_is_compacted_trains_on_in_every_stored_column(variant: dict[str, Any]) -> None:
    model, session, optimizer = autodim(ONE_EACH, 4, candidates=(2, 9), **variant)
    plan = plan_of(session, [4, 10, 4])
    session.compact(plan)
    before = {name: value.clone() for name, value in model.collection.named_parameters()}
    train(model, optimizer, (ONE_EACH.batch(seed=seed) for seed in range(6)))
    for name, value in model.collection.named_parameters():
        assert bool((value != before[name]).any(0).all()), name


@searches
def test_without_a_budget_the_largest_alpha_decides(algorithm: Any) -> None:
    """Eq. 13."""
    _, session, _ = searched(ONE_EACH, algorithm=algorithm(every=2), space=es.SearchSpace(align=1))
    session.algorithm._set_vectors(torch.tensor([[0, 0, 3, 0, 2.0], [0, 0, 0, 0, 1.0], [1.0, 2, *[-torch.inf] * 3]]))
    assert [plan.width for plan in session.derive(strict=False).tables] == [6, 10, 4]


def test_dims_are_stored_and_counted_as_multiples_of_align() -> None:
    _, session, _ = autodim(ONE_EACH, align=4)
    session.algorithm._set_vectors(torch.tensor([[1, 0, 0, 0, 0.0], [0, 0, 1, 0, 0.0], [1.0, 0, *[-torch.inf] * 3]]))
    plan = session.derive(strict=False)
    assert [table.width for table in plan.tables] == [4, 8, 4]
    assert plan.size_bytes == (60 * 4 + 80 * 8 + 7 * 4) * 4 + (12 + 10 + 4) * 4  # and a bias each


def by_hand(session: Session) -> Iterator[tuple[int, float, list[int]]]:
    """Every plan: bytes, and the sum of the losses of its dims, each beside Eq. 13's choice for the others."""
    forms = [session.form(table) for table in range(len(session.specs))]
    best = session.algorithm.vectors.argmax(1).tolist()
    batches = session.validation_batches(2)

    def loss(numbers: list[int]) -> float:
        gates = [torch.eye(form.n_gates)[[number]] for form, number in zip(forms, numbers, strict=True)]
        return sum(float(session.probe.evaluate(batch, gates).loss.detach()) for batch in batches) / len(batches)

    table_losses = [[loss([*best[:t], n, *best[t + 1 :]]) for n in range(form.n_gates)] for t, form in enumerate(forms)]
    for numbers in product(*(range(form.n_gates) for form in forms)):
        dims = [form.candidates[n].dim for form, n in zip(forms, numbers, strict=True)]
        yield plan_of(session, dims).size_bytes, sum(row[n] for row, n in zip(table_losses, numbers, strict=True)), dims


@variants
@pytest.mark.parametrize("budget", ["80%", "60%", "45%"])
def test_within_a_budget_the_losses_add_up_to_the_least(variant: dict[str, Any], budget: str) -> None:
    model, session, _ = autodim(ONE_EACH, scored_on=2, candidates=(2, 4, 8), **variant)
    plan = session.derive(budget)
    model.eval()
    limit = es.Budget.of(budget).limit(session.original_bytes)
    found = sorted((total, dims) for size, total, dims in by_hand(session) if size <= limit)
    (mine,) = [total for total, dims in found if dims == [table.width for table in plan.tables]]
    assert mine == pytest.approx(found[0][0], abs=1e-6)
    assert plan.size_bytes <= limit


def test_a_budget_below_the_smallest_candidates_is_an_error() -> None:
    _, session, _ = autodim(ONE_EACH, candidates=(4, 8))
    with pytest.raises(BudgetError, match="candidates of 'collection.t1' start at 4"):
        session.derive("20%")
    with pytest.raises(BudgetError, match="parameters"):
        session.derive(es.Budget(params=100))
    assert session.derive(es.Budget(params=700)).n_params <= 700


def test_scoring_is_in_evaluation_mode_and_leaves_every_modules_mode_alone() -> None:
    model, session, _ = autodim(PLAIN)
    model.train()
    model.over[3].eval()
    modes = [module.training for module in model.modules()]
    reference = session.gates
    alternatives = [(0, torch.eye(4)[[1]]), (1, torch.eye(4)[[2]]), (1, reference[1])]
    found = losses(session, reference, alternatives, 3)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    for (table, gates), loss in zip(alternatives, found, strict=True):
        mixed = [gates if number == table else gate for number, gate in enumerate(reference)]
        expected = [float(session.probe.evaluate(batch, mixed).loss.detach()) for batch in session.validation_batches(3)]
        assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_a_plan_with_another_dim_is_refused() -> None:
    _, session, _ = autodim(ONE_EACH)
    with pytest.raises(PlanError, match=r"dims \[2, 4, 6, 8, 10\] for table 'collection.t0'; got 3"):
        session.compact(plan_of(session, [3, 4, 4]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": ()}, "positive dims, ascending, each once"),
        ({"candidates": (0, 4)}, "positive dims"),
        ({"candidates": (4, 2)}, "ascending"),
        ({"candidates": (2, 2)}, "each once"),
        ({"candidates": (2.5, 4)}, r"candidates must be whole numbers; got \(2.5, 4\)"),
        ({"candidates": "24"}, "candidates must be whole numbers; got '24'"),
        ({"lookup": "both"}, "lookup must be 'shared' or 'separate'"),
        ({"transform": "conv"}, "transform 'padding' or 'linear'"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"scored_on": 0}, "scored_on must be at least 1"),
        ({"xi": -1.0}, "xi must be at least 0"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        es.AutoDim(**settings)


@pytest.mark.parametrize("transform", ["padding", "linear"])
def test_a_table_narrower_than_every_candidate_keeps_its_dim_and_is_left_as_it_is(transform: Any) -> None:
    model, session, _ = autodim(ONE_EACH, candidates=(6, 8), transform=transform, every=1)
    features = ONE_EACH.features(40, seed=3)
    plan = session.derive("70%")
    narrow = plan.tables[2]
    assert (narrow.width, narrow.bias, narrow.projection) == (4, False, False)
    of_narrow = dict(model.eval().collection(features).to_dict())["f2"]
    table = model.collection.embedding_bags["t2"]
    jagged = features["f2"]
    assert torch.allclose(of_narrow, table(jagged.values(), jagged.offsets()), atol=1e-6)
    session.compact(plan)
    assert torch.allclose(model.collection(features).to_dict()["f2"], of_narrow, atol=1e-6)


def test_tables_that_are_all_narrower_than_every_candidate_leave_nothing_to_search() -> None:
    model = task(PLAIN)
    with pytest.raises(SpaceError, match=r"the candidates are \[16, 32\], and the tables' dims \[8\]"):
        es.prepare(model, algorithm=es.AutoDim(candidates=(16, 32)))
    assert type(model.collection) is EmbeddingBagCollection


@searches
def test_a_padded_search_may_end_in_linear_maps(algorithm: Any) -> None:
    """III.H: the plan's tables have a map each, which starts as the padding it takes the place of, and is trained."""
    model, session, optimizer = searched(ONE_EACH, algorithm=algorithm(candidates=(2, 4, 6), maps=True, every=1))
    plan = session.derive("70%")
    assert all(table.projection and table.bias for table in plan.tables)
    features = ONE_EACH.features(40, seed=3)
    gate_as(session, plan)
    expected = model.eval().collection(features).values()
    session.compact(plan)
    assert relative_error(model.collection(features).values(), expected) <= 1e-5
    assert stored_bytes(model) == plan.size_bytes
    maps = [p for name, p in model.named_parameters() if "projection" in name]
    before = [p.detach().clone() for p in maps]
    train(model.train(), optimizer, [ONE_EACH.batch(seed=20)])
    assert len(maps) == 3 and not any(torch.equal(a, b) for a, b in zip(before, maps, strict=True))


@searches
def test_a_factorization_machine_has_maps_of_its_factors_alone(algorithm: Any) -> None:
    """III.H is for these: all factors have one width. Weights per id, of dim 1, have no candidates, and stay as they are."""
    schema = Schema((Field("user", 60), Field("movie", 40)), (), ("movie",), CLICK)
    torch.manual_seed(0)
    collate, model = Collate(schema, 32), Fm(8).build(schema)
    batches = [collate(torch.zeros(32, 0), torch.randint(40, (32, 2)), torch.randint(2, (32,)).float()) for _ in range(8)]
    session = es.prepare(model, algorithm=algorithm(candidates=(2, 4), maps=True, every=1), space=es.SearchSpace(align=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=batches[:1])
    train(model, optimizer, batches[1:])
    plan = session.derive("70%")
    assert [(t.table.dim, t.projection, t.bias) for t in plan.tables] == [(8, True, True)] * 2 + [(1, False, False)] * 2
    gate_as(session, plan)
    expected = model.eval()(batches[0])[1][1]
    session.compact(plan)
    assert relative_error(model(batches[0])[1][1], expected) <= 1e-5
    assert stored_bytes(model) == plan.size_bytes


def test_the_defaults_are_the_papers() -> None:
    config = es.AutoDim()
    assert (config.candidates, config.lookup, config.transform) == ((2, 4, 6, 8, 10), "shared", "padding")
    assert (config.lr, config.every, config.xi, config.warm_up, config.retrains) == (0.01, 10, 0.0, 0, True)
    assert isinstance(config.build(), AutoDimSearch)


@variants
def test_fused_tables_of_another_width_are_searched_and_compacted(variant: dict[str, Any]) -> None:
    wide = World((("t0", 60, 12, ("f0",), SUM), ("t1", 80, 12, ("f1", "g"), MEAN)), longest_bag=3)
    model = task(wide)
    session = es.prepare(model, algorithm=es.AutoDim(every=2, **variant), fused=FUSED)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[wide.batch(seed=900)])
    train(model, optimizer, (wide.batch(seed=seed) for seed in range(8)))
    plan = session.derive("60%")
    gate_as(session, plan)
    features = wide.features(40, seed=3)
    expected = model.eval().collection(features).values()
    session.compact(plan)
    assert relative_error(model.collection(features).values(), expected) <= 1e-5
    train(model, optimizer, [wide.batch(seed=20)])
