"""ESAPN against esapn.txt, an example at a time: queues, rewards, the gradient of REINFORCE, and sizes."""

import copy
from collections import defaultdict, deque
from typing import Any

import pytest
import torch
from support import PLAIN, STREAMING, WORLDS, streamed, train
from torch import Tensor, nn

import embsearch_plugin as es
from embsearch_plugin.algorithms.esapn import ENLARGE, EsapnSearch
from embsearch_plugin.algorithms.parts.row_sizes import widths_within
from embsearch_plugin.streaming.collection import Lookup
from embsearch_plugin.streaming.session import StreamSession
from embsearch_plugin.streaming.table import GrowingTable
from embsearch_plugin.tasks import example_losses

T = 3
CONFIG = es.Esapn(**STREAMING["esapn"], losses=T)
Queues = list[dict[int, deque[float]]]


def slow_losses(logits: Tensor, labels: Tensor) -> list[float]:
    """Eq. 3 and Eq. 4, number by number."""
    if logits.dim() == 1:
        return [(float(y) - 1 / (1 + float((-x).exp()))) ** 2 for x, y in zip(logits, labels, strict=True)]
    return [-float((row.exp() / row.exp().sum())[int(c)].log()) for row, c in zip(logits, labels, strict=True)]


@pytest.mark.parametrize("classes", [0, 5])
def test_losses_of_examples_are_those_of_the_paper(classes: int) -> None:
    logits = torch.randn(9, classes) if classes else torch.randn(9)
    labels = torch.randint(classes or 2, (9,)).float()
    assert example_losses(logits, labels).tolist() == pytest.approx(slow_losses(logits, labels), abs=1e-6)


def told(session: StreamSession, queues: Queues, batch: Any, logits: Tensor, seen: list[dict[int, int]]) -> None:
    """Put an id's loss, the mean over its examples, in front of its queue; count it."""
    losses = slow_losses(logits, batch.labels)
    for table, queue, count in zip(session.tables, queues, seen, strict=True):
        of_id = defaultdict(list)
        for feature in table.spec.features:
            for loss, bag in zip(losses, batch.sparse_features[feature].to_dense(), strict=True):
                for each in bag.tolist():
                    of_id[each].append(loss)
                    count[each] += 1
        for each, values in of_id.items():
            queue[each].appendleft(sum(values) / len(values))


@pytest.mark.parametrize("world", ["one id", "bags", "several features", "shared feature"])
def test_queues_and_rewards_are_those_of_an_example_at_a_time(world: str) -> None:
    model, session, optimizer = streamed(WORLDS[world], 0, CONFIG)
    session.detach()
    queues: Queues = [defaultdict(lambda: deque(maxlen=T)) for _ in session.tables]
    seen: list[dict[int, int]] = [defaultdict(int) for _ in session.tables]
    for seed in range(6):
        optimizer.zero_grad()
        batch = WORLDS[world].batch(seed=seed)
        loss, (_, logits, _) = model.train()(batch)
        told(session, queues, batch, logits, seen)
        loss.backward()
        optimizer.step()
    for table, queue, count in zip(session.tables, queues, seen, strict=True):
        assert table.counts(table.find(torch.tensor(list(count)))).tolist() == list(count.values())
        for each, entry in zip(queue, table.find(torch.tensor(list(queue))).tolist(), strict=True):
            assert int(table.extras["scored"].values[entry]) == len(queue[each])
            kept = table.extras["losses"].values[entry, : len(queue[each])].tolist()
            assert kept == pytest.approx(list(queue[each]), abs=1e-5)
    batch = WORLDS[world].batch(seed=100)
    batch.sparse_features.values()[0] = 55  # perhaps one that never came
    losses = slow_losses(session.evaluate(batch).logits, batch.labels)
    means = []
    for table, queue in zip(session.tables, queues, strict=True):
        rewards = [
            sum(queue[each]) / len(queue[each]) - loss  # Eq. 2
            for feature in table.spec.features
            for loss, bag in zip(losses, batch.sparse_features[feature].to_dense(), strict=True)
            for each in bag.tolist()
            if each in queue and int(table.rows.sizes(table.find(torch.tensor([each])))) < len(table.rows.widths) - 1
        ]
        means.append(sum(rewards) / len(rewards) if rewards else 0.0)
    assert session.step(batch)["reward"] == pytest.approx(sum(means) / len(means), abs=1e-5)


class Recorded(nn.Module):
    """A policy that keeps its inputs."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy, self.seen = policy, []

    def forward(self, counts: Tensor, sizes: Tensor) -> Tensor:
        self.seen.append((counts, sizes))
        return self.policy(counts, sizes)


def test_the_policy_ascends_rewards_times_log_probabilities() -> None:
    _, session, _ = streamed(PLAIN, 4, CONFIG)
    search = session.algorithm
    assert isinstance(search, EsapnSearch)
    batch = PLAIN.batch(seed=50)
    outcome = session.evaluate(batch)
    losses = example_losses(outcome.logits, outcome.labels)
    drawing = torch.Generator()
    drawing.set_state(search._random.get_state())
    expected = []
    for table in session.tables:
        policy = copy.deepcopy(search._policies[str(table.spec)])
        ids = batch.sparse_features[table.spec.features[0]].values()
        entries = table.find(ids)
        teaches = [
            i for i, e in enumerate(entries.tolist())
            if e >= 0 and int(table.rows.sizes(torch.tensor([e]))) < 2 and table.extras["scored"].values[e] > 0
        ]  # fmt: skip
        own = entries[teaches]
        probabilities = policy(table.counts(own), table.rows.sizes(own)).softmax(1)
        actions = torch.multinomial(probabilities.detach(), 1, generator=drawing).flatten()
        total = torch.tensor(0.0)
        for i, e, action, probability in zip(teaches, own.tolist(), actions, probabilities, strict=True):
            queue = table.extras["losses"].values[e, : int(table.extras["scored"].values[e])]
            total = total + (queue.mean() - losses[i]) * probability[action].log()  # Eq. 6
        expected.append(torch.autograd.grad(total / len(teaches), list(policy.parameters())))
    before = [[p.detach().clone() for p in policy.parameters()] for policy in search._policies.values()]
    for optimizer in search._optimizers.values():
        optimizer.state.clear()
    session.step(batch)
    for policy, gradients, olds in zip(search._policies.values(), expected, before, strict=True):
        for parameter, gradient, old in zip(policy.parameters(), gradients, olds, strict=True):
            torch.testing.assert_close(parameter.grad, -gradient, rtol=1e-4, atol=1e-7)
            moved = gradient.abs() > 1e-5  # Adam's first step is its learning rate, uphill
            torch.testing.assert_close((parameter - old)[moved], 0.05 * gradient[moved].sign(), rtol=2e-2, atol=1e-4)


def test_the_policy_sees_frequency_and_size_only() -> None:
    model, session, _ = streamed(PLAIN, 4, CONFIG)
    (table, *_), search = session.tables, session.algorithm
    assert isinstance(search, EsapnSearch)
    policy = search._policies[str(table.spec)]
    counts, sizes = torch.tensor([1, 5, 1000, 10**6]), torch.tensor([0, 2, 1, 1])
    logits = policy(counts, sizes)
    for count, size, got in zip(counts, sizes, logits, strict=True):
        state = torch.cat([policy.frequency.weight[min(int(count), 1000)], torch.eye(3)[size]])
        slow = policy.actions.weight @ torch.tanh(policy.hidden.weight @ state + policy.hidden.bias) + policy.actions.bias
        torch.testing.assert_close(got, slow)
    recorded = search._policies[str(table.spec)] = Recorded(policy)
    model.train().collection(PLAIN.features(20, 77))
    (seen,) = recorded.seen
    entries = session.lookups[0].entries.unique()
    assert sorted(seen[0].tolist()) == sorted(table.counts(entries).tolist())  # this time included


def set_wish(search: EsapnSearch, table: GrowingTable, enlarge: bool) -> None:
    """Make one of the actions the likelier one, whatever the state."""
    with torch.no_grad():
        policy = search._policies[str(table.spec)]
        policy.actions.weight.zero_()
        policy.actions.bias.copy_(torch.eye(2)[ENLARGE if enlarge else 1 - ENLARGE])


def test_sizes_grow_by_one_step_at_a_time_as_the_policy_says_and_never_shrink() -> None:
    model, session, _ = streamed(PLAIN, 0, CONFIG)
    search, (one, other) = session.algorithm, session.tables
    assert isinstance(search, EsapnSearch)
    set_wish(search, one, True)
    set_wish(search, other, False)
    batch = PLAIN.batch(seed=1)
    for expected in (1, 2, 2):
        model.train()(batch)
        assert (one.rows.sizes(torch.arange(len(one))) == expected).all()
        assert not other.rows.sizes(torch.arange(len(other))).any()
    set_wish(search, one, False)
    model.train()(PLAIN.batch(seed=2))
    sizes = one.rows.sizes(torch.arange(len(one)))
    seen = one.find(batch.sparse_features["f0"].values().unique())
    assert (sizes[seen] == 2).all() and not sizes[len(seen) :].any()
    model.eval()(PLAIN.batch(seed=3))
    assert torch.equal(one.rows.sizes(torch.arange(len(one))), sizes)


def test_enlarging_changes_no_prediction() -> None:
    model, session, _ = streamed(PLAIN, 5, CONFIG)
    batch = PLAIN.batch(seed=2)
    before = model.eval()(batch)[1][1]
    for table in session.tables:
        counts = table.rows.row_counts
        table.widen(torch.arange(len(table)))
        assert table.rows.row_counts != counts
    torch.testing.assert_close(model(batch)[1][1], before, rtol=1e-4, atol=1e-5)


def test_ids_of_the_largest_size_teach_nothing() -> None:
    _, session, _ = streamed(PLAIN, 3, CONFIG)
    for table in session.tables:
        for _ in range(2):
            table.widen(torch.arange(len(table)))
        assert table.rows.row_counts[:2] == [0, 0]
    policies = copy.deepcopy(session.algorithm._policies)  # type: ignore[attr-defined]
    assert session.step(PLAIN.batch(seed=2))["reward"] == 0.0
    for name, policy in session.algorithm._policies.items():  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), policies[name].parameters(), strict=True))


def test_ids_that_are_not_there_are_left_out_of_the_queues() -> None:
    _, session, _ = streamed(PLAIN, 1, CONFIG)
    table = session.tables[0]
    before = {name: tensor.values.clone() for name, tensor in table.extras.items()}
    lookup = Lookup(torch.tensor([-1, 2, -1]), torch.tensor([0, 1, 1]))
    session.algorithm.scored(table, lookup, torch.tensor([9.0, 0.25]))
    assert float(table.extras["losses"].values[2, 0]) == 0.25
    others = torch.arange(len(table)) != 2
    assert all(torch.equal(before[name][others], table.extras[name].values[others]) for name in before)


def test_rewards_lead_to_the_action_that_earns_them() -> None:
    """Where *enlarge* is made to be followed by rewards, it is learned: the sign of the step is right."""
    _, session, _ = streamed(PLAIN, 3, CONFIG)
    search, table = session.algorithm, session.tables[0]
    assert isinstance(search, EsapnSearch)
    entries = torch.arange(len(table))
    lookup = Lookup(entries, torch.arange(len(entries)))
    policy = search._policies[str(table.spec)]
    start = float(policy(table.counts(entries), table.rows.sizes(entries)).softmax(1)[:, ENLARGE].mean().detach())
    for _ in range(40):
        state = search._random.get_state()
        known = (table.rows.sizes(entries) < 2) & (table.extras["scored"].values > 0)
        probabilities = policy(table.counts(entries[known]), table.rows.sizes(entries[known])).softmax(1).detach()
        actions = torch.multinomial(probabilities, 1, generator=search._random).flatten()
        search._random.set_state(state)  # the step draws the same
        losses = torch.ones(len(entries))
        losses[known] = torch.where(actions == ENLARGE, 0.0, 1.0)
        table.extras["losses"].values.fill_(0.5)
        table.extras["scored"].values.fill_(T)
        search._train(table, lookup, losses)
    end = float(policy(table.counts(entries), table.rows.sizes(entries)).softmax(1)[:, ENLARGE].mean().detach())
    assert end > 0.9 > start


@pytest.mark.parametrize("candidates", [(), (0, 2), (2, 2), (4, 2), (-1,)])
@pytest.mark.parametrize("config", [es.Esapn, es.AutoEmb, es.Darts])
def test_candidates_ascend(config: Any, candidates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be positive, ascending and differ"):
        config(candidates=candidates)


@pytest.mark.parametrize(
    ("candidates", "dim", "widths"), [((2, 4, 8), 16, [2, 4, 8, 16]), ((2, 4, 8), 8, [2, 4, 8]), ((2, 4, 8), 3, [2, 3])]
)
def test_the_tables_own_width_is_the_largest(candidates: tuple[int, ...], dim: int, widths: list[int]) -> None:
    assert widths_within(candidates, dim) == widths


def test_a_table_as_narrow_as_the_smallest_candidate_has_nothing_to_decide() -> None:
    model, session, optimizer = streamed(WORLDS["unequal dims"], 0, es.Esapn(candidates=(4, 8), hidden=4))
    train(model, optimizer, (WORLDS["unequal dims"].batch(seed=i) for i in range(3)))
    assert [table.rows.widths for table in session.tables] == [(4, 8, 12), (4, 8), (4,)]


@pytest.mark.parametrize(
    "setting", [{"hidden": 0}, {"lr": 0.0}, {"losses": 0}, {"frequencies": 0}, {"rows": "sgd"}, {"row_lr": 0}]
)
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        es.Esapn(**setting)
