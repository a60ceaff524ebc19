"""The optimizers of the user's loop: which train what a search adds and leaves, and what they remember."""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FORMED, PLAIN, moved, searched, tables_of, task, train
from torchrec.optim import RowWiseAdagrad

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError


@pytest.mark.parametrize("way", ["detached", "by hand"])
def test_compact_tables_train_whichever_way_the_search_was_stepped(way: str) -> None:
    if way == "detached":
        model, session, optimizer = searched(PLAIN)
        session.detach()
        session.compact(session.derive())
    else:
        model = task(PLAIN)
        session = es.prepare(model, algorithm=es.Dnis(warm_up=0))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        train(model, optimizer, [PLAIN.batch()])
        session.step(PLAIN.batch(seed=1))
        session.compact(session.derive(), optimizer)
    before = tables_of(model)
    train(model, optimizer, [PLAIN.batch(seed=5)])
    assert moved(model, before)


def test_compact_tables_that_nobody_trains_are_named(caplog: pytest.LogCaptureFixture) -> None:
    _, session, _ = searched(PLAIN, optimizer=lambda params: torch.optim.SGD(list(params)[-2:], lr=0.1))
    with caplog.at_level(logging.WARNING):
        session.compact(session.derive("100%"))
    assert "no optimizer holds the compact tables of collection.t0, collection.t1" in caplog.text


def test_sparse_gradients_stay_sparse() -> None:
    model = task(PLAIN)
    for bag in model.collection.embedding_bags.values():
        bag.sparse = True
    es.apply(model, searched(PLAIN)[1].derive("60%"))
    model(PLAIN.batch())[0].backward()
    assert all(p.grad.is_sparse for p in model.collection.parameters())


def test_names_in_an_optimizer_follow_its_parameters() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    session.attach(optimizer, [PLAIN.batch()])
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(3)])
    session.compact(session.derive("60%"))
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"])
    assert group["param_names"][-1] == "over.4.bias"


def test_lbfgs_is_refused() -> None:
    model = task(PLAIN)
    with pytest.raises(es.EmbsearchError, match="LBFGS keeps its parameters as one vector"):
        es.prepare(model).attach(torch.optim.LBFGS(model.parameters()), [PLAIN.batch()])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("algorithm", FORMED)
def test_what_a_search_adds_to_sparse_tables_is_trained_by_an_optimizer_that_takes_it(algorithm: str, before: bool) -> None:
    model = task(PLAIN)
    for bag in model.collection.embedding_bags.values():
        bag.sparse = True
    session = None if before else es.prepare(model, algorithm=FORMED[algorithm])
    names = {id(p): name for name, p in model.named_parameters()}
    tables = [p for p in model.parameters() if "embedding_bags" in names[id(p)]]
    others = [p for p in model.parameters() if "embedding_bags" not in names[id(p)]]
    optimizers = [torch.optim.SparseAdam(tables, lr=0.01), torch.optim.Adam(others, lr=0.01)]
    session = session or es.prepare(model, algorithm=FORMED[algorithm])
    session.attach(optimizers, validation=[PLAIN.batch(seed=900)])

    def fit(batches: range) -> None:
        for seed in batches:
            model.zero_grad()
            model(PLAIN.batch(seed=seed))[0].backward()
            for optimizer in optimizers:
                optimizer.step()

    fit(range(8))
    session.compact(session.derive("70%"))
    before_training = [p.detach().clone() for p in model.collection.parameters()]
    fit(range(8, 10))
    after = list(model.collection.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before_training, after, strict=True))


def test_sparse_adam_alone_cannot_train_what_a_search_adds() -> None:
    model = task(PLAIN)
    optimizer = torch.optim.SparseAdam(list(model.collection.parameters()), lr=0.01)
    session = es.prepare(model, algorithm=FORMED["nis"])
    with pytest.raises(AttachError, match="attach the optimizer of the other layers"):
        session.attach(optimizer, validation=[PLAIN.batch()])


@pytest.mark.parametrize(
    "algorithm", ["spectral", es.Nis(warm_up=2, group=8), es.AutoDim(candidates=(4, 8), transform="linear", every=2)]
)
def test_schedulers_that_were_made_before_the_search_go_on(algorithm: Any) -> None:
    model = task(PLAIN)
    for bag in model.collection.embedding_bags.values():
        bag.sparse = True
    dense = torch.optim.SGD(model.over.parameters(), lr=0.01, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(dense, lambda step: 0.9**step),
        torch.optim.lr_scheduler.OneCycleLR(dense, 0.1, total_steps=40),
    ]
    session = es.prepare(model, algorithm=algorithm, budget="70%")
    sparse = torch.optim.SparseAdam([p for p in model.collection.parameters() if len(p) > 16], lr=0.01)
    session.attach([sparse, dense], validation=[PLAIN.batch(seed=900)])

    def fit(seeds: range) -> None:
        for seed in seeds:
            sparse.zero_grad()
            dense.zero_grad()
            model(PLAIN.batch(seed=seed))[0].backward()
            sparse.step()
            dense.step()
            for scheduler in schedulers:
                scheduler.step()

    fit(range(6))
    session.compact(session.derive())
    fit(range(6, 9))
    assert len(dense.param_groups) == 1


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("algorithm", [*FORMED, "dnis", "fine"])
def test_fine_tuning_is_resumed_by_a_new_optimizer_of_the_loaded_model(algorithm: str, before: bool, tmp_path: Path) -> None:
    config = FORMED.get(algorithm) or es.Dnis(warm_up=2, lr=0.1, fine_grained=algorithm == "fine")
    model, adam = task(PLAIN), partial(torch.optim.Adam, lr=0.01)
    optimizer = adam(model.named_parameters()) if before else None
    session = es.prepare(model, algorithm=config, budget="70%")
    optimizer = optimizer or adam(model.named_parameters())
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(8)])
    plan = session.derive()
    session.compact(plan)
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(3)])
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, task(PLAIN, seed=1))
    resumed = adam(loaded.named_parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = []
    for each, trained in ((model, optimizer), (loaded, resumed)):
        torch.manual_seed(3)
        losses.append(train(each, trained, [PLAIN.batch(seed=20 + i) for i in range(5)]))
    assert losses[0] == losses[1]


def test_what_a_compact_model_adds_stands_by_its_table_in_an_optimizer_of_more_than_the_model() -> None:
    model = task(PLAIN)
    first, last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*first.parameters(), *model.parameters(), *last.parameters()], lr=0.1)
    session = es.prepare(model, algorithm=FORMED["spectral"])
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(4)])
    session.compact(session.derive("70%"))
    assert any("projection" in name for name, _ in model.named_parameters())
    expected = [*first.parameters(), *model.parameters(), *last.parameters()]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, expected))


def test_a_group_in_an_order_of_its_own_keeps_it() -> None:
    model = task(PLAIN)
    optimizer = torch.optim.SGD([*model.over.parameters(), *reversed(list(model.collection.parameters()))], lr=0.1)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2, lr=0.1))
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(4)])
    session.compact(session.derive("100%"))
    expected = [*model.over.parameters(), *reversed(list(model.collection.parameters()))]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, expected))


@pytest.mark.parametrize("algorithm", [es.Spectral(), es.Nis(warm_up=2), es.AutoDim(candidates=(2, 4), every=1)])
def test_an_optimizer_that_makes_its_state_at_once_takes_new_tables(algorithm: Any) -> None:
    """TorchRec's RowWiseAdagrad, beside one for the other layers, which takes projections and biases."""
    model = task(PLAIN)
    rows = RowWiseAdagrad(model.collection.parameters(), lr=0.1)
    rest = torch.optim.Adam(model.over.parameters())
    session = es.prepare(model, algorithm=algorithm, budget="60%")
    session.attach([rows, rest], validation=[PLAIN.batch(seed=9)])
    both = Both(rows, rest)
    train(model, both, [PLAIN.batch(seed=seed) for seed in range(4)])
    session.compact(session.derive())
    before = [p.detach().clone() for p in model.collection.parameters()]
    train(model, both, [PLAIN.batch(seed=seed) for seed in range(3)])
    assert before and not any(torch.equal(a, b) for a, b in zip(before, model.collection.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", [es.Dnis(warm_up=1, fine_grained=True), es.Magnitude(fine_grained=True)])
def test_single_weights_are_in_no_row_and_their_optimizer_lets_go_of_them(
    algorithm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = task(PLAIN)
    rows, rest = RowWiseAdagrad(model.collection.parameters(), lr=0.1), torch.optim.Adam(model.over.parameters())
    session = es.prepare(model, algorithm=algorithm, budget="60%")
    session.attach([rows, rest], validation=[PLAIN.batch(seed=9)])
    train(model, Both(rows, rest), [PLAIN.batch(seed=seed) for seed in range(4)])
    with caplog.at_level(logging.WARNING):
        session.compact(session.derive())
    assert "no optimizer holds the compact tables of collection.t0, collection.t1" in caplog.text
    assert not rows.param_groups[0]["params"]
    train(model, Both(rest, torch.optim.Adam(model.collection.parameters())), [PLAIN.batch(seed=9)])


def test_an_attach_that_is_refused_may_be_tried_again() -> None:
    model = task(PLAIN)
    for bag in model.collection.embedding_bags.values():
        bag.sparse = True
    session = es.prepare(model, algorithm=es.Nis(warm_up=1))
    sparse = torch.optim.SparseAdam(list(model.collection.inner.parameters()))
    with pytest.raises(AttachError, match=r"attach\(\[sparse, dense\], \.\.\.\)"):
        session.attach(sparse, validation=[PLAIN.batch(seed=9)])
    session.attach([sparse, torch.optim.Adam(model.over.parameters())], validation=[PLAIN.batch(seed=9)])


class Both:
    """Two optimizers, called as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
