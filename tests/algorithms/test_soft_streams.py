"""AutoEmb and DARTS: a search step's gradients against finite differences of the loss on a batch of the past."""

from typing import Any

import pytest
import torch
from support import PLAIN, STREAMING, streamed, train
from torch import Tensor

import embsearch_plugin as es
from embsearch_plugin.algorithms.autoemb import AutoEmbSearch
from embsearch_plugin.streaming.forms import Entries
from embsearch_plugin.streaming.session import StreamSession

EPS = 1e-2


def loss_of(session: StreamSession, batch: Any) -> float:
    """The loss of a search step's forward pass."""
    return session.gradients(batch, lambda: [next(session.model.parameters())])[0]


def slope(session: StreamSession, batch: Any, number: Tensor) -> float:
    """The central difference of the loss in one number, a view of it."""
    start = number.clone()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            number.copy_(start + sign * EPS)
        ends.append(loss_of(session, batch))
    with torch.no_grad():
        number.copy_(start)
    return (ends[0] - ends[1]) / (2 * EPS)


def grown(algorithm: str) -> tuple[Any, StreamSession]:
    """A session past its first steps, on a model whose loss is smooth."""
    model, session, _ = streamed(PLAIN, 5, algorithm)
    model.over[2], model.over[3] = torch.nn.Tanh(), torch.nn.Identity()
    return model, session


def test_autoembs_controllers_descend_the_loss_on_the_past() -> None:
    _, session = grown("autoemb")
    search, batch = session.algorithm, PLAIN.batch(seed=40)
    assert isinstance(search, AutoEmbSearch)
    parameters = list(search._controllers.parameters())
    expected = []
    for parameter in parameters:
        flat = parameter.detach().view(-1)
        largest = parameter.grad.abs().view(-1).argmax()  # of the last step: one that matters
        expected.append((largest, slope(session, batch, flat[largest])))
    before = [p.detach().clone() for p in parameters]
    search._optimizer.state.clear()
    metrics = session.step(batch)
    assert metrics["validation_loss"] == pytest.approx(loss_of_before(session, parameters, before, batch), abs=1e-6)
    for parameter, old, (place, difference) in zip(parameters, before, expected, strict=True):
        assert float(parameter.grad.view(-1)[place]) == pytest.approx(difference, rel=0.05, abs=2e-4)
        moved = parameter.grad.abs() > 1e-5
        torch.testing.assert_close((parameter - old)[moved], -0.05 * parameter.grad[moved].sign(), rtol=2e-2, atol=1e-4)


def loss_of_before(session: StreamSession, parameters: list[Any], before: list[Tensor], batch: Any) -> float:
    now = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    loss = loss_of(session, batch)
    with torch.no_grad():
        for parameter, new in zip(parameters, now, strict=True):
            parameter.copy_(new)
    return loss


def test_dartss_logits_descend_the_loss_on_the_past_and_others_stay() -> None:
    _, session = grown("darts")
    batch = PLAIN.batch(seed=40)
    batch.sparse_features.values()[0] = 199  # an id that never came has no logits
    looked_up = []
    for table in session.tables:
        ids = batch.sparse_features[table.spec.features[0]].values().unique()
        looked_up.append(table.find(ids)[table.find(ids) >= 0])
    slopes = [
        {(e, k): slope(session, batch, table.extras["logits"].values[e, k]) for e in entries[:6].tolist() for k in range(3)}
        for table, entries in zip(session.tables, looked_up, strict=True)
    ]
    before = [{name: tensor.values.clone() for name, tensor in table.extras.items()} for table in session.tables]
    session.step(batch)
    for table, entries, old, slow in zip(session.tables, looked_up, before, slopes, strict=True):
        now = {name: tensor.values for name, tensor in table.extras.items()}
        for (e, k), difference in slow.items():
            gradient = float((now["exp_avg"][e, k] - 0.9 * old["exp_avg"][e, k]) / 0.1)  # as Adam was given it
            assert gradient == pytest.approx(difference, rel=0.05, abs=3e-4)
        others = torch.ones(len(table), dtype=torch.bool)
        others[entries] = False
        assert others.any()
        for name in now:
            assert torch.equal(now[name][others], old[name][others])
            assert not torch.equal(now[name][entries], old[name][entries])


def test_logits_are_adams() -> None:
    _, session = grown("darts")
    batch, table = PLAIN.batch(seed=40), session.tables[0]
    entries = table.find(batch.sparse_features["f0"].values().unique())
    entries = entries[entries >= 0]
    old = {name: tensor.values[entries].clone() for name, tensor in table.extras.items()}
    session.step(batch)
    steps = session.search_steps
    mean, square = (table.extras[name].values[entries] for name in ("exp_avg", "exp_avg_sq"))
    size = 0.05 * (1 - 0.999**steps) ** 0.5 / (1 - 0.9**steps)
    expected = old["logits"] - size * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(table.extras["logits"].values[entries], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["autoemb", "darts"])
def test_a_search_step_moves_nothing_but_what_weighs(algorithm: str) -> None:
    model, session = grown(algorithm)
    before = [p.detach().clone() for p in model.parameters()], [b.clone() for b in model.buffers()]
    rows = [table.rows.read(torch.arange(len(table)))[0].rows for table in session.tables]
    outputs = model.eval()(PLAIN.batch(seed=40))[1][1]
    session.step(PLAIN.batch(seed=40))
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.buffers(), strict=True))
    for table, old in zip(session.tables, rows, strict=True):
        assert torch.equal(table.rows.read(torch.arange(len(table)))[0].rows, old)
    assert not torch.equal(model(PLAIN.batch(seed=40))[1][1], outputs)


def test_autoemb_weighs_by_frequency_and_darts_by_id() -> None:
    for algorithm in ("autoemb", "darts"):
        _, session = grown(algorithm)
        table = session.tables[0]
        counts = table.counts(torch.arange(len(table)))
        same = [e for e in range(len(table)) if int(counts[e]) == int(counts.mode().values)][:2]
        if algorithm == "darts":
            table.extras["logits"].values[same[0]] = torch.tensor([3.0, 0.0, 0.0])
        entries = torch.tensor([*same, -1])
        weights = table.form.weigh(Entries(entries, table.counts(entries), searching=False))
        torch.testing.assert_close(weights.sum(1), torch.ones(3))
        assert torch.equal(weights[0], weights[1]) is (algorithm == "autoemb")
        if algorithm == "darts":
            torch.testing.assert_close(weights[2], torch.full((3,), 1 / 3))


def test_settings_are_checked() -> None:
    for wrong in (lambda: es.AutoEmb(hidden=0), lambda: es.AutoEmb(frequencies=0), lambda: es.Darts(lr=0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()


@pytest.mark.parametrize("algorithm", ["autoemb", "darts"])
def test_every_id_has_rows_of_all_sizes_from_the_start(algorithm: str) -> None:
    model, session, optimizer = streamed(PLAIN, 0, algorithm)
    train(model, optimizer, [PLAIN.batch()])
    sizes = sum(STREAMING[algorithm]["candidates"]) + 8
    assert [table.rows.widths for table in session.tables] == [(sizes,), (sizes,)]
