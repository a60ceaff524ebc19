"""A search step changes no table, no optimizer state, no batch-norm buffer, no random state and no gradient, bit for bit."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import PLAIN, WORLDS, Task, task, train
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.optim import RowWiseAdagrad

import embsearch_plugin as es
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.search.session import Session


def dense_adam(model: Task) -> tuple[Any, dict[str, Any]]:
    return torch.optim.Adam(model.parameters(), lr=0.01), {}


def momentum(model: Task) -> tuple[Any, dict[str, Any]]:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01), {}


def sparse_gradients(model: Task) -> tuple[Any, dict[str, Any]]:
    for bag in model.collection.embedding_bags.values():
        bag.sparse = True
    tables = list(model.collection.parameters())
    return [torch.optim.SparseAdam(tables, lr=0.01), torch.optim.Adam(model.over.parameters(), lr=0.01)], {}


def fused(optimizer: EmbOptimType) -> Callable[[Task], tuple[Any, dict[str, Any]]]:
    def make(model: Task) -> tuple[Any, dict[str, Any]]:
        params = {"fused": {"optimizer": optimizer, "learning_rate": 0.05}}
        return torch.optim.Adam(model.parameters(), lr=0.01), params

    return make


def marked(model: Task) -> tuple[Any, dict[str, Any]]:
    apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": 0.05})
    return torch.optim.Adam(model.over.parameters(), lr=0.01), {}


WAYS = {
    "dense Adam": dense_adam,
    "SGD with momentum": momentum,
    "sparse gradients": sparse_gradients,
    "fused SGD": fused(EmbOptimType.EXACT_SGD),
    "fused Adagrad": fused(EmbOptimType.EXACT_ADAGRAD),
    "fused row-wise Adagrad": fused(EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    "optimizer in backward": marked,
}


class Both:
    """Several optimizers used as one by the loop."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.all = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()


def prepared(way: str, world: str, **algorithm: Any) -> tuple[Task, Session, Both]:
    model = task(WORLDS[world])
    optimizers, options = WAYS[way](model)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    session = es.prepare(model, algorithm=es.Dnis(warm_up=3, lr=0.1, **algorithm), **options)
    session.attach(optimizers, validation=[WORLDS[world].batch(seed=900 + i) for i in range(3)])
    return model, session, Both(optimizers)


def everything(model: Task, loop: Both) -> list[Tensor]:
    tensors = [*model.state_dict().values()]
    tensors += [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    tensors += [v for o in loop.all for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    for module in model.modules():
        if isinstance(module, FusedEmbeddingBags):
            tensors += [v for state in module.optimizer_states().values() for v in state.values()]
    states = [
        torch.get_rng_state(),
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
        torch.tensor(random.getstate()[1]),
    ]
    return [t.detach().clone() for t in tensors + states]


@pytest.mark.parametrize("world", ["one id", "bags"])
@pytest.mark.parametrize("way", WAYS)
def test_a_search_step_leaves_no_trace(way: str, world: str) -> None:
    model, session, loop = prepared(way, world)
    train(model, loop, (WORLDS[world].batch(seed=i) for i in range(5)))
    before, gates = everything(model, loop), [g.clone() for g in session.gates]
    session.step(WORLDS[world].batch(seed=1000))
    after = everything(model, loop)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gates, session.gates, strict=True))


@pytest.mark.parametrize("way", ["dense Adam", "SGD with momentum"])
def test_nor_does_a_second_order_step(way: str) -> None:
    model, session, loop = prepared(way, "bags", xi=0.1)
    train(model, loop, (WORLDS["bags"].batch(seed=i) for i in range(5)))
    before = everything(model, loop)
    session.step(WORLDS["bags"].batch(seed=1000))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, loop), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_training_beside_gates_that_stay_at_one_is_training_without_a_search(way: str) -> None:
    """A search that learns nothing (rate 0) must not show in the losses: same batches, same dropout, same updates."""
    losses = []
    for searching in (False, True):
        model, session, loop = prepared(way, "one id")
        if searching:
            session.algorithm.config = es.Dnis(warm_up=3, lr=1e-30)
        else:
            session.detach()
        losses.append(train(model, loop, (PLAIN.batch(seed=i) for i in range(8))))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


def test_fused_tables_learn_what_plain_tables_learn() -> None:
    models = []
    for fused_params in (None, {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1}):
        model = task(PLAIN)
        session = es.prepare(model, algorithm=es.Dnis(warm_up=3, lr=0.1), fused=fused_params)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
        train(model, optimizer, (PLAIN.batch(seed=i) for i in range(10)))
        models.append((model, session))
    for mine, theirs in zip(models[1][0].parameters(), models[0][0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert str(models[0][1].derive()) == str(models[1][1].derive())


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])
def test_compacted_fused_tables_keep_their_state_and_train_on(optimizer: EmbOptimType) -> None:
    model = task(WORLDS["mean"])
    session = es.prepare(model, algorithm=es.Dnis(warm_up=3, lr=0.1), fused={"optimizer": optimizer, "learning_rate": 0.05})
    other = torch.optim.Adam(model.over.parameters(), lr=0.01)
    session.attach(other, validation=[WORLDS["mean"].batch(seed=900)])
    train(model, other, (WORLDS["mean"].batch(seed=i) for i in range(8)))
    model.eval()
    plan = session.derive("100%")
    batch = WORLDS["mean"].batch(seed=50)
    whole = session.compact(plan)
    fused_now = [m for m in model.modules() if isinstance(m, FusedEmbeddingBags)]
    assert len(fused_now) == 1
    states = fused_now[0].optimizer_states()
    assert all(value.abs().sum() > 0 for state in states.values() for value in state.values())
    before = float(whole(batch)[0].detach())
    train(model, other, [batch] * 5)
    assert float(model.eval()(batch)[0].detach()) < before
