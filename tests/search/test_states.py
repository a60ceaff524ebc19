"""What outlives a search: states, plans, copies, and what does not."""

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import FORMED, PLAIN, WORLDS, Task, moved, searched, stored_bytes, tables_of, task, train
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.errors import SessionError
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.optimizers import Slice
from embsearch_plugin.plan import SizePlan

FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}


@pytest.mark.parametrize("fine", [False, True])
def test_a_plan_applied_on_meta_survives_to_empty(fine: bool) -> None:
    plan = searched(PLAIN, algorithm=es.Dnis(warm_up=2, fine_grained=fine))[1].derive("60%")
    expected = es.apply(task(PLAIN), plan)
    with torch.device("meta"):
        model = Task(PLAIN.collection("meta"), 16)
    es.apply(model, plan).to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    empty = dict(es.apply(Task(PLAIN.collection("meta"), 16), plan).to_empty(device="cpu").collection.named_buffers())
    for name, buffer in expected.collection.named_buffers():
        assert torch.equal(buffer, empty[name])


def test_after_compact_the_search_is_over() -> None:
    model, session, optimizer = searched(PLAIN)
    plan = session.derive()
    session.compact(plan)
    calls = [
        lambda: session.compact(plan),
        session.derive,
        session.state_dict,
        lambda: session.step(PLAIN.batch()),
        lambda: session.attach(optimizer, [PLAIN.batch()]),
    ]
    for call in calls:
        with pytest.raises(SessionError, match="this search is over"):
            call()
    assert model is not None


def test_a_rewrite_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, session, optimizer = searched(PLAIN)
    plan, collection, before = session.derive(), model.collection, str(optimizer.state_dict())
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(Slice, "moments", None)
        session.compact(plan)
    assert model.collection is collection
    assert str(optimizer.state_dict()) == before
    assert stored_bytes(session.compact(plan)) == plan.size_bytes


def test_the_search_is_over_though_an_observer_fails_at_its_end() -> None:
    class Full:
        @es.hookimpl
        def embsearch_search_end(self) -> None:
            raise OSError("disk full")

    model, session, optimizer = searched(PLAIN)
    session.register(Full())
    plan = session.derive()
    with pytest.raises(OSError, match="disk full"):
        session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes
    with pytest.raises(SessionError, match="this search is over"):
        session.compact(plan)
    before = tables_of(model)
    train(model, optimizer, [PLAIN.batch()])
    assert moved(model, before)


def test_old_tables_are_let_go() -> None:
    model, session, _ = searched(PLAIN)
    old = weakref.ref(model.collection)
    session.compact(session.derive())
    gc.collect()
    assert old() is None
    assert session.search_steps


def test_state_of_another_search_is_refused_and_nothing_changes() -> None:
    _, session, _ = searched(PLAIN)
    _, other, _ = searched(WORLDS["unequal dims"])
    before = (other.step_count, [gate.clone() for gate in other.gates])
    with pytest.raises(SessionError, match="this state is of another search: there "):
        other.load_state_dict(session.state_dict())
    assert other.step_count == before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], other.gates, strict=True))


def test_fused_optimizer_state_is_in_the_sessions_state() -> None:
    model, session, optimizer = searched(PLAIN, fused=FUSED)
    state, weights = session.state_dict(), copy.deepcopy(model.state_dict())
    again, other, _ = searched(PLAIN, steps=0, fused=FUSED)
    other.load_state_dict(state)
    again.load_state_dict(weights)
    sums = [m.optimizer_states() for net in (model, again) for m in net.modules() if isinstance(m, FusedEmbeddingBags)]
    for table, kept in sums[0].items():
        assert kept["sum"].abs().sum() > 0
        assert torch.equal(kept["sum"], sums[1][table]["sum"])
    assert optimizer is not None


def test_an_average_of_the_model_made_before_the_warm_up_ends_goes_on() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, [PLAIN.batch()])
    for i in range(5):
        train(model, optimizer, [PLAIN.batch(seed=i)])
        average.update_parameters(model)
    assert session.search_steps


@pytest.mark.parametrize("when", ["searched", "compact"])
def test_a_copy_of_a_fused_model_runs_and_trains_alone(when: str) -> None:
    model, session, _ = searched(PLAIN, fused=FUSED)
    if when == "compact":
        session.compact(session.derive("60%"))
    copied, batch = copy.deepcopy(model), PLAIN.batch(seed=3)
    assert torch.equal(model.eval()(batch)[0], copied.eval()(batch)[0])
    before = tables_of(model)
    copied.train()(batch)[0].backward()
    assert not moved(model, before)
    assert moved(copied, before)


def test_an_earlier_plan_may_be_compacted_later() -> None:
    model, session, optimizer = searched(PLAIN)
    plan = session.derive("30%")
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(5)])
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes
    assert isinstance(plan, SizePlan)


class Several(nn.Module):
    """Two collections, one of them known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PLAIN.collection(), WORLDS["mean"].collection()
        self.alias = self.first
        self.over = nn.Linear(48, 1)

    def forward(self, batch: Any) -> Any:
        features = batch.sparse_features
        looked_up = [collection(features).values() for collection in (self.first, self.second, self.alias)]
        logits = self.over(torch.cat(looked_up, 1)).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def test_several_collections_and_aliases_from_search_to_loading(tmp_path: Any) -> None:
    model = Several()
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2, lr=0.1), budget="50%")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, [PLAIN.batch(seed=9)])
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(6)])
    plan = session.derive()
    session.compact(plan)
    assert model.first is model.alias
    assert stored_bytes(model) == plan.size_bytes <= 0.5 * 2 * 500 * 32
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(3)])
    es.save(model, plan, tmp_path)
    loaded = es.load(tmp_path, Several())
    assert loaded.first is loaded.alias
    assert torch.equal(model(PLAIN.batch())[0], loaded(PLAIN.batch())[0])


@pytest.mark.parametrize("algorithm", [*FORMED, "dnis"])
def test_a_copy_made_in_the_middle_of_a_search_runs_trains_and_is_saved_alone(algorithm: str) -> None:
    model, _, _ = searched(PLAIN, steps=6, algorithm=FORMED.get(algorithm))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    batch = PLAIN.batch(seed=3)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(other.eval()(batch)[1][1], model.eval()(batch)[1][1])
        other.train()(batch)[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_state_of_other_settings_is_refused() -> None:
    _, session, _ = searched(PLAIN, algorithm=es.AutoDim(candidates=(1, 4, 8)))
    _, other, _ = searched(PLAIN, algorithm=es.AutoDim(candidates=(2, 4, 8)), steps=3)
    with pytest.raises(SessionError, match=r"there candidates=\(1, 4, 8\); here candidates=\(2, 4, 8\)"):
        other.load_state_dict(session.state_dict())
    assert other.step_count == 3


@pytest.mark.parametrize("steps", [1, 5])  # before rows are ranked, and after
def test_a_state_whose_frequencies_were_given_is_refused_where_none_are(steps: int) -> None:
    batches = [PLAIN.batch(seed=i) for i in range(3)]
    state = searched(PLAIN, steps=steps, frequencies=batches)[1].state_dict()
    _, other, _ = searched(PLAIN, steps=3)
    with pytest.raises(SessionError, match=r"frequencies were given.*\n  Possible solution: prepare\(..., frequencies="):
        other.load_state_dict(state)
    assert other.step_count == 3
    model, same, optimizer = searched(PLAIN, steps=0, frequencies=batches)
    same.load_state_dict(state)
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(8)])
    assert same.search_steps == 8 + steps - 1


def test_the_place_in_the_training_loader_is_in_the_sessions_state() -> None:
    batches = [PLAIN.batch(seed=i) for i in range(5)]
    sessions = []
    for _ in range(2):
        model = task(PLAIN)
        session = es.prepare(model, algorithm=es.Dnis(warm_up=2, xi=0.1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.attach(optimizer, validation=batches, training=DataLoader(batches, batch_size=None, shuffle=True))
        if not sessions:
            train(model, optimizer, batches[:4])
        sessions.append(session)
    sessions[1].load_state_dict(sessions[0].state_dict())
    following = [[session._training.next().labels for _ in range(5)] for session in sessions]
    assert all(torch.equal(a, b) for a, b in zip(*following, strict=True))


def test_a_plan_from_a_file_is_compacted_by_a_new_session(tmp_path: Path) -> None:
    batches = [PLAIN.batch(seed=i) for i in range(3)]
    trained, _, _ = searched(PLAIN, steps=20, algorithm=es.Spectral())
    outputs = []
    for derives in (True, False):
        model = Task(PLAIN.collection(), 16)
        session = es.prepare(model, algorithm="spectral", budget="40%", frequencies=batches)
        model.load_state_dict(trained.state_dict())
        session.attach([], validation=batches)
        if derives:
            session.derive().save(tmp_path / "plan.json")
        session.compact(SizePlan.load(tmp_path / "plan.json"))
        outputs.append(model.eval()(PLAIN.batch(seed=7))[1][1])
    assert torch.equal(*outputs)


def test_a_budget_that_would_not_be_kept_is_refused() -> None:
    _, session, _ = searched(PLAIN)
    with pytest.raises(SessionError, match=r"derive\(strict=False\) keeps no budget; leave out '10%'"):
        session.derive("10%", strict=False)


def test_a_state_from_before_the_first_forward_is_refused_after_it() -> None:
    state = es.prepare(task(PLAIN), fused=FUSED, algorithm=es.Dnis()).state_dict()
    _, session, _ = searched(PLAIN, steps=1, fused=FUSED, algorithm=es.Dnis(), space=None)
    with pytest.raises(SessionError, match="0 collections on fused kernels, and the model 1"):
        session.load_state_dict(state)


def test_loading_a_fresh_state_fuses_nothing() -> None:
    """The model may still be moved and converted until its first forward."""
    state = es.prepare(task(PLAIN), fused=FUSED).state_dict()
    model = task(PLAIN)
    es.prepare(model, fused=FUSED).load_state_dict(state)
    model.double()
    assert isinstance(model.collection.inner, EmbeddingBagCollection)


@pytest.mark.parametrize("algorithm", [es.Dnis(warm_up=1), es.AutoDim(candidates=(2, 4), every=1)])
def test_a_state_that_was_loaded_stays_what_it_was(algorithm: Any) -> None:
    state = searched(PLAIN, steps=3, algorithm=algorithm)[1].state_dict()
    before = [leaf.clone() for leaf in tree_leaves(state["algorithm"]) if isinstance(leaf, torch.Tensor)]
    model, session, optimizer = searched(PLAIN, steps=0, algorithm=algorithm)
    session.load_state_dict(state)
    train(model, optimizer, [PLAIN.batch(seed=seed) for seed in range(3)])
    after = [leaf for leaf in tree_leaves(state["algorithm"]) if isinstance(leaf, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
