"""Models and loops as people really have them."""

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import FORMED, PLAIN, WORLDS, Task, Told, dlrm, searched, stored_bytes, task, train
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError, InputError, ObjectiveError, SessionError, SpaceError, UnsupportedCollection
from embsearch_plugin.fused import FusedEmbeddingBags

FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}


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


def test_weights_tied_to_something_outside_are_refused() -> None:
    model = task(PLAIN)
    model.out = nn.Linear(8, 200)
    model.out.weight = model.collection.embedding_bags["t0"].weight
    with pytest.raises(UnsupportedCollection, match=r"'out\.weight' is the same parameter as 'embedding_bags\.t0\.weight'"):
        es.prepare(model)
    assert type(model.collection) is EmbeddingBagCollection


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


@pytest.mark.parametrize("fused", [None, FUSED])
def test_inference_mode(fused: Any) -> None:
    model, session, _ = searched(PLAIN, fused=fused)
    with torch.inference_mode():
        inferred = model.eval()(PLAIN.batch())[0]
        with pytest.raises(SessionError, match="inference mode"):
            session.compact(session.derive())
    assert torch.equal(inferred, model(PLAIN.batch())[0])


def test_the_usual_way_to_a_table_still_works() -> None:
    model, _, _ = searched(PLAIN)
    assert model.collection.embedding_bags["t0"].weight.shape == (200, 8)


def test_widths_that_fused_kernels_cannot_store_are_refused_at_once() -> None:
    with pytest.raises(SpaceError, match="multiples of 4"):
        es.prepare(task(PLAIN), fused=FUSED, space=es.SearchSpace(align=1))


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
    told = Told()
    session.register(told)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    for seed in range(12):
        batch = PLAIN.batch(seed=seed)
        optimizer.zero_grad()
        logits = model.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        optimizer.step()
    assert told.steps == list(range(12))
    if isinstance(algorithm, es.Sam):
        assert bool(session.algorithm.vectors.abs().sum() > 0)


def test_a_compiled_model_is_searched() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Nis(warm_up=2, group=8), budget="50%")
    told = Told()
    session.register(told)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    compiled = torch.compile(model, backend="eager")
    train(compiled, optimizer, (PLAIN.batch(seed=i) for i in range(5)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, (PLAIN.batch(seed=i) for i in range(5, 16)))
    assert told.steps == list(range(16))
    assert session.derive().size_bytes <= session.original_bytes / 2


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


def test_a_loop_whose_model_is_in_evaluation_mode_is_searched() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(seed=900)])
    model.eval()  # as where batch norm is frozen
    for seed in range(4):
        optimizer.zero_grad()
        model(PLAIN.batch(seed=seed))[0].backward()
        optimizer.step()
        with torch.no_grad():
            model(PLAIN.batch(seed=800))
    assert session.search_steps == 3
    assert [int(counts.sum()) for counts in session.frequencies] == [4 * 32, 4 * 32]
