"""Models and loops as people really have them."""

import copy
import gc
import io
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import PLAIN, WORLDS, Task, dlrm, searched, stored_bytes, task, train
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError, InputError, ObjectiveError, SessionError, SpaceError, UnsupportedCollection
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.plan import SizePlan

FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}


def tables_of(model: Task) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.collection.parameters()]


def moved(model: Task, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, model.collection.parameters(), strict=True))


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


class Checkpointed(Task):
    """Recomputes the collection in the backward."""

    reentrant = False

    def forward(self, batch: Any) -> Any:
        def run(dense: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
            return self.over(torch.cat([self.collection(sparse).values(), dense], 1)).squeeze(-1)

        logits = checkpoint(run, batch.dense_features.requires_grad_(), batch.sparse_features, use_reentrant=self.reentrant)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_works_or_says_why_not(reentrant: bool) -> None:
    model = Checkpointed(PLAIN.collection(), 16)
    model.reentrant = reentrant
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, [PLAIN.batch(seed=9)])
    if reentrant:
        with pytest.raises(ObjectiveError, match="use_reentrant=False"):
            train(model, optimizer, [PLAIN.batch()])
    else:
        train(model, optimizer, [PLAIN.batch(seed=i) for i in range(3)])
        assert float(session.gates[0].min()) < 1


@pytest.mark.parametrize("fused", [None, FUSED])
@pytest.mark.parametrize("training", [True, False])
def test_ids_without_a_row_are_named_before_kernels_overwrite_them(fused: Any, training: bool) -> None:
    model, _, _ = searched(PLAIN, fused=fused)
    values = torch.randint(0, 200, (64,))
    values[0] = 10**5
    features = KeyedJaggedTensor(keys=["f0", "f1"], values=values, lengths=torch.ones(64, dtype=torch.int64))
    with torch.set_grad_enabled(training), pytest.raises(InputError, match="100000"):
        model.train(training).collection(features)
    assert values[0] == 10**5


def test_a_loop_that_never_calls_forward_is_fused_all_the_same() -> None:
    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = task(PLAIN)

        def training_step(self, batch: Any) -> Any:
            return self.net(batch)

    model = Lightning()
    es.prepare(model, objective=lambda m, b: m.training_step(b), fused=FUSED)
    model.training_step(PLAIN.batch())[0].backward()
    assert type(model.net.collection.inner) is FusedEmbeddingBags


def test_frozen_tables_stay_frozen() -> None:
    model = task(PLAIN)
    model.collection.embedding_bags["t0"].weight.requires_grad_(False)
    plan = searched(PLAIN)[1].derive("100%")
    frozen = es.apply(model, plan)
    assert {p.requires_grad for n, p in frozen.named_parameters() if "t0#" in n} == {False}
    assert {p.requires_grad for n, p in frozen.named_parameters() if "t1#" in n} == {True}
    model = task(PLAIN)
    model.collection.embedding_bags["t0"].weight.requires_grad_(False)
    es.prepare(model, fused=FUSED)
    with pytest.raises(SessionError, match="'embedding_bags.t0.weight' is frozen"):
        model(PLAIN.batch())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bytes_follow_the_weights_type_not_the_configs(dtype: torch.dtype) -> None:
    model = task(PLAIN)
    model.collection.to(dtype)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, [PLAIN.batch()])
    train(model, optimizer, [PLAIN.batch(seed=i) for i in range(3)])
    plan = session.derive("50%")
    session.compact(plan)
    assert stored_bytes(model) == plan.size_bytes <= 0.5 * 500 * 8 * dtype.itemsize


def test_a_model_converted_during_the_search_is_named() -> None:
    model, session, _ = searched(PLAIN)
    model.collection.to(torch.bfloat16)
    with pytest.raises(SessionError, match=r"was torch\.float32 .* and is torch\.bfloat16 now"):
        session.derive()


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


def test_old_tables_are_let_go() -> None:
    model, session, _ = searched(PLAIN)
    old = weakref.ref(model.collection)
    session.compact(session.derive())
    gc.collect()
    assert old() is None
    assert session.search_steps


def test_weights_tied_to_something_outside_are_refused() -> None:
    model = task(PLAIN)
    model.out = nn.Linear(8, 200)
    model.out.weight = model.collection.embedding_bags["t0"].weight
    with pytest.raises(UnsupportedCollection, match=r"'out\.weight' is the same parameter as 'embedding_bags\.t0\.weight'"):
        es.prepare(model)
    assert type(model.collection) is EmbeddingBagCollection


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


def test_an_initialization_made_for_the_originals_shape_is_no_hindrance() -> None:
    pretrained = torch.randn(300, 8)
    configs = [
        EmbeddingBagConfig(name="t0", num_embeddings=200, embedding_dim=8, feature_names=["f0"]),
        EmbeddingBagConfig(
            name="t1", num_embeddings=300, embedding_dim=8, feature_names=["f1"], init_fn=lambda w: w.data.copy_(pretrained)
        ),
    ]
    plan = searched(PLAIN)[1].derive("50%")
    state = torch.get_rng_state()
    model = Task(EmbeddingBagCollection(configs), 16)
    torch.set_rng_state(state)
    es.apply(model, plan)
    assert torch.equal(state, torch.get_rng_state())
    assert stored_bytes(model) == plan.size_bytes


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


@pytest.mark.parametrize("fused", [None, FUSED])
def test_inference_mode(fused: Any) -> None:
    model, session, _ = searched(PLAIN, fused=fused)
    with torch.inference_mode():
        inferred = model.eval()(PLAIN.batch())[0]
        with pytest.raises(SessionError, match="inference mode"):
            session.compact(session.derive())
    assert torch.equal(inferred, model(PLAIN.batch())[0])


def test_sparse_gradients_stay_sparse() -> None:
    model = task(PLAIN)
    for bag in model.collection.embedding_bags.values():
        bag.sparse = True
    es.apply(model, searched(PLAIN)[1].derive("60%"))
    model(PLAIN.batch())[0].backward()
    assert all(p.grad.is_sparse for p in model.collection.parameters())


def test_the_usual_way_to_a_table_still_works() -> None:
    model, _, _ = searched(PLAIN)
    assert model.collection.embedding_bags["t0"].weight.shape == (200, 8)


def test_widths_that_fused_kernels_cannot_store_are_refused_at_once() -> None:
    with pytest.raises(SpaceError, match="multiples of 4"):
        es.prepare(task(PLAIN), fused=FUSED, space=es.SearchSpace(align=1))


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


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan")

    model, session, _ = searched(PLAIN)
    model.over[0].register_forward_pre_hook(lambda m, inputs: (Broken.apply(inputs[0]),))
    before = [gate.clone() for gate in session.gates]
    with pytest.raises(es.EmbsearchError, match="gradient must be a number"):
        session.step(PLAIN.batch())
    assert all(torch.equal(a, b) for a, b in zip(before, session.gates, strict=True))


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


FORMED = {
    "spectral": es.Spectral(warm_up=2),
    "nis": es.Nis(warm_up=2, group=8),
    "padding": es.AutoDim(candidates=(2, 4), every=2),
    "linear": es.AutoDim(candidates=(2, 4), every=2, transform="linear", lookup="separate"),
    "sam": es.Sam(candidates=(2, 4)),
}


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


@pytest.mark.parametrize("algorithm", FORMED)
@pytest.mark.parametrize("world", ["one id", "several features"])
def test_a_search_with_forms_under_autocast(algorithm: str, world: str) -> None:
    batches = [WORLDS[world].batch(seed=i) for i in range(6)]
    model = task(WORLDS[world])
    session = es.prepare(model, algorithm=FORMED[algorithm])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=batches[:1])

    def fit() -> None:
        for batch in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(batch)[1][1]
                loss = model(batch)[0]
            loss.backward()
            optimizer.step()
            assert bool(logits.isfinite().all())

    fit()
    session.compact(session.derive("70%"))
    fit()


def test_column_chunks_that_do_not_add_up_are_named_before_anything_is_trained() -> None:
    with pytest.raises(SpaceError, match=r"sum to the table's dim 8; got \(4, 2\)"):
        es.prepare(task(PLAIN), space=es.SearchSpace(column_chunks=(4, 2)))
    es.prepare(task(PLAIN), algorithm=FORMED["sam"], space=es.SearchSpace(column_chunks=(4, 2)))  # a dim is the whole table's


@pytest.mark.parametrize("algorithm", [es.Nis(warm_up=2, group=8), es.Sam(candidates=(4, 8)), es.AutoDim(candidates=(4, 8))])
def test_a_loop_that_calls_a_part_of_the_model_searches_too(algorithm: Any) -> None:
    model = dlrm()
    session = es.prepare(model, algorithm=algorithm, budget="50%")
    told: list[int] = []
    session.register(ForwardsSeen(told))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    for seed in range(12):
        batch = PLAIN.batch(seed=seed)
        optimizer.zero_grad()
        logits = model.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        optimizer.step()
    assert told == list(range(12))
    if isinstance(algorithm, es.Sam):
        assert bool(session.algorithm.vectors.abs().sum() > 0)


def test_a_compiled_model_is_searched() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Nis(warm_up=2, group=8), budget="50%")
    told: list[int] = []
    session.register(ForwardsSeen(told))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    train(torch.compile(model, backend="eager"), optimizer, (PLAIN.batch(seed=i) for i in range(8)))
    assert told == list(range(8))
    assert session.derive().size_bytes <= session.original_bytes / 2


class ForwardsSeen:
    """An observer of weight forwards."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    @es.hookimpl
    def embsearch_before_forward(self, step: int) -> None:
        self.steps.append(step)


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


def test_a_state_of_other_settings_is_refused() -> None:
    _, session, _ = searched(PLAIN, algorithm=es.AutoDim(candidates=(1, 4, 8)))
    _, other, _ = searched(PLAIN, algorithm=es.AutoDim(candidates=(2, 4, 8)), steps=3)
    with pytest.raises(SessionError, match=r"there candidates=\(1, 4, 8\); here candidates=\(2, 4, 8\)"):
        other.load_state_dict(session.state_dict())
    assert other.step_count == 3


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


@pytest.mark.parametrize("algorithm", ["spectral", es.Nis(warm_up=2, group=8), es.AutoDim(candidates=(4, 8))])
def test_validation_batches_without_examples_are_passed_over(algorithm: Any) -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=algorithm, budget="70%")
    optimizer = torch.optim.Adam(model.parameters())
    empty, some = PLAIN.batch(0), PLAIN.batch(seed=900)
    session.attach(optimizer, validation=[empty, some])
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(60)))
    plan = session.derive()
    session._validation.loader = [some]
    assert session.derive().to_json() == plan.to_json()
    session._validation.loader = [empty]
    with pytest.raises(AttachError, match="the first validation batches hold no examples"):
        session.derive()


def test_ids_are_counted_in_a_batch_of_one_example() -> None:
    model = task(PLAIN)
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    session = es.prepare(model, budget="50%", frequencies=[PLAIN.batch(32), PLAIN.batch(1)])
    session.attach([], validation=[PLAIN.batch(seed=1)])
    assert session.derive().size_bytes <= session.original_bytes / 2


def test_a_budget_that_would_not_be_kept_is_refused() -> None:
    _, session, _ = searched(PLAIN)
    with pytest.raises(SessionError, match=r"derive\(strict=False\) keeps no budget; leave out '10%'"):
        session.derive("10%", strict=False)
