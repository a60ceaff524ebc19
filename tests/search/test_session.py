"""A session: attaching, stepping, observers, and what goes wrong."""

from typing import Any

import pytest
import torch
from support import PLAIN, World, searched, task, train
from torch import nn
from torch.utils.data import DataLoader
from torchrec.optim.keyed import KeyedOptimizerWrapper

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError, ObjectiveError, SessionError
from embsearch_plugin.hookspecs import hookimpl


class Seen:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @hookimpl
    def embsearch_search_start(self) -> None:
        self.calls.append("start")

    @hookimpl
    def embsearch_before_forward(self, step: int) -> None:
        self.calls.append(f"forward {step}")

    @hookimpl
    def embsearch_after_step(self, step: int, metrics: dict[str, float]) -> None:
        self.calls.append(f"step {step} {sorted(metrics)}")

    @hookimpl
    def embsearch_plan_changed(self, previous: Any, current: Any) -> None:
        self.calls.append(f"plan {previous is None}")

    @hookimpl
    def embsearch_validation_end(self, metrics: dict[str, float]) -> None:
        self.calls.append(f"validated {metrics}")

    @hookimpl
    def embsearch_search_end(self) -> None:
        self.calls.append("end")

    @hookimpl
    def embsearch_exception(self, error: Exception) -> None:
        self.calls.append(type(error).__name__)


def test_observers_are_told_in_order() -> None:
    model, session, optimizer = searched(PLAIN, steps=0, algorithm=es.Dnis(warm_up=2, every=2))
    seen = Seen()
    session.register(seen)
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(4)))
    session.validated({"loss": 0.5})
    session.derive()
    session.derive()
    session.derive("20%")
    session.compact(session.derive())
    step = "['alpha_below_half', 'alpha_mean', 'loss']"
    assert seen.calls == [
        *("forward 0", "forward 1", "start", f"step 2 {step}", "forward 2", "forward 3", f"step 4 {step}"),
        *("validated {'loss': 0.5}", "plan True", "plan False", "plan False", "end"),
    ]


def test_an_observer_that_does_not_fit_is_refused_and_the_search_goes_on() -> None:
    class Misspelt:
        @hookimpl
        def embsearch_after_stepp(self) -> None: ...

    model, session, optimizer = searched(PLAIN)
    with pytest.raises(SessionError, match="embsearch_after_stepp"):
        session.register(Misspelt())
    before = session.search_steps
    gates = [gate.clone() for gate in session.gates]
    train(model, optimizer, [PLAIN.batch(seed=3)])
    assert session.search_steps == before + 1
    assert any(not torch.equal(a, b) for a, b in zip(gates, session.gates, strict=True))


def test_a_failing_step_is_told_and_raised() -> None:
    _, session, _ = searched(PLAIN)
    seen = Seen()
    session.register(seen)
    batch = PLAIN.batch(seed=1)
    batch.dense_features[:] = float("inf")
    with pytest.raises(es.EmbsearchError):
        session.step(batch)
    assert seen.calls == ["NonFiniteLoss"]


def test_an_optimizer_whose_hook_cannot_fire_is_refused_with_the_way_out() -> None:
    model = task(PLAIN)
    session = es.prepare(model)
    wrapped = KeyedOptimizerWrapper(dict(model.named_parameters()), lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(AttachError, match="attach the SGD inside"):
        session.attach(wrapped, validation=[PLAIN.batch()])
    session.attach(wrapped._optimizer, validation=[PLAIN.batch()])
    train(model, wrapped, (PLAIN.batch(seed=i) for i in range(2)))
    assert session.step_count == 2


def test_attach_wants_a_loader_that_starts_anew() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match="must start anew"):
        session.attach(optimizer, validation=iter([PLAIN.batch()]))
    session.attach(optimizer, validation=[])
    with pytest.raises(AttachError, match="gave no batch"):
        train(model, optimizer, [PLAIN.batch()])


def test_a_validation_loader_that_ends_early_starts_anew() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader([PLAIN.batch(seed=i) for i in range(2)], batch_size=None, shuffle=True)
    session.attach(optimizer, validation=loader)
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(8)))
    assert session.search_steps == 8


@pytest.mark.parametrize("sizes", [(0, 20), (1, 20), (1, 0, 20)])
def test_validation_batches_too_small_for_batch_norm_are_skipped(sizes: tuple[int, ...]) -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(n) for n in sizes])
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(4)))
    assert session.search_steps == 4
    session.detach()
    session.attach(optimizer, validation=[PLAIN.batch(1)])
    with pytest.raises(AttachError, match="at least 2 examples"):
        train(model, optimizer, [PLAIN.batch()])


class Logits(nn.Module):
    """A model that knows nothing of train tasks."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.collection, self.over = world.collection(), nn.Linear(19, 1)

    def forward(self, dense: torch.Tensor, sparse: Any) -> torch.Tensor:
        return self.over(torch.cat([self.collection(sparse).values(), dense], 1)).squeeze(1)


def bce(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = model(batch.dense_features, batch.sparse_features)
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits, batch.labels


@pytest.mark.parametrize("xi", [0.0, 0.1])
def test_an_objective_serves_any_model(xi: float) -> None:
    model = Logits(PLAIN)
    batches = [PLAIN.batch(seed=i) for i in range(6)]
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2, xi=xi), objective=bce)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=batches, training=batches if xi else None)
    for batch in batches:
        optimizer.zero_grad()
        bce(model, batch)[0].backward()
        optimizer.step()
    assert session.derive().size_bytes <= 0.1 * session.original_bytes


def test_a_model_of_another_convention_is_told_about_objectives() -> None:
    model = Logits(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch()])
    with pytest.raises(ObjectiveError, match="give objective="):
        bce(model, PLAIN.batch())[0].backward()
        optimizer.step()


def test_second_order_without_a_batch_to_step_on_is_explained() -> None:
    model = Logits(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1, xi=0.1), objective=bce)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch()])
    with pytest.raises(SessionError, match="attach\\(..., training=train_loader\\)"):
        bce(model, PLAIN.batch())[0].backward()
        optimizer.step()


@pytest.mark.parametrize("form", ["counts", "batches"])
def test_frequencies_may_be_given(form: str) -> None:
    batches = [PLAIN.batch(seed=i) for i in range(20)]
    counts = {}
    for name, rows, _, (feature,), _ in PLAIN.tables:
        ids = torch.cat([batch.sparse_features[feature].values() for batch in batches])
        counts[name] = torch.bincount(ids, minlength=rows)
    model = task(PLAIN)
    before = [t.clone() for t in model.state_dict().values()]
    given = counts if form == "counts" else batches
    session = es.prepare(model, algorithm=es.Dnis(warm_up=0), frequencies=given)
    state = torch.get_rng_state()
    session.step(PLAIN.batch(seed=50))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    for table, count in zip(session.tables, counts.values(), strict=True):
        ranked = count[table.blocks.order.long()]
        assert bool((ranked.diff() <= 0).all())


def test_wrong_frequencies_are_named() -> None:
    counts = {"t0": torch.ones(200), "t1": torch.ones(300)}
    for wrong, message in (
        ({"t0": counts["t0"]}, r"of shape \(300,\), for table 't1'; got a NoneType"),
        (counts | {"t1": [1] * 300}, "for table 't1'; got a list"),
        (counts | {"t0": torch.full((200,), torch.nan)}, "at least 0; some of table 't0' are not"),
        (5, "counts by table name, or batches to count; got 5"),
    ):
        with pytest.raises(SessionError, match=message):
            es.prepare(task(PLAIN), frequencies=wrong)


@pytest.mark.parametrize("wrong", [5, {"t0": torch.ones(200)}])
def test_a_model_may_be_prepared_after_wrong_frequencies(wrong: Any) -> None:
    model = task(PLAIN)
    modules = list(model.modules())
    with pytest.raises(SessionError, match="frequencies must"):
        es.prepare(model, frequencies=wrong)
    assert list(model.modules()) == modules
    es.prepare(model, frequencies={"t0": torch.ones(200), "t1": torch.ones(300)})


def test_ranks_are_refreshed_when_the_steps_have_doubled() -> None:
    model, session, optimizer = searched(PLAIN, steps=0, algorithm=es.Dnis(warm_up=2))
    orders = []
    for i in range(9):
        train(model, optimizer, [PLAIN.batch(seed=i)])
        orders.append(session.tables[0].blocks.order.clone() if i else None)
    changed = [i + 1 for i in range(2, 9) if not torch.equal(orders[i], orders[i - 1])]
    assert changed == [4, 8]


@pytest.mark.parametrize("resumed", [False, True])
def test_counts_do_not_end_at_two_to_the_31(resumed: bool) -> None:
    model, session, optimizer = searched(PLAIN, steps=1)
    most = torch.iinfo(torch.int32).max
    counts = [count.fill_(most) for count in model.collection.counts.of_tables]
    if resumed:  # from a state of 32-bit counts
        state = session.state_dict()
        state["ranking"]["counts"] = [[count.int() for count in counts]]
        session.load_state_dict(state)
    train(model, optimizer, [PLAIN.batch(32)])
    assert all(count.min() == most and count.sum() == most * len(count) + 32 for count in session.frequencies)


def test_a_step_by_hand_needs_counts() -> None:
    session = es.prepare(task(PLAIN))
    with pytest.raises(SessionError, match="no id was counted yet"):
        session.step(PLAIN.batch())


def test_search_steps_repeat_the_loops_autocast() -> None:
    seen = []
    model = task(PLAIN)
    model.over[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch()])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(PLAIN.batch(seed=1))
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16, torch.bfloat16]
