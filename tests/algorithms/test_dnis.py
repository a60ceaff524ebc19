"""DNIS against the equations of its paper."""

import copy
import math

import pytest
import torch
from support import PLAIN, WORLDS, Task, relative_error, searched, stored_bytes, task, train
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin import distributed
from embsearch_plugin.algorithms.dnis import normalized
from embsearch_plugin.search.session import Session

SPACE = es.SearchSpace(row_blocks=(0.1, 0.3, 0.6))


def test_gradients_are_normalized_by_row() -> None:
    """Eq. 8, one element at a time."""
    torch.manual_seed(0)
    gradient, epsilon = torch.randn(4, 6) * torch.tensor([[1e-6], [1.0], [1e3], [0.0]]), 1e-7
    expected = torch.empty(4, 6)
    for row in range(4):
        mean = sum(abs(float(gradient[row, k])) for k in range(6)) / 6
        for k in range(6):
            expected[row, k] = gradient[row, k] / (mean + epsilon)
    torch.testing.assert_close(normalized(gradient, epsilon), expected)


def test_alpha_starts_at_one_follows_adam_and_is_clipped() -> None:
    """Algorithm 1, lines 4 and 7 to 9, with the gradient that the session gives."""
    _, session, _ = searched(PLAIN, steps=1, algorithm=es.Dnis(warm_up=1, lr=0.3))
    assert session.search_steps == 1
    reference = [torch.ones_like(gate).requires_grad_() for gate in session.gates]
    _, session, _ = searched(PLAIN, steps=0, algorithm=es.Dnis(warm_up=1, lr=0.3), frequencies=counts())
    adam = torch.optim.Adam(reference, lr=0.3)
    for step in range(6):
        batch = PLAIN.batch(seed=700 + step)
        _, gradients = session.probe.gate_gradients(batch, reference, reference) if step else (0, None)
        if step == 0:
            session.step(batch)  # ranks the rows; its result is undone below
            session.algorithm._set_alpha([torch.ones_like(gate) for gate in session.gates])
            session.set_gates([torch.ones_like(gate) for gate in session.gates])
            _, gradients = session.probe.gate_gradients(batch, reference, reference)
        for alpha, gradient in zip(reference, gradients, strict=True):
            alpha.grad = gradient / (gradient.abs().mean(1, keepdim=True) + 1e-7)
        adam.step()
        with torch.no_grad():
            for alpha in reference:
                alpha.copy_(alpha.clamp(0, 1))
        session.step(batch)
    assert all(float(g.min()) >= 0 and float(g.max()) <= 1 for g in session.gates)
    assert any(float(g.min()) == 0 for g in session.gates)


def counts() -> dict[str, Tensor]:
    return {"t0": torch.arange(200, 0, -1), "t1": torch.arange(300, 0, -1)}


def smooth(model: Task) -> Task:
    """Dropout would make two evaluations differ; at ReLU's kink the step of Eq. 6, a gradient, jumps."""
    model.over[2], model.over[3] = torch.nn.Tanh(), torch.nn.Identity()
    return model


def loss_after_step(model: Task, session: Session, gates: list[Tensor], batches: tuple[object, object], xi: float) -> float:
    """The slow way: copy the model, take a real step of SGD on everything, evaluate."""
    session.set_gates(gates)
    moved = copy.deepcopy(model)
    moved.zero_grad()
    moved(batches[0])[0].backward()
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.grad is not None:
                parameter.sub_(xi * parameter.grad)
        return float(moved(batches[1])[0])


@pytest.mark.parametrize("world", ["one id", "mean", "weighted", "shared feature"])
@pytest.mark.parametrize("xi", [0.0, 2.0])
def test_gradients_of_alpha_are_those_of_finite_differences(world: str, xi: float) -> None:
    """Eq. 7, both terms, against differences of the loss after a real weight step (Eq. 6)."""
    train_batch, batch = WORLDS[world].batch(64, seed=1), WORLDS[world].batch(64, seed=2)
    torch.manual_seed(0)
    model = smooth(task(WORLDS[world]))
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1), space=SPACE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    session.attach(optimizer, validation=[batch], training=[train_batch])
    with torch.no_grad():
        for parameter in model.collection.parameters():
            parameter.normal_(std=0.5)
    train(model, optimizer, [train_batch] * 3)
    gates = [(0.5 + 0.5 * torch.rand_like(gate)).requires_grad_() for gate in session.gates]
    _, found = session.probe.gate_gradients(batch, gates, gates, xi)
    step = 5e-3
    for table, gradient in enumerate(found):
        for place in gradient.abs().flatten().topk(6).indices.tolist():
            values = []
            for sign in (1, -1):
                shifted = [gate.detach().clone() for gate in gates]
                shifted[table].view(-1)[place] += sign * step
                values.append(loss_after_step(model, session, shifted, (train_batch, batch), xi))
            expected = (values[0] - values[1]) / (2 * step)
            assert float(gradient.view(-1)[place]) == pytest.approx(expected, rel=0.03, abs=2e-4)


def test_the_second_order_term_matters() -> None:
    model, session, _ = searched(PLAIN, algorithm=es.Dnis(warm_up=2))
    smooth(model)
    gates = [gate.clone().requires_grad_() for gate in session.gates]
    first = session.probe.gate_gradients(PLAIN.batch(seed=5), gates, gates)[1]
    second = session.probe.gate_gradients(PLAIN.batch(seed=5), gates, gates, xi=5.0)[1]
    assert max(relative_error(a, b) for a, b in zip(first, second, strict=True)) > 0.05


def test_the_second_order_term_ignores_weights_that_the_collection_ignores() -> None:
    """One batch may serve collections with and without weights."""
    model, session, _ = searched(WORLDS["bags"], algorithm=es.Dnis(warm_up=2))
    smooth(model)
    gates = [gate.clone().requires_grad_() for gate in session.gates]
    batch, train_batch = WORLDS["bags"].batch(seed=5), WORLDS["bags"].batch(seed=6)
    found = []
    for weight in (None, 5.0):
        for one in (batch, train_batch):
            bags = one.sparse_features
            weights = None if weight is None else torch.full((len(bags.values()),), weight)
            one.sparse_features = KeyedJaggedTensor(bags.keys(), bags.values(), weights, lengths=bags.lengths())
        model(train_batch)
        found.append(session.probe.gate_gradients(batch, gates, gates, xi=0.5)[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("budget", ["70%", "35%"])
@pytest.mark.parametrize("world", ["one id", "bags", "mean", "weighted", "half", "shared feature", "unequal dims"])
def test_fine_grained_plans_keep_the_largest_merged_weights(world: str, budget: str) -> None:
    """Eq. 9: one threshold over all tables; what is kept is stored and counted as what it is."""
    model, session, _ = searched(WORLDS[world], algorithm=es.Dnis(warm_up=2, lr=0.1, fine_grained=True))
    plan = session.derive(budget)
    merged = [session.merged_weight(index) for index in range(len(session.specs))]
    masks = [
        p.mask if p.mask is not None else torch.zeros_like(m, dtype=torch.bool)
        for p, m in zip(plan.tables, merged, strict=True)
    ]
    smallest_kept = min(float(m[k].abs().min()) for m, k in zip(merged, masks, strict=True) if k.any())
    largest_left = max(float(m[~k].abs().max()) for m, k in zip(merged, masks, strict=True) if not k.all())
    assert smallest_kept >= largest_left
    limit = es.Budget.of(budget).limit(session.original_bytes)
    assert 0.98 * limit <= plan.size_bytes <= limit or world == "half"
    original = WORLDS[world].collection()
    for spec, weight, mask in zip(session.specs, merged, masks, strict=True):
        original.embedding_bags[spec.name].weight.data.copy_(weight * mask)
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes
    features = WORLDS[world].features(50, seed=9)
    tolerance = 1e-3 if world == "half" else 1e-5
    assert relative_error(model.collection(features).values(), original(features).values()) <= tolerance


def test_fine_grained_compact_models_train_on_and_are_saved(tmp_path: object) -> None:
    model, session, optimizer = searched(PLAIN, algorithm=es.Dnis(warm_up=2, fine_grained=True))
    plan = session.derive()
    session.compact(plan)
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(3)))
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, task(PLAIN, seed=4))
    assert torch.equal(model.eval()(PLAIN.batch())[0], loaded.eval()(PLAIN.batch())[0])


def test_the_papers_own_rule_prunes_below_the_threshold() -> None:
    _, session, _ = searched(PLAIN, algorithm=es.Dnis(warm_up=2, fine_grained=True, threshold=0.02))
    plan = session.derive(strict=False)
    for index, table in enumerate(plan.tables):
        assert torch.equal(table.mask, session.merged_weight(index).abs() >= 0.02)
    _, session, _ = searched(PLAIN, algorithm=es.Dnis(warm_up=2, threshold=1e9))
    assert session.derive(strict=False).size_bytes == 0


def test_blocks_over_all_tables_share_one_alpha() -> None:
    model, session, _ = searched(
        WORLDS["several features"],
        algorithm=es.Dnis(warm_up=2, lr=0.1),
        space=es.SearchSpace(row_blocks=4, scope="global"),
    )
    assert len(session.algorithm.alpha) == 1
    assert all(torch.equal(gate, session.algorithm.alpha[0]) for gate in session.gates)
    plan = session.derive()
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes <= 0.4 * plan.original_bytes


def test_early_stopping_freezes_alpha() -> None:
    model, session, optimizer = searched(PLAIN, steps=4, algorithm=es.Dnis(warm_up=1, window=2, patience=2, lr=0.1))
    moving = [gate.clone() for gate in session.gates]
    session.algorithm._stop.best = -1.0  # no loss can be better: two windows of two steps are left
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(4)))
    stopped = [gate.clone() for gate in session.gates]
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(4)))
    assert not all(torch.equal(a, b) for a, b in zip(moving, stopped, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stopped, session.gates, strict=True))


def test_the_loss_that_stops_a_search_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, session, _ = searched(PLAIN)
    gates = [gate.clone().requires_grad_() for gate in session.gates]
    loss, gradients = session.probe.gate_gradients(PLAIN.batch(seed=5), gates, gates)
    monkeypatch.setattr(distributed, "mean", lambda values: [3 * value for value in values])
    mean_loss, mean_gradients = session.probe.gate_gradients(PLAIN.batch(seed=5), gates, gates)
    assert mean_loss == pytest.approx(3 * loss)
    assert all(torch.allclose(mean, 3 * own) for mean, own in zip(mean_gradients, gradients, strict=True))


def test_a_loss_that_is_no_number_in_another_process_is_an_error_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise that one would stop, and this one wait for it."""
    _, session, _ = searched(PLAIN)
    monkeypatch.setattr(distributed, "mean", lambda values: [value + math.nan for value in values])
    with pytest.raises(es.EmbsearchError, match="validation loss must be a number; got nan"):
        session.step(PLAIN.batch(seed=5))


def test_a_budget_in_parameters_counts_parameters() -> None:
    _, session, _ = searched(PLAIN)
    plan = session.derive(es.Budget(params=900))
    assert 0 < plan.n_params <= 900


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    model, session, _ = searched(PLAIN)
    batch = PLAIN.batch(seed=1)
    batch.dense_features[3] = float("nan")
    before = [t.clone() for t in [*model.state_dict().values(), *session.gates]]
    with pytest.raises(es.EmbsearchError, match="validation loss must be a number; got nan"):
        session.step(batch)
    after = [*model.state_dict().values(), *session.gates]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
