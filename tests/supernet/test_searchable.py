"""The searchable collection: what it computes, and what it leaves as it was."""

import copy
import io
import itertools

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import DEVICE, PLAIN, SUM, WORLDS, World, dlrm, relative_error, searched, task, train
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.errors import InputError
from embsearch_plugin.supernet.cells import most_cells
from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection


def looked_up(collection: EmbeddingBagCollection, gates: dict[str, Tensor], features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """The reference: one example, one id, one row at a time. ``gates`` are per table and row, (V, D)."""
    result = {}
    bags = features.to_dict()
    for config in collection.embedding_bag_configs():
        weight = collection.embedding_bags[config.name].weight.float() * gates[config.name]
        for feature in config.feature_names:
            bag, rows = bags[feature], []
            offsets = [0, *bag.lengths().cumsum(0).tolist()]
            for start, stop in itertools.pairwise(offsets):
                total = weight.new_zeros(config.embedding_dim)
                for position in range(start, stop):
                    scale = bag.weights()[position] if collection.is_weighted() else 1.0
                    total = total + scale * weight[bag.values()[position]]
                mean = config.pooling == PoolingType.MEAN and stop > start
                rows.append(total / (stop - start) if mean else total)
            result[feature, config.name] = torch.stack(rows)
    return result


def gated(world: World) -> tuple[SearchableEmbeddingBagCollection, EmbeddingBagCollection, dict[str, Tensor]]:
    """A searchable collection with random gates, the original, and the gates of each row."""
    model, session, _ = searched(world)
    torch.manual_seed(5)
    session.set_gates([torch.rand_like(gate) for gate in session.gates])
    original = world.collection()
    original.load_state_dict(model.collection.state_dict())
    rows = {t.spec.name: g[t.blocks.lookup().long()] for t, g in zip(session.tables, session.gates, strict=True)}
    model.zero_grad()
    return model.collection, original, rows


@pytest.mark.parametrize("name", WORLDS)
def test_gates_at_one_change_nothing(name: str) -> None:
    world = WORLDS[name]
    model, session, _ = searched(world)
    session.set_gates([torch.ones_like(gate) for gate in session.gates])
    original = world.collection()
    original.load_state_dict(model.collection.state_dict())
    features = world.features(40, seed=77)
    got, expected = model.collection(features), original(features)
    assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
    assert got.values().dtype == expected.values().dtype
    assert relative_error(got.values(), expected.values()) <= (1e-3 if name == "half" else 1e-6)


@pytest.mark.parametrize("name", WORLDS)
def test_gates_multiply_the_rows_of_their_block(name: str) -> None:
    world = WORLDS[name]
    collection, original, rows = gated(world)
    features = world.features(20, seed=78)
    output = collection(features)
    expected = looked_up(original, rows, features)
    for slot in collection.slots:
        table = collection.tables[slot.table].name
        torch.testing.assert_close(
            output[slot.key], expected[slot.feature, table], atol=1e-2 if name == "half" else 1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["one id", "bags", "mean", "weighted", "shared feature", "unequal dims"])
def test_gradients_are_those_of_the_reference(name: str) -> None:
    world = WORLDS[name]
    collection, original, rows = gated(world)
    features = world.features(20, seed=79)
    slots = [(slot.feature, collection.tables[slot.table].name, slot.key) for slot in collection.slots]
    sum(collection(features)[key].square().sum() for _, _, key in slots).backward()
    expected = looked_up(original, rows, features)
    sum(expected[feature, table].square().sum() for feature, table, _ in slots).backward()
    for table in original.embedding_bags:
        got = collection.inner.embedding_bags[table].weight.grad
        torch.testing.assert_close(got, original.embedding_bags[table].weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["one id", "bags", "mean", "weighted", "shared feature", "unequal dims"])
def test_gradients_of_gates_are_those_of_the_reference(name: str) -> None:
    world = WORLDS[name]
    model, session, _ = searched(world)
    collection, features = model.collection, world.features(20, seed=80)
    original = world.collection()
    original.load_state_dict(collection.state_dict())
    leaves = [torch.rand_like(gate).requires_grad_() for gate in session.gates]
    with collection.searching(leaves):
        output = collection(features)
        loss = sum(output[slot.key].square().sum() for slot in collection.slots)
    got = torch.autograd.grad(loss, leaves)
    rows = {t.spec.name: g[t.blocks.lookup().long()] for t, g in zip(session.tables, leaves, strict=True)}
    reference = sum(value.square().sum() for value in looked_up(original, rows, features).values())
    for mine, theirs in zip(got, torch.autograd.grad(reference, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("columns", [8, 256])
@pytest.mark.parametrize("name", [name for name in WORLDS if name != "half"])
def test_fused_kernels_train_as_plain_tables_do(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embsearch_plugin.supernet.searchable.KERNEL_COLUMNS", columns)
    world, sgd = WORLDS[name], {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1}
    models = []
    for fused in (None, sgd):
        model, session, optimizer = searched(world, 3, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), fused=fused)
        torch.manual_seed(5)
        session.set_gates([torch.rand_like(gate) for gate in session.gates])
        session.detach()
        train(model, optimizer, (world.batch(seed=i) for i in range(3)))
        models.append(model)
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["several features", "shared feature"])
def test_where_blocks_of_many_tables_multiply_rows_are_gated_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = WORLDS[name]
    searchable, _, _ = gated(world)
    batch = world.features(16, seed=4)
    results = []
    for most in (64, 0):
        monkeypatch.setattr("embsearch_plugin.supernet.searchable.MOST_CELLS", most)
        searchable.zero_grad()
        output = searchable(batch).values()
        (output * torch.linspace(-1, 1, output.shape[1], device=output.device)).sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in searchable.parameters())])
    assert most_cells(searchable.slots, [len(gates) for gates in searchable.gates]) > 1
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_cells_that_multiply_cost_no_more_than_rows() -> None:
    tables = tuple((f"t{i}", 500, 8, ("f",), SUM) for i in range(5))
    searchable, _, _ = gated(World(tables, longest_bag=4))
    assert most_cells(searchable.slots, [len(gates) for gates in searchable.gates]) > 200
    assert searchable(World(tables, longest_bag=4).features(16, seed=1)).values().shape == (16, 40)


def test_state_dict_keeps_its_keys() -> None:
    original = dlrm().state_dict()
    model = dlrm(seed=3)
    es.prepare(model)
    assert list(model.state_dict()) == list(original)
    model.load_state_dict(original)
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding_bags\.t0"):
        model.load_state_dict({k: v for k, v in original.items() if "t0" not in k})


def test_parameters_stay_the_users_own() -> None:
    model = task(PLAIN)
    before = list(model.parameters())
    es.prepare(model)
    assert {id(p) for p in before} == {id(p) for p in model.parameters()}
    assert not any("gate" in name or "block" in name for name in model.state_dict())


@pytest.mark.parametrize("made", ["before", "after"])
def test_the_optimizer_may_be_made_before_or_after(made: str) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # Adam makes much of gradients that are mere rounding

    models = []
    for searching in (False, True):
        model = task(PLAIN)
        optimizer = make(model) if made == "before" or not searching else None
        if searching:
            es.prepare(model, algorithm=es.Dnis(warm_up=100))
        train(model, optimizer or make(model), (PLAIN.batch(seed=i) for i in range(4)))
        models.append(model)
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_aliases_and_several_collections_are_all_replaced() -> None:
    class Several(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = PLAIN.collection(), WORLDS["mean"].collection()
            self.alias = self.first
            self.nested = torch.nn.ModuleList([self.first])

    model = Several()
    session = es.prepare(model)
    assert model.first is model.alias is model.nested[0]
    assert type(model.first) is type(model.second) is SearchableEmbeddingBagCollection
    assert len(session.specs) == 4


@pytest.mark.parametrize("ids", [[-1], [200], [10**12], [3, -7, 500]])
@pytest.mark.parametrize("stage", ["warm-up", "search"])
def test_ids_without_a_row_are_named(ids: list[int], stage: str) -> None:
    model, _, _ = searched(PLAIN, steps=1 if stage == "warm-up" else 12)
    values = torch.tensor([*ids, *[0] * len(ids)], device=DEVICE)
    features = KeyedJaggedTensor(keys=["f0", "f1"], values=values, lengths=torch.ones_like(values))
    with pytest.raises(InputError, match=r"'f0' must be in \[0, 200\), the rows of table 't0'"):
        model.collection(features)


def test_a_missing_feature_is_named() -> None:
    model, _, _ = searched(PLAIN)
    with pytest.raises(InputError, match="lacks \\['f1'\\]"):
        model.collection(KeyedJaggedTensor(keys=["f0"], values=torch.tensor([1]), lengths=torch.tensor([1])).to(DEVICE))


@pytest.mark.parametrize("name", ["one id", "bags"])
def test_a_batch_of_one_is_looked_up_and_an_empty_one_is_named(name: str) -> None:
    model, _, _ = searched(WORLDS[name])
    assert model.collection(WORLDS[name].features(1, seed=1)).values().shape == (1, 16)
    with pytest.raises(InputError, match="at least one example"):
        model.collection(WORLDS[name].features(0, seed=1))


def test_empty_bags_only() -> None:
    model, _, _ = searched(WORLDS["bags"])
    features = KeyedJaggedTensor(
        keys=["f0", "f1"], values=torch.tensor([], dtype=torch.int64), lengths=torch.zeros(8, dtype=torch.int64)
    )
    assert model.collection(features.to(DEVICE)).values().abs().sum() == 0


def test_extra_features_are_ignored() -> None:
    model, _, _ = searched(PLAIN)
    features = PLAIN.features(4, seed=1)
    more = KeyedJaggedTensor(
        keys=[*features.keys(), "other"],
        values=torch.cat([features.values(), torch.full((4,), 10**6, device=DEVICE)]),
        lengths=torch.cat([features.lengths(), features.lengths().new_ones(4)]),
    )
    torch.testing.assert_close(model.collection(more).values(), model.collection(features).values())


def test_a_model_built_on_meta_is_searched() -> None:
    with torch.device("meta"):
        model = task(PLAIN)
        session = es.prepare(model, algorithm=es.Dnis(warm_up=2))
    model.to_empty(device=DEVICE)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.over[1].reset_running_stats()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(seed=50)])
    train(model, optimizer, (PLAIN.batch(seed=i) for i in range(5)))
    assert session.derive().size_bytes <= 0.1 * session.original_bytes


def test_copies_and_pickles_have_no_session() -> None:
    model, session, _ = searched(PLAIN)
    copied = copy.deepcopy(model)
    assert es.session(model) is session
    with pytest.raises(es.EmbsearchError, match="no search on this Task"):
        es.session(copied)
    torch.save(model.state_dict(), io.BytesIO())
