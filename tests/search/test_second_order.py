"""Second-order gradients: what the virtual weight step reaches, and what it cannot go through."""

from typing import Any

import pytest
import torch
from support import PLAIN, Task, task, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import embsearch_plugin as es
from embsearch_plugin.errors import SessionError

XI = 0.5


class ByParts(Task):
    """A task whose loss can be asked for in several ways."""

    def loss(self, batch: Any) -> Any:
        return super().forward(batch)


class Checkpointed(nn.Module):
    """Layers that keep no activations."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.layers, inputs, use_reentrant=False)
        return output


def gradients(model: nn.Module, objective: Any = None, xi: float = XI) -> tuple[float, list[Any]]:
    """Return the loss and the gates' gradients of a search step, from the same weights each time."""
    options = {} if objective is None else {"objective": objective}
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1, xi=xi), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(seed=9)], training=[PLAIN.batch(64, seed=3)])
    session.detach()
    train(model, optimizer, [PLAIN.batch(seed=1)])
    session.step(PLAIN.batch(seed=9))
    gates = [gate.clone().requires_grad_() for gate in session.gates]
    loss, found = session.probe.gate_gradients(PLAIN.batch(seed=7), gates, gates, xi)
    return loss, found


def by_parts() -> ByParts:
    torch.manual_seed(0)
    return ByParts(PLAIN.collection(), 16)


def test_an_objective_may_call_any_part_of_the_model() -> None:
    def as_whole(model: nn.Module, batch: Any) -> Any:
        loss, (_, logits, labels) = model(batch)
        return loss, logits, labels

    def by_a_part(model: ByParts, batch: Any) -> Any:
        assert isinstance(model, ByParts)
        loss, (_, logits, labels) = model.loss(batch)
        return loss, logits, labels

    loss, expected = gradients(by_parts(), as_whole)
    got_loss, got = gradients(by_parts(), by_a_part)
    assert got_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert gradients(by_parts(), as_whole, xi=0.0)[0] != loss  # so the weights did move


@pytest.mark.parametrize("frozen", [True, False])
def test_the_loss_is_that_after_a_step_of_what_is_trained(frozen: bool) -> None:
    model = trained(frozen)
    gates = [gate.clone().requires_grad_() for gate in es.session(model).gates]
    got, _ = es.session(model).probe.gate_gradients(PLAIN.batch(seed=7), gates, gates, XI)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = torch.autograd.grad(model(PLAIN.batch(64, seed=3))[0], parameters)
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.sub_(step, alpha=XI)
    assert got == pytest.approx(float(model(PLAIN.batch(seed=7))[0].detach()), rel=1e-5)


def trained(frozen: bool) -> Task:
    """Return a searched model in evaluation mode, whose tables may be frozen."""
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(seed=9)], training=[PLAIN.batch(64, seed=3)])
    train(model, optimizer, [PLAIN.batch(seed=1)])
    model.collection.requires_grad_(not frozen)
    return model.eval()


def test_activation_checkpoints_are_refused() -> None:
    model = task(PLAIN)
    model.over = Checkpointed(model.over)  # type: ignore[assignment]
    with pytest.raises(SessionError, match="cannot go through activation checkpoints"):
        gradients(model)
