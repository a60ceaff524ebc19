"""SAM: the weights of candidates follow the gradient of the training batch, and of nothing else."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import PLAIN, searched, train

import embsearch_plugin as es


def sam(steps: int = 12, **settings: Any) -> tuple[Any, Any, Any]:
    return searched(PLAIN, steps, algorithm=es.Sam(**settings), space=es.SearchSpace(align=1))


def test_alpha_descends_the_training_loss_by_the_loops_own_backward() -> None:
    model, session, optimizer = sam(lr=0.03)
    model.over[3] = torch.nn.Identity()
    search, twin, batch = session.algorithm, es.Sam(lr=0.03).build(), PLAIN.batch(seed=50)
    twin.load_state_dict(copy.deepcopy(search.state_dict()))
    gates = twin._gates(session, twin.sample(session.step_count))
    _, (twin.vectors.grad,) = session.probe.gate_gradients(batch, gates, [twin.vectors])
    twin._optimizer.step()
    train(model, optimizer, [batch])
    assert torch.allclose(search.vectors, twin.vectors, atol=1e-6)
    assert torch.equal(torch.cat(session.gates), search.alpha.detach())


class Counted(list[Any]):
    """A loader that counts its passes."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def test_validation_batches_teach_it_nothing_and_are_not_drawn() -> None:
    model, session, optimizer = sam(steps=0)
    session.detach()
    loader = Counted([PLAIN.batch(seed=900)])
    session.attach(optimizer, validation=loader)
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(5)))
    assert loader.passes == 0
    assert float(session.algorithm.vectors.detach().abs().max()) > 0
    session.derive("80%")
    assert loader.passes == 1


def test_gradients_of_one_weight_step_add_up_and_those_of_earlier_ones_are_dropped() -> None:
    model, session, optimizer = sam(every=3, steps=3)
    search = session.algorithm
    model(PLAIN.batch(seed=1))[0].backward()
    first = search.vectors.grad.clone()
    model(PLAIN.batch(seed=2))[0].backward()
    assert not torch.equal(search.vectors.grad, first)
    optimizer.step()  # the fourth: alpha stays
    model(PLAIN.batch(seed=3))
    assert search.vectors.grad is None


def test_a_gradient_that_overflowed_is_not_followed() -> None:
    model, session, optimizer = sam()
    before = session.algorithm.vectors.detach().clone()
    optimizer.zero_grad()
    model(PLAIN.batch(seed=1))[0].backward()
    session.algorithm.vectors.grad[0, 0] = torch.inf
    optimizer.step()
    assert torch.equal(session.algorithm.vectors, before)


def test_it_has_autodims_settings_but_no_virtual_step() -> None:
    config = es.Sam()
    assert (config.candidates, config.lr, config.every, config.retrains) == ((2, 4, 6, 8, 10), 0.01, 1, True)
    with pytest.raises(TypeError, match="xi"):
        es.Sam(xi=0.1)
