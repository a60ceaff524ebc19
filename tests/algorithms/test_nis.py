"""NIS against the equations of its paper."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import PLAIN, WORLDS, Task, relative_error, searched, task, train
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

import embsearch_plugin as es
from embsearch_plugin.algorithms.parts.block_choices import BlockChoices
from embsearch_plugin.algorithms.parts.embedding_blocks import EmbeddingBlocks, menu
from embsearch_plugin.algorithms.parts.quality import quality_of
from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import QualityError
from embsearch_plugin.files import read_state, write_state
from embsearch_plugin.plan import TablePlan
from embsearch_plugin.search.session import Session
from embsearch_plugin.space import RowBlocks

SPACE = es.SearchSpace(row_blocks=(0.1, 0.3, 0.6), column_chunks=(4, 4))


def nis(world: str = "one id", steps: int = 12, fused: Any = None, **settings: Any) -> tuple[Task, Session, Any]:
    return searched(WORLDS[world], steps, algorithm=es.Nis(**{"warm_up": 2, **settings}), space=SPACE, fused=fused)


def blocks(rows: tuple[int, ...] = (10, 20, 30), widths: tuple[int, ...] = (2, 3, 1)) -> EmbeddingBlocks:
    return EmbeddingBlocks(Table("c", "t", sum(rows), sum(widths), torch.float32, ("f",)), rows, widths)


# Choices (3.3.1).


def test_the_papers_search_space_is_the_default() -> None:
    """4.1.3: 20 blocks, of which one table offers S x T + 1 single-size and (S + 1)^T multi-size embeddings."""
    space = es.Nis().space(None)
    assert space.cut_rows(1000) == (200,) * 5
    assert space.chunk_widths(32) == (8,) * 4
    assert space.chunk_widths(8) == (4, 4)  # chunks are not cut narrower than what is stored
    assert es.Nis().space(SPACE) == SPACE
    assert es.Nis().space(es.SearchSpace(align=1)).chunk_widths(10) == (2, 3, 3, 2)  # what is not cut otherwise is the paper's
    assert menu(5, 4, "se").shape == (1, 21, 4)
    assert menu(5, 4, "me").shape == (4, 6, 4)
    assert es.SearchSpace(row_blocks=(0.1, 0.2, 0.2, 0.2, 0.3)).cut_rows(1000) == (100, 200, 200, 200, 300)  # 4.2.2


def test_the_arms_of_a_single_size_embedding_are_all_corners_and_nothing() -> None:
    table = blocks()
    (arms,) = table.menu("se")
    gates = {tuple(gate.flatten().tolist()) for gate in table.gates(arms)}
    expected = set()
    for s, t in [(0, 0), *itertools.product((1, 2, 3), (1, 2, 3))]:
        places = itertools.product(range(3), range(6))
        expected.add(tuple(1.0 if block < s and column < (0, 2, 5, 6)[t] else 0.0 for block, column in places))
    assert gates == expected


@pytest.mark.parametrize("mode", ["se", "me"])
def test_costs_are_those_of_the_paper(mode: Any) -> None:
    """SE: C = V_s x D_t. ME: C = sum over t of d_t x V_{s_t}; by counting what the gates let through."""
    table = blocks()
    for arms in itertools.product(*(range(len(each)) for each in table.menu(mode))):
        choices = BlockChoices([table], mode, torch.device("cpu"))
        (heights,) = choices.heights(torch.tensor(arms))
        counted = sum(rows * int(gate.sum()) for rows, gate in zip(table.rows, table.gates(heights), strict=True))
        assert int(table.n_weights(heights)) == counted
        if mode == "se" and arms[0]:
            s, t = (arms[0] - 1) // 3 + 1, (arms[0] - 1) % 3 + 1
            assert counted == (0, 10, 30, 60)[s] * (0, 2, 5, 6)[t]
        if mode == "me":
            assert counted == sum(d * (0, 10, 30, 60)[s] for d, s in zip(table.widths, arms, strict=True))
    assert int(choices.cost([heights], Unit.BYTES)) == 4 * int(choices.cost([heights], Unit.PARAMETERS))


@pytest.mark.parametrize("mode", ["se", "me"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_tables_that_are_cut_alike_are_asked_together_as_one_by_one(shape: tuple[int, ...], mode: Any) -> None:
    tables = [blocks(), blocks((5,), (2, 2)), blocks((7, 1, 4)), blocks((5,), (2, 1)), blocks((9,), (2, 2))]
    choices = BlockChoices(tables, mode, torch.device("cpu"))
    drawn = torch.stack([torch.randint(arms, shape) for arms in choices.arms], dim=-1)
    heights, first, cost = choices.heights(drawn), 0, torch.zeros(shape, dtype=torch.int64)
    for table, own, gates in zip(tables, heights, choices.gates(heights), strict=True):
        arms = table.menu(mode)
        expected = sum(menu[drawn[..., first + number]] for number, menu in enumerate(arms))
        assert torch.equal(own, expected)
        assert torch.equal(gates, table.gates(expected))
        cost, first = cost + table.n_weights(expected), first + len(arms)
    assert torch.equal(choices.cost(heights, Unit.PARAMETERS), cost)


def test_choices_follow_where_rows_are_cut_anew() -> None:
    """As rows of all tables are ranked in one list, blocks have other sizes whenever they are ranked."""
    _, session, _ = nis()
    search = session.algorithm
    for shift in (0, 5):
        if shift:
            a, b = (cut.sizes for cut in session._tables.blocks)
            moved = [(sizes[0] + shift, sizes[1] - shift, *sizes[2:]) for sizes in (a, b)]
            cuts = zip(moved, session._tables.blocks, strict=True)
            session._tables.cut([RowBlocks(sizes, cut.order) for sizes, cut in cuts])
        assert [table.rows for table in search._choices(session).tables] == [cut.sizes for cut in session._tables.blocks]


def test_mean_gates_are_the_mean_of_many_draws() -> None:
    for mode in ("se", "me"):
        choices = BlockChoices([blocks(), blocks((5,), (2, 2)), blocks((7, 1, 4))], mode, torch.device("cpu"))
        widest = max(choices.arms)
        random = torch.Generator().manual_seed(1)
        weights = torch.rand(len(choices.arms), widest, generator=random) + 0.1
        weights[torch.arange(widest) >= torch.tensor(choices.arms)[:, None]] = 0
        probabilities = weights / weights.sum(1, keepdim=True)
        drawn = torch.multinomial(probabilities, 20_000, replacement=True, generator=random).t()
        means = choices.mean_gates(probabilities)
        for gates, mean in zip(choices.gates(choices.heights(drawn)), means, strict=True):
            torch.testing.assert_close(gates.mean(0), mean, atol=0.02, rtol=0)


def test_small_tables_have_one_row_block() -> None:
    _, session, _ = searched(WORLDS["unequal dims"], algorithm=es.Nis(warm_up=2), space=es.SearchSpace(row_blocks=3))
    choices = BlockChoices.of(session, "me")
    assert [len(table.rows) for table in choices.tables] == [3, 3, 1]
    assert choices.arms == [4, 4, 4, 4, 4, 2]


# What runs when.


def test_all_blocks_train_in_the_warm_up_and_one_choice_afterwards() -> None:
    """3.4.1; and a row outside the choice trains nothing."""
    model, session, optimizer = nis(steps=1)
    assert session.algorithm.controller is None
    assert model.collection.next_gates is None
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(1, 4)))
    assert session.search_steps == 3
    seen = set()
    for number in range(12):
        optimizer.zero_grad()
        model(PLAIN.batch(seed=50 + number))[0].backward()
        for table, gates in zip(session.tables, model.collection.next_gates, strict=True):
            assert gates.unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
            gradient = model.collection.inner.embedding_bags[table.spec.name].weight.grad
            closed = gates[table.blocks.lookup().long()] == 0
            assert not gradient[closed].any()
            seen.add(tuple(gates.flatten().tolist()))
    assert len(seen) > 6


def test_a_choice_is_shared_by_a_group_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A.2.2: one reward for each; logits are those of every group's own gates."""
    model, session, _ = nis(group=8)
    model.over[3] = nn.Identity()
    model.eval()
    algorithm, used = session.algorithm, []
    original = session.probe.evaluate
    monkeypatch.setattr(session.probe, "evaluate", lambda *args: used.append((args, original(*args))) or used[-1][1])
    batch = PLAIN.batch(32, seed=70)
    session.step(batch)
    ((_, gates, group), outcome) = used[-1]
    assert (algorithm.groups, group) == (4, 8)
    assert all(len(gate) == 4 for gate in gates)
    for number in range(4):
        alone = original(batch, [gate[number] for gate in gates]).logits
        torch.testing.assert_close(outcome.logits[8 * number : 8 * number + 8], alone[8 * number : 8 * number + 8])


def test_a_batch_larger_than_any_before_shares_its_choices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: the next one of that size has a choice for each group."""
    _, session, _ = nis(group=8)
    drawn, algorithm = [], session.algorithm
    learn = algorithm.controller.learn
    monkeypatch.setattr(
        algorithm.controller, "learn", lambda choices, reward: drawn.append(len(choices)) or learn(choices, reward)
    )
    algorithm.groups = 0
    algorithm.config = es.Nis(group=8, quality=lambda logits, labels: labels.sum())
    for size in (8, 64, 64, 16, 64):
        session.step(PLAIN.batch(size, seed=73))
    assert drawn == [1, 1, 8, 2, 8]


@pytest.mark.parametrize(("label", "shown"), [(5.0, "5.0"), (-1.0, "-1.0"), (math.nan, "nan")])
def test_labels_that_are_not_of_two_classes_have_no_auc(label: float, shown: str) -> None:
    _, session, _ = nis(group=8)
    batch = PLAIN.batch(32, seed=74)
    batch.labels[3] = label
    logits = session.algorithm.controller.logits.detach().clone()
    session.probe._objective = without_loss
    with pytest.raises(QualityError, match=rf"needs labels from 0 to 1, .* got {shown}\.\n .* quality='mse' for ratings"):
        session.step(batch)
    assert torch.equal(session.algorithm.controller.logits, logits)


def without_loss(model: Task, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels, and a loss that is a number whatever the labels are."""
    _, (_, logits, labels) = model(batch)
    return logits.square().mean(), logits, labels


def test_the_reward_is_quality_minus_what_is_over_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.3.2, group by group, with a quality of our own."""
    _, session, _ = nis(group=8, penalty=0.3, quality=lambda logits, labels: labels.sum() / 4)
    learned = {}
    algorithm = session.algorithm
    monkeypatch.setattr(algorithm.controller, "learn", lambda drawn, reward: learned.update(drawn=drawn, reward=reward))
    batch = PLAIN.batch(32, seed=71)
    session.step(batch)
    choices = BlockChoices.of(session, "me")
    for number, drawn in enumerate(learned["drawn"]):
        spent = 0
        for table, gate in zip(session.tables, choices.gates(choices.heights(drawn)), strict=True):
            spent += sum(4 * n * int(row.sum()) for n, row in zip(table.blocks.sizes, gate, strict=True))
        over = max(spent / (0.4 * session.original_bytes) - 1, 0)
        expected = float(batch.labels[8 * number : 8 * number + 8].sum()) / 4 - 0.3 * over
        assert float(learned["reward"][number]) == pytest.approx(expected, abs=1e-6)


def test_groups_of_one_class_have_no_auc_and_are_counted() -> None:
    _, session, _ = nis(group=8)
    batch = PLAIN.batch(32, seed=72)
    batch.labels[:16] = 1
    batch.labels[16::2], batch.labels[17::2] = 0, 1
    before = session.algorithm.skipped
    assert session.step(batch)["skipped_groups"] == before + 2
    batch.labels[:] = 0
    logits = session.algorithm.controller.logits.detach().clone()
    assert session.step(batch) == {}
    assert torch.equal(session.algorithm.controller.logits, logits)


def test_a_search_step_has_one_group_where_items_are_ranked() -> None:
    """A.2.2; elsewhere a validation batch holds several."""
    assert (es.Nis(quality="recall@1").search_batch, es.Nis().search_batch) == (64, None)


@pytest.mark.parametrize("shared", [False, True])
def test_examples_that_share_bags_share_a_choice(shared: bool) -> None:
    """Where a model looks up more bags than it answers for, groups of examples have no bags of their own."""
    _, session, _ = nis(group=4)

    def top_k(model: Task, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        users, items = model.collection(batch.sparse_features).values().split(8, 1)
        examples = len(users) - 3 * shared  # the last three bags hold everyone's negatives
        positive, negatives = (users * items).sum(1, keepdim=True)[:examples], users[:examples] @ items[-3:].t()
        logits = torch.cat([positive, negatives], 1)
        return -logits.log_softmax(1)[:, 0].mean(), logits, torch.zeros(examples)

    session.probe._objective = top_k
    assert session.probe.groups_in(PLAIN.batch(32), 4) == (1 if shared else 8)
    session.algorithm.groups = 0
    session.algorithm.config = es.Nis(quality="recall@2", group=4)
    assert 0 <= session.step(PLAIN.batch(32))["reward"] <= 1


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        (lambda logits, labels: math.nan, "must be a number; got nan"),
        (lambda logits, labels: None, "must be a number; got NoneType None"),
        (lambda logits, labels: logits, r"must be a number; got Tensor"),
        ("recall@1", r"'recall@1' needs logits \(B, 1 \+ negatives\), .*returns logits \(32,\)"),
    ],
)
def test_a_quality_that_is_no_number_changes_nothing(quality: Any, message: str) -> None:
    model, session, _ = nis()
    object.__setattr__(session.algorithm.config, "quality", quality)
    before = [t.clone() for t in [*model.state_dict().values(), *session.gates, session.algorithm.controller.logits]]
    with pytest.raises(es.EmbsearchError, match=message):
        session.step(PLAIN.batch(32, seed=3))
    after = [*model.state_dict().values(), *session.gates, session.algorithm.controller.logits]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_recall_that_is_always_one_is_refused() -> None:
    logits = torch.randn(6, 5)
    assert 0 <= float(quality_of("recall@4")(logits, torch.zeros(6, 5))) <= 1
    with pytest.raises(es.EmbsearchError, match="more than 5 candidates, or it is always one; the model returns 5"):
        quality_of("recall@5")(logits, torch.zeros(6, 5))


def test_a_budget_of_less_than_a_byte_is_no_infinite_cost() -> None:
    _, session, _ = searched(PLAIN, algorithm=es.Nis(warm_up=2), budget="0.000001%")
    assert bool(session.algorithm.controller.logits.isfinite().all())
    assert session.derive().size_bytes == 0


def test_a_loss_that_is_no_number_is_an_error() -> None:
    _, session, _ = nis()
    batch = PLAIN.batch(seed=1)
    batch.dense_features[3] = math.nan
    with pytest.raises(es.EmbsearchError, match="validation loss must be a number; got nan"):
        session.step(batch)


@pytest.mark.parametrize("quality", ["auc", "recall@1", lambda logits, labels: 1.0])
def test_logits_that_are_no_numbers_are_an_error_although_the_loss_is_one(quality: Any) -> None:
    _, session, _ = nis(quality="auc")
    outcome_of, before = session.probe._objective, session.algorithm.controller.logits.clone()

    def objective(model: Task, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        loss, logits, labels = outcome_of(model, batch)[1]
        return loss, logits.masked_fill(torch.arange(len(logits)) == 3, math.nan), labels

    session.probe._objective = objective
    object.__setattr__(session.algorithm.config, "quality", quality)
    with pytest.raises(es.EmbsearchError, match="the logits must be numbers; of 32, 1 are NaN"):
        session.step(PLAIN.batch(32, seed=3))
    assert torch.equal(session.algorithm.controller.logits, before)


def test_the_defaults_are_the_papers() -> None:
    """A.2.2: one choice for 64 examples; Adagrad with 0.1 for the controller, whose gradients are not clipped."""
    config = es.Nis()
    assert (config.group, config.lr, config.every, config.penalty) == (64, 0.1, 1, 0.01)
    assert (config.mode, config.quality) == ("me", "auc")
    assert isinstance(nis()[1].algorithm.controller._optimizer, torch.optim.Adagrad)


@pytest.mark.parametrize(
    "settings", [{"mode": "mee"}, {"group": 0}, {"lr": 0.0}, {"penalty": -1.0}, {"score_batches": 0}, {"quality": "acu"}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got|Did you mean"):
        es.Nis(**settings)


def test_gates_of_evaluation_are_the_mean_over_draws() -> None:
    _, session, _ = nis()
    expected = BlockChoices.of(session, "me").mean_gates(session.algorithm.controller.probabilities())
    assert all(torch.equal(a, b) for a, b in zip(session.gates, expected, strict=True))
    assert any(0 < float(value) < 1 for gate in session.gates for value in gate.flatten())


@pytest.mark.parametrize("mode", ["se", "me"])
def test_a_search_goes_on_where_it_stopped(mode: str, tmp_path: Path) -> None:
    model, session, optimizer = nis(mode=mode, steps=8, group=8)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    write_state(tmp_path / "state", {**state, "random": torch.get_rng_state()})
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(8, 16)))
    again, resumed, its_optimizer = nis(mode=mode, steps=0, group=8)
    state = read_state(tmp_path / "state")
    again.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["session"])
    torch.set_rng_state(state["random"])
    train(again, its_optimizer, (PLAIN.batch(seed=i) for i in range(8, 16)))
    assert torch.equal(resumed.algorithm.controller.logits, session.algorithm.controller.logits)
    assert str(resumed.derive()) == str(session.derive())


def test_a_state_of_the_other_mode_is_refused() -> None:
    _, session, _ = nis(mode="se")
    _, other, _ = nis(mode="me")
    before = other.state_dict()
    with pytest.raises(es.EmbsearchError, match="of another search: there mode='se'; here mode='me'"):
        other.load_state_dict(session.state_dict())
    assert (other.step_count, other.search_steps) == (before["step_count"], before["search_steps"])


def test_logits_and_labels_of_other_examples_are_refused() -> None:
    _, session, _ = nis()
    session.probe._objective = lambda model, batch: (model(batch)[0], torch.zeros(32), torch.zeros(31))
    with pytest.raises(es.EmbsearchError, match=r"the same examples; got logits \(32,\) and labels \(31,\)"):
        session.step(PLAIN.batch(32))


# The result.


@pytest.mark.parametrize("world", ["one id", "bags", "mean", "weighted", "half", "several features", "unequal dims, bags"])
@pytest.mark.parametrize("mode", ["se", "me"])
def test_the_compact_model_is_the_one_with_the_plans_gates(world: str, mode: str) -> None:
    """Whatever the gates of evaluation were: they say what takes part, and are not in the weights."""
    space = es.SearchSpace(row_blocks=(0.1, 0.3, 0.6))
    model, session, _ = searched(WORLDS[world], algorithm=es.Nis(warm_up=2, mode=mode), space=space)
    choices = BlockChoices.of(session, mode)
    random = torch.Generator().manual_seed(len(world))
    arms = torch.tensor([int(torch.randint(n, (), generator=random)) for n in choices.arms])
    with torch.no_grad():
        session.algorithm.controller.logits[torch.arange(len(arms)), arms] = 9.0
    heights = choices.heights(arms)
    session.set_gates(choices.gates(heights))
    features = WORLDS[world].features(50, seed=3)
    expected = model.eval().collection(features).values()
    session.set_gates([torch.rand_like(gate) for gate in session.gates])
    plan = session.derive(strict=False)
    assert sum(table.n_weights for table in plan.tables) == int(choices.cost(heights, Unit.PARAMETERS))
    session.compact(plan)
    assert relative_error(model.collection(features).values(), expected) <= (1e-3 if world == "half" else 1e-5)


def test_the_papers_rule_takes_the_most_likely_choice_and_may_overshoot() -> None:
    _, session, _ = nis(mode="se")
    controller = session.algorithm.controller
    with torch.no_grad():
        controller.logits.zero_()[:, -1] = 5.0
    plan = session.derive(strict=False)
    assert [table.n_weights for table in plan.tables] == [spec.n_params for spec in session.specs]
    with torch.no_grad():
        controller.logits.zero_()[:, 0] = 5.0
    assert session.derive(strict=False).size_bytes == 0


@pytest.mark.parametrize("fused", [None, {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}])
@pytest.mark.parametrize("mode", ["se", "me"])
def test_a_table_that_is_kept_whole_is_stored_projected_and_needs_no_projection(mode: str, fused: Any) -> None:
    model, session, optimizer = nis("bags", mode=mode, fused=fused)
    choices = BlockChoices.of(session, mode)
    everything = choices.heights(torch.tensor(choices.arms) - 1)
    with torch.no_grad():
        session.algorithm.controller.logits[torch.arange(len(choices.arms)), torch.tensor(choices.arms) - 1] = 9.0
    session.set_gates(choices.gates(everything))
    features = WORLDS["bags"].features(50, seed=3)
    expected = model.eval().collection(features).values()
    plan = session.derive(strict=False)
    assert plan.size_bytes == session.original_bytes
    session.compact(plan)
    assert relative_error(model.collection(features).values(), expected) <= 1e-5
    train(model, optimizer, [WORLDS["bags"].batch(seed=3)])


class Additive(nn.Module):
    """A task whose loss is a sum over what is left out of the tables: then worths add up exactly."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        values = self.collection(batch.sparse_features).values()
        logits = values.sum(1)
        return 20 - logits.mean(), (logits, logits, batch.labels)


@pytest.mark.parametrize("mode", ["se", "me"])
@pytest.mark.parametrize("budget", [es.Budget.of("80%"), es.Budget.of("35%"), es.Budget.of("10%"), es.Budget(params=1500)])
@pytest.mark.parametrize("ranked", [False, True])
def test_the_plan_has_the_smallest_loss_of_all_that_fit(mode: Any, budget: es.Budget, ranked: bool) -> None:
    """By brute force over all plans: every one is built, and its bytes and its loss are taken."""
    torch.manual_seed(7)
    model = Additive(PLAIN.collection())
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-0.2, 0.3)
    counts = {"t0": torch.randperm(200), "t1": torch.arange(300, 0, -1) if ranked else torch.randperm(300)}
    space = es.SearchSpace(row_blocks=(0.3, 0.7), column_chunks=(4, 4))
    session = es.prepare(model, algorithm=es.Nis(mode=mode, warm_up=0), space=space, frequencies=counts)
    batch = PLAIN.batch(256, seed=5)
    session.attach(torch.optim.SGD(model.parameters(), lr=0.1), validation=[batch])
    session.step(batch)
    limit, choices = budget.limit(session.original_bytes), BlockChoices.of(session, mode)
    best = math.inf
    for arms in itertools.product(*map(range, choices.arms)):
        heights = choices.heights(torch.tensor(arms))
        plans = [table.plan(own, cut.blocks) for table, own, cut in zip(choices.tables, heights, session.tables, strict=True)]
        size = sum(budget.unit.of(plan) for plan in plans)
        if size <= limit:
            best = min(best, float(session.probe.evaluate(batch, choices.gates(heights)).loss.detach()))
    plan = session.derive(budget)
    assert budget.unit.of(plan) <= limit
    session.compact(plan)
    assert float(model.eval()(batch)[0].detach()) == pytest.approx(best, abs=2e-5)


def test_an_optimizer_made_before_the_search_trains_the_projections() -> None:
    model = task(PLAIN)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session = es.prepare(model, algorithm=es.Nis(warm_up=2), space=SPACE)
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(12)))
    assert all(not torch.equal(session.form(t).weight, torch.eye(8)) for t in range(2))
    model = session.compact(session.derive("80%"))
    assert all(math.isfinite(loss) for loss in train(model, optimizer, (PLAIN.batch(seed=i) for i in range(3))))


def test_columns_of_a_plan_without_a_projection_are_those_of_what_is_projected() -> None:
    """Another algorithm's plan: some columns of some row blocks, not the first ones."""
    _, session, _ = nis(steps=20)
    columns = [4, 1, 6, 5, 2, 0, 7, 3]
    rows = [[table.blocks.rows_of(block) for block in range(3)] for table in session.tables]
    plans = [TablePlan.nested(spec, [6, 3, 0], of, columns) for spec, of in zip(session.specs, rows, strict=True)]
    plan = es.SizePlan(tuple(plans), align=1)
    merged = [session.merged_weight(index) @ session.form(index).weight.detach() for index in range(len(plan.tables))]
    fresh = task(PLAIN)
    with torch.no_grad():
        for weight, value in zip(fresh.collection.parameters(), merged, strict=True):
            weight.copy_(value)
    expected = es.apply(fresh, plan).collection(PLAIN.features(64, 3)).values()
    got = session.compact(plan).collection(PLAIN.features(64, 3)).values()
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(
    ("dim", "widths"), [(1, (1,)), (3, (3,)), (6, (4, 2)), (10, (4, 4, 2)), (20, (4, 4, 8, 4)), (64, (16,) * 4)]
)
def test_tables_of_any_width_are_cut_by_default(dim: int, widths: tuple[int, ...]) -> None:
    assert es.Nis().space(None).chunk_widths(dim) == widths
