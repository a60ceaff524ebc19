"""Scoring candidates on the shared weights."""

import pytest
import torch
from support import PLAIN, searched, task

import embsearch_plugin as es
from embsearch_plugin.algorithms.parts.scoring import losses


def test_losses_are_those_of_exchanged_gates_over_all_examples_and_leave_no_trace() -> None:
    model, session, _ = searched(PLAIN)
    batches = [PLAIN.batch(size, seed=80 + size) for size in (32, 20, 7)]
    session.detach()
    session.attach(torch.optim.SGD(model.parameters(), lr=0.1), validation=batches)
    torch.manual_seed(1)
    reference = [torch.rand_like(gate) for gate in session.gates]
    alternatives = [(table, torch.rand_like(reference[table])) for table in (0, 1, 1)]
    before = [t.clone() for t in [*model.state_dict().values(), *session.gates]]
    found = losses(session, reference, alternatives, batches=2)
    assert all(torch.equal(a, b) for a, b in zip(before, [*model.state_dict().values(), *session.gates], strict=True))
    model.eval()
    for (table, gates), loss in zip(alternatives, found, strict=True):
        exchanged = [gates if index == table else gate for index, gate in enumerate(reference)]
        each = [float(session.probe.evaluate(batch, exchanged).loss.detach()) for batch in batches[:2]]
        assert loss == pytest.approx((32 * each[0] + 20 * each[1]) / 52, abs=1e-6)


def test_equal_gates_have_equal_losses_in_spite_of_dropout() -> None:
    _, session, _ = searched(PLAIN)
    first, second = losses(session, session.gates, [(0, session.gates[0]), (1, session.gates[1])], batches=3)
    assert first == second


def test_batches_that_say_nothing_are_errors() -> None:
    model, session, _ = searched(PLAIN)
    alternatives = [(0, session.gates[0])]
    bad = PLAIN.batch(seed=1)
    bad.dense_features[0] = float("nan")
    for batches, message in (([bad], "some are no numbers"), ([], "the loader gave no batch")):
        session.detach()
        session.attach(torch.optim.SGD(model.parameters(), lr=0.1), validation=batches)
        with pytest.raises(es.EmbsearchError, match=message):
            losses(session, session.gates, alternatives, batches=1)
    unattached = es.prepare(task(PLAIN), algorithm=es.Nis(warm_up=0), frequencies={s: torch.ones(n) for s, n in COUNTS})
    unattached.step(PLAIN.batch())
    with pytest.raises(es.EmbsearchError, match="needs validation batches"):
        unattached.derive()


COUNTS = (("t0", 200), ("t1", 300))
