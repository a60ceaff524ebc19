"""The loop of recipes, piece by piece; tests/test_run.py has it as a whole."""

import copy
from pathlib import Path

import pytest
import torch
from support import PLAIN, WORLDS, World, default_optimizer, task

import embsearch_plugin as es
from embsearch_plugin.data.planted import Planted
from embsearch_plugin.models.torchrec_own import Dlrm
from embsearch_plugin.recipes import Train
from embsearch_plugin.training import Stage, Watcher, converge, decayed


@pytest.mark.parametrize("name", WORLDS)
def test_l2_is_the_gradient_of_what_is_looked_up(name: str) -> None:
    world: World = WORLDS[name]
    model, batch = task(world), world.batch(7)
    reference, outputs = copy.deepcopy(model), []
    reference.collection.register_forward_hook(lambda module, inputs, output: outputs.append(output.values()))
    torch.manual_seed(1)  # of dropout
    loss, _ = reference(batch)
    (loss + 0.3 * sum(values.square().sum() / len(values) for values in outputs)).backward()
    torch.manual_seed(1)
    with decayed(model, 0.3) as forward:
        forward(batch)[0].backward()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_l2_acts_on_rows_as_the_gates_leave_them() -> None:
    model = task(PLAIN)
    batches = [PLAIN.batch(9, seed=seed) for seed in range(2)]
    space, counts = es.SearchSpace(row_blocks=1), {"t0": torch.ones(200), "t1": torch.ones(300)}
    session = es.prepare(model, algorithm=es.Dnis(warm_up=0), budget="50%", space=space, frequencies=counts)
    session.attach(default_optimizer(PLAIN)(model.parameters()), batches)
    session.step(batches[0])
    half = [torch.full_like(gates, 0.5) for gates in session.gates]
    session.set_gates(half)
    torch.manual_seed(1)  # of dropout
    plain = [torch.autograd.grad(model(batches[1])[0], list(model.parameters()))]
    torch.manual_seed(1)
    with decayed(model, 2.0) as forward:
        plain.append(torch.autograd.grad(forward(batches[1])[0], list(model.parameters())))
    rows = dict(model.named_parameters())
    for (key, row), without, with_decay in zip(rows.items(), *plain, strict=True):
        if "embedding_bags" in key:
            looked_up = (with_decay - without).abs().sum(1) > 0
            assert 0 < looked_up.sum() < len(row)  # of nothing else
            share = ((with_decay - without) / row)[looked_up]
            counts = share / (2 * 2.0 * 0.25 / 9)
            torch.testing.assert_close(counts, counts[:, :1].round().expand_as(counts), rtol=1e-4, atol=1e-4)


def test_l2_leaves_the_gradients_of_a_search_step_alone() -> None:
    model, counts = task(PLAIN), {"t0": torch.ones(200), "t1": torch.ones(300)}
    session = es.prepare(model, algorithm=es.Dnis(warm_up=0), budget="50%", frequencies=counts)
    batches = [PLAIN.batch(9, seed=seed) for seed in range(2)]
    session.attach(default_optimizer(PLAIN)(model.parameters()), batches)
    session.step(batches[0])
    leaves = [gates.clone().requires_grad_() for gates in session.gates]
    _, expected = session.probe.gate_gradients(batches[1], leaves, leaves)
    with decayed(model, 100.0) as forward:
        forward(batches[0])
        _, found = session.probe.gate_gradients(batches[1], leaves, leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_epoch_counts_steps_of_weights_and_of_the_search(tmp_path: Path) -> None:
    data = Planted(examples=400, fields=3, rows=(9,), ranks=(2,)).load()
    model = Dlrm(4).build(data.schema)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2), budget="50%")
    optimizer = torch.optim.Adam(model.parameters())
    validation, train = data.batches("validation", 32), data.batches("train", 32)
    session.attach(optimizer, validation)
    options = Train(epochs=2, batch_size=32)
    stage = Stage("search", model, optimizer, train, validation, options, tmp_path / "state", session=session)
    history = converge(stage, Watcher())
    weight = len(train)
    assert [row["steps"] for row in history] == [
        0,
        weight + weight - 1,
        2 * weight,
    ]  # the first search step follows the second of the weights
