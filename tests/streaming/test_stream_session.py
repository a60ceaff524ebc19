"""A stream's session: made, attached, capped, ended; and what goes wrong."""

import gc
import logging
import math
import weakref
from typing import Any

import pytest
import torch
from support import PLAIN, STREAMING, STREAMS, WORLDS, Task, World, streamed, task, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.keyed import KeyedOptimizerWrapper

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError, BudgetError, ObjectiveError, PlanError, SessionError, UnsupportedCollection
from embsearch_plugin.streaming.collection import StreamingEmbeddingBagCollection


def test_the_decorator_makes_tables_that_grow() -> None:
    @es.searchable(algorithm=es.Esapn(candidates=(1, 3)))
    def build() -> Task:
        return task(PLAIN)

    @es.searchable(algorithm="fixed", budget="50%")
    class Built(Task):
        def __init__(self) -> None:
            super().__init__(PLAIN.collection(), 16)

    for model in (build(), Built()):
        session = es.session(model)
        assert isinstance(model.collection, StreamingEmbeddingBagCollection)
        assert session.model is model and not session.used_bytes
    assert type(build.original().collection) is type(PLAIN.collection())


@pytest.mark.parametrize("algorithm", STREAMS)
def test_tables_on_the_meta_device_never_exist(algorithm: str) -> None:
    huge = World((("t0", 10**12, 8, ("f0",), PoolingType.SUM), ("t1", 10**12, 8, ("f1",), PoolingType.SUM)))
    model = Task(huge.collection("meta"), 16)
    config = type(streamed(PLAIN, 0, algorithm)[1].config)(**STREAMING[algorithm])
    session = es.prepare(model, algorithm=config)
    optimizer = torch.optim.Adam(model.parameters())
    session.attach(optimizer, validation=[huge.batch(seed=9)])
    losses = train(model, optimizer, (huge.batch(seed=i) for i in range(3)))
    assert all(map(math.isfinite, losses))
    assert all(0 < len(table) <= 3 * 32 for table in session.tables)


def test_the_original_tables_are_let_go_of() -> None:
    model = task(PLAIN)
    weights = [weakref.ref(weight) for weight in model.collection.parameters()]
    session = es.prepare(model, algorithm="fixed")
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    assert session.specs[0].rows == 200


def test_an_optimizer_of_the_original_tables_is_refused() -> None:
    model = task(PLAIN)
    early = torch.optim.Adam(model.parameters())
    session = es.prepare(model, algorithm="fixed")
    with pytest.raises(AttachError, match="make the optimizer after"):
        session.attach(early)
    session.attach(torch.optim.Adam(model.parameters()))
    with pytest.raises(AttachError, match="attached already"):
        session.attach(torch.optim.Adam(model.parameters()))


def test_attach_says_what_it_lacks() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm="esapn")
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(AttachError, match="esapn learns from batches of the past"):
        session.attach(optimizer)
    with pytest.raises(AttachError, match="must start anew"):
        session.attach(optimizer, validation=iter([PLAIN.batch()]))
    wrapped = KeyedOptimizerWrapper(dict(model.named_parameters()), lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(AttachError, match="attach the SGD inside"):
        session.attach(wrapped, validation=[PLAIN.batch()])
    session.attach(optimizer, validation=[PLAIN.batch()])


def test_a_search_step_follows_the_step_of_the_last_optimizer() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Darts(**STREAMING["darts"], warm_up=2, every=3))
    first, last = torch.optim.SGD(model.collection.parameters(), lr=0.1), torch.optim.Adam(model.over.parameters())
    seen: list[int] = []
    session.attach([first, last], validation=[PLAIN.batch(seed=9)])
    for step in range(9):
        for optimizer in (first, last):
            optimizer.zero_grad()
        model(PLAIN.batch(seed=step))[0].backward()
        first.step()
        before = session.search_steps
        last.step()
        seen.append(session.search_steps - before)
    assert seen == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    session.detach()
    last.step()
    assert session.step_count == 9


def test_forms_are_trained_by_an_optimizer_that_does_not_hold_them() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Esapn(**STREAMING["esapn"]))
    optimizer = torch.optim.SGD(model.over.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch()])
    maps = [p for p in model.collection.parameters() if p.dim() == 2]  # biases are lost in the model's batch norm
    before = [p.detach().clone() for p in maps]
    train(model, optimizer, [PLAIN.batch(seed=1)])
    assert not any(torch.equal(a, b) for a, b in zip(before, maps, strict=True))


def test_batches_of_the_past_are_taken_in_turn() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Esapn(**STREAMING["esapn"]))
    optimizer = torch.optim.Adam(model.parameters())
    taken: list[int] = []

    class Past:
        def __iter__(self) -> Any:
            for seed in (1, 2, 3):
                taken.append(seed)
                yield PLAIN.batch(seed=seed)

    session.attach(optimizer, validation=Past())
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(5)))
    assert taken == [1, 2, 3, 1, 2]


def test_an_algorithm_that_does_not_search_takes_no_batch() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm="fixed")
    optimizer = torch.optim.Adam(model.parameters())

    class Never:
        def __iter__(self) -> Any:
            raise AssertionError

    session.attach(optimizer, validation=Never())
    train(model, optimizer, [PLAIN.batch()])
    assert (session.step_count, session.search_steps) == (1, 0)


class Logits(nn.Module):
    """A model that knows nothing of train tasks, and is not called with a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.collection, self.over = PLAIN.collection(), nn.Linear(19, 1)

    def forward(self, dense: torch.Tensor, sparse: Any) -> torch.Tensor:
        return self.over(torch.cat([self.collection(sparse).values(), dense], 1)).squeeze(1)


def objective(model: nn.Module, batch: Any) -> Any:
    logits = model(batch.dense_features, batch.sparse_features)
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits, batch.labels


@pytest.mark.parametrize("algorithm", STREAMS)
def test_a_model_of_any_kind_gives_its_objective(algorithm: str) -> None:
    model = Logits()
    config = type(streamed(PLAIN, 0, algorithm)[1].config)(**STREAMING[algorithm])
    session = es.prepare(model, algorithm=config, objective=objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.attach(optimizer, validation=[PLAIN.batch(seed=i) for i in (1, 2)])
    for seed in range(6):
        optimizer.zero_grad()
        objective(model, PLAIN.batch(seed=seed))[0].backward()
        optimizer.step()
    assert session.search_steps == (0 if algorithm == "fixed" else 6)
    if algorithm == "esapn":  # losses are those of the past, where labels can be seen
        for table in session.tables:
            assert table.extras["scored"].values.any()
            assert table.extras["losses"].values.any()
    plan = session.derive()
    before = model.eval()(PLAIN.batch(seed=3).dense_features, PLAIN.batch(seed=3).sparse_features)
    session.compact(plan)
    after = model(PLAIN.batch(seed=3).dense_features, PLAIN.batch(seed=3).sparse_features)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_model_of_any_kind_without_an_objective_is_told_so() -> None:
    model = Logits()
    es.prepare(model, algorithm="esapn")
    batch = PLAIN.batch()
    with pytest.raises(ObjectiveError, match="give objective="):
        model.train()(batch.dense_features, batch.sparse_features)
    plain = Logits()
    es.prepare(plain, algorithm="fixed")  # needs no losses
    plain.train()(batch.dense_features, batch.sparse_features)


@pytest.mark.parametrize("algorithm", STREAMS)
def test_the_cap_is_never_exceeded_and_is_said_once(algorithm: str, caplog: pytest.LogCaptureFixture) -> None:
    world = WORLDS["bags"]
    model, session, optimizer = streamed(world, 0, algorithm, budget=es.Budget(bytes=9_000))
    with caplog.at_level(logging.WARNING):
        for seed in range(12):
            losses = train(model, optimizer, [world.batch(seed=seed)])
            assert session.used_bytes <= session.held_bytes <= 9_000
            assert math.isfinite(losses[0])
    assert session.stopped
    said = [record for record in caplog.records if "have reached" in record.message]
    assert len(said) == 1 and "9000 bytes" in said[0].message
    assert session.used_bytes > 0.9 * 9_000 / 1.25  # it is made use of
    grown = [len(table) for table in session.tables]
    train(model, optimizer, [world.batch(seed=99)])
    assert [len(table) for table in session.tables] == grown


def test_without_a_cap_nothing_is_refused_and_a_share_is_of_the_original_tables() -> None:
    assert not streamed(PLAIN, 4, "fixed")[1].stopped
    _, session, _ = streamed(PLAIN, 6, "fixed", budget="10%")
    assert session.stopped
    assert session.held_bytes <= 500 * 8 * 4 // 10
    with pytest.raises(BudgetError, match="is in bytes"):
        streamed(PLAIN, 0, "fixed", budget=es.Budget(params=500))


@pytest.mark.parametrize("algorithm", STREAMS)
def test_what_is_counted_is_the_bytes_of_the_tensors(algorithm: str) -> None:
    _, session, _ = streamed(PLAIN, algorithm=algorithm)
    tensors = []
    for table in session.tables:
        growing = [*table.rows._tensors(), table._counts, *table.extras.values(), table.ids._ids]
        tensors += [tensor._held for tensor in growing] + [table.ids._slots]
    assert session.held_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert session.used_bytes <= session.held_bytes <= 1.25 * session.used_bytes
    rows = sum(width * count for table in session.tables for width, count in zip(*shape(table), strict=True))
    assert rows == sum(table.weights for table in session.tables)


def shape(table: Any) -> tuple[tuple[int, ...], list[int]]:
    return table.rows.widths, table.rows.row_counts


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.name.endswith("_"):
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(returned) if isinstance(t, torch.Tensor))])
        return returned


@pytest.mark.parametrize("algorithm", STREAMS)
def test_a_step_costs_as_much_as_its_batch(algorithm: str) -> None:
    """However many rows there are: no operation makes a tensor of all of them."""
    made = []
    for rows in (500, 20_000):
        model, session, optimizer = streamed(PLAIN, 1, algorithm)
        for table in session.tables:
            table.admit(torch.arange(1000, 1000 + rows), torch.ones(rows, dtype=torch.int64))
            table.admit(torch.arange(10**6, 10**6 + rows // 50), torch.ones(rows // 50, dtype=torch.int64))  # room for more
        with Largest() as largest:
            train(model, optimizer, [PLAIN.batch(seed=1), PLAIN.batch(seed=2)])
        made.append(largest.numel)
    assert made[0] == made[1]


def test_distributed_models_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = DistributedModelParallel.__new__(DistributedModelParallel)
    nn.Module.__init__(wrapped)
    wrapped._dmp_wrapped_module = task(PLAIN)
    with pytest.raises(UnsupportedCollection, match="DistributedModelParallel"):
        es.prepare(wrapped, algorithm="esapn")
    model, _, _ = streamed(PLAIN, 1)
    monkeypatch.setattr("embsearch_plugin.distributed.world_size", lambda: 2)
    with pytest.raises(UnsupportedCollection, match="DistributedModelParallel and DistributedDataParallel"):
        model(PLAIN.batch())


def test_what_cannot_work_is_refused_when_it_is_prepared() -> None:
    with pytest.raises(UnsupportedCollection, match="float32.*float16"):
        es.prepare(task(WORLDS["half"]), algorithm="fixed")
    with pytest.raises(SessionError, match="space, fused cannot be given"):
        es.prepare(task(PLAIN), algorithm="esapn", space=es.SearchSpace(), fused={})
    model = task(PLAIN)
    es.prepare(model, algorithm="fixed")
    for algorithm in ("fixed", "dnis"):
        with pytest.raises(UnsupportedCollection, match="being searched already"):
            es.prepare(model, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", STREAMS)
def test_nothing_of_the_session_is_left_after_compact(algorithm: str) -> None:
    model, session, optimizer = streamed(PLAIN, algorithm=algorithm)
    model.over[1].eval()  # a frozen batch norm stays so
    modes = {name: module.training for name, module in model.named_modules() if not name.startswith("collection")}
    assert session.compact(session.derive()) is model
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert model.collection.training
    assert not model._forward_hooks and not optimizer._optimizer_step_post_hooks
    assert "embsearch" not in repr(model.__dict__.keys())
    assert not any(isinstance(module, StreamingEmbeddingBagCollection) for module in model.modules())
    assert not any(name.startswith("collection.forms") for name in model.state_dict())
    with pytest.raises(SessionError, match="no search"):
        es.session(model)
    train(model, torch.optim.Adam(model.parameters()), [PLAIN.batch()])


def test_compact_takes_the_plan_of_now() -> None:
    model, session, optimizer = streamed(PLAIN, 2)
    early = session.derive()
    train(model, optimizer, [PLAIN.batch(seed=5)])
    with pytest.raises(PlanError, match="as it is now"):
        session.compact(early)
    _, other, _ = streamed(PLAIN, 0, "fixed")
    _, same_size, _ = streamed(PLAIN, 0, "fixed")
    for each, ids in ((other, [1, 2]), (same_size, [1, 3])):
        for table in each.tables:
            table.admit(torch.tensor(ids), torch.ones(2, dtype=torch.int64))
    with pytest.raises(PlanError, match="as it is now"):
        other.compact(same_size.derive())


def test_a_state_of_another_stream_is_refused() -> None:
    _, session, _ = streamed(PLAIN, 1, "fixed")
    state = session.state_dict()
    for other in (streamed(PLAIN, 1, "esapn")[1], streamed(WORLDS["unequal dims"], 1, "fixed")[1]):
        with pytest.raises(SessionError, match="this state is of a stream by 'fixed'"):
            other.load_state_dict(state)


def test_a_gradient_that_is_accumulated_is_that_of_every_backward_pass() -> None:
    """As with fused kernels, each backward pass trains rows; two forward passes may come before two backward passes."""
    model, session, _ = streamed(PLAIN, 1, es.Fixed(init_std=0.5, row_lr=0.1, rows="rowwise_adagrad"))
    model.train()
    features = PLAIN.features(8, 0)
    one, other = model.collection(features).values().sum(), model.collection(features).values().sum()
    before = [table.rows.read(torch.arange(len(table)))[0].rows for table in session.tables]
    assert [table.rows.steps for table in session.tables] == [1, 1]  # nothing yet
    one.backward()
    other.backward()
    for table, rows in zip(session.tables, before, strict=True):
        entries = table.find(features[table.spec.features[0]].values().unique())
        assert (table.rows.read(entries)[0].rows < rows[entries] - 0.05).all()


def test_a_batch_of_one_id_trains_every_algorithm() -> None:
    """Batch norm over the distinct ids of a batch has nothing to learn from one."""
    for algorithm in STREAMS:
        model, _, optimizer = streamed(PLAIN, 1, algorithm)
        batch = PLAIN.batch(4, seed=3)
        batch.sparse_features.values()[:] = 7
        assert train(model, optimizer, [batch])[0] > 0


def test_what_is_over_is_over() -> None:
    _, session, optimizer = streamed(PLAIN)
    session.compact(session.derive())
    for use in (session.derive, lambda: session.step(PLAIN.batch(seed=1)), lambda: session.attach(optimizer, [])):
        with pytest.raises(SessionError, match="this stream is over"):
            use()
