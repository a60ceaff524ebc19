"""The streaming collection: against a plain EmbeddingBagCollection whose rows are the same."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import MEAN, PLAIN, STREAMS, SUM, WORLDS, Task, World, relative_error, streamed, task
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.errors import InputError
from embsearch_plugin.streaming.collection import StreamingEmbeddingBagCollection
from embsearch_plugin.streaming.session import StreamSession

FLOAT32 = {name: world for name, world in WORLDS.items() if name != "half"}
everywhere = pytest.mark.parametrize("world", FLOAT32)


def admitted(world: World, seed: int = 0) -> tuple[Task, StreamSession]:
    """A FIXED stream that has seen one batch and learned nothing, in training mode."""
    model = task(world)
    session = es.prepare(model, algorithm=es.Fixed(row_lr=0.05, init_std=0.5))
    model.train().collection(world.features(40, seed))
    return model, session


def twin(world: World, session: StreamSession) -> EmbeddingBagCollection:
    """A plain collection with the stream's rows; those of ids that never came are zero."""
    plain = world.collection()
    with torch.no_grad():
        for table in session.tables:
            weight = plain.embedding_bags[table.spec.name].weight.zero_()
            weight[table.ids.ids] = table.rows.read(torch.arange(len(table)))[0].rows
    return plain


@everywhere
def test_it_answers_as_a_plain_collection_with_the_same_rows(world: str) -> None:
    model, session = admitted(FLOAT32[world])
    plain = twin(FLOAT32[world], session)
    for training in (True, False):
        model.train(training)
        for seed in (0, 7):  # in evaluation mode, most ids of the second are not there
            features = FLOAT32[world].features(40, seed)
            if training and seed:
                continue  # they would be admitted
            got, expected = model.collection(features), plain(features)
            assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
            assert got.values().dtype == torch.float32
            assert relative_error(got.values(), expected.values()) < 1e-6


@everywhere
def test_rows_learn_as_those_of_a_plain_collection_under_sparse_adam(world: str) -> None:
    model, session = admitted(FLOAT32[world])
    plain = twin(FLOAT32[world], session)
    optimizer = torch.optim.SparseAdam(list(plain.parameters()), lr=0.05)
    features = FLOAT32[world].features(40, 0)
    random = torch.Generator().manual_seed(1)
    for _ in range(4):
        outputs = model.collection(features).values()
        wanted = torch.randn(outputs.shape, generator=random)
        (outputs - wanted).square().mean().backward()
        optimizer.zero_grad()
        (plain(features).values() - wanted).square().mean().backward()
        for weight in plain.parameters():
            weight.grad = weight.grad.to_sparse(1)
        optimizer.step()
    learned = twin(FLOAT32[world], session)
    for name, weight in learned.named_parameters():
        expected = plain.get_parameter(name)
        seen = weight.any(1)
        torch.testing.assert_close(weight[seen], expected[seen], rtol=1e-4, atol=1e-5)


def bags(values: list[list[int]], keys: list[str]) -> KeyedJaggedTensor:
    flat = torch.tensor([each for bag in values for each in bag], dtype=torch.int64)
    return KeyedJaggedTensor(keys=keys, values=flat, lengths=torch.tensor([len(bag) for bag in values]))


def test_any_integer_is_an_id() -> None:
    model = task(PLAIN)
    session = es.prepare(model, algorithm="fixed")
    ids = [-(2**63), -1, 10**12, 2**63 - 1]
    model.train().collection(bags([[each] for each in ids] * 2, ["f0", "f1"]))
    assert [table.ids.ids.tolist() for table in session.tables] == [ids, ids]


@pytest.mark.parametrize("algorithm", STREAMS)
def test_the_order_of_the_features_does_not_matter(algorithm: str) -> None:
    world = WORLDS["shared feature"]
    outputs = []
    for keys in (["f", "g"], ["g", "f"], ["g", "more", "f"]):
        model, _, _ = streamed(world, algorithm=algorithm)
        features = world.features(20, 3, ["f", "g"])
        parts = {**features.to_dict(), "more": features["g"]}
        jagged = KeyedJaggedTensor(
            keys=keys,
            values=torch.cat([parts[key].values() for key in keys]),
            lengths=torch.cat([parts[key].lengths() for key in keys]),
        )
        outputs.append(model.eval().collection(jagged).values())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    with pytest.raises(InputError, match="it lacks"):
        model.collection(bags([[1]], ["f"]))


@pytest.mark.parametrize("algorithm", STREAMS)
@pytest.mark.parametrize("pooling", [SUM, MEAN])
def test_a_bag_is_the_base_and_how_far_its_ids_are_from_it(algorithm: str, pooling: Any) -> None:
    world = replace(PLAIN, tables=(("t0", 200, 8, ("f0",), pooling),), longest_bag=4)
    model, session, _ = streamed(world, algorithm=algorithm)
    collection, (table,) = model.eval().collection, session.tables
    known, (unknown,) = table.ids.ids[:3].tolist(), [777]
    with torch.no_grad():
        one = {each: collection(bags([[each]], ["f0"])).values()[0] for each in [*known, unknown]}
        nothing = collection(bags([[]], ["f0"])).values()[0]
        together = collection(bags([known, [*known, unknown], [known[0]] * 3], ["f0"])).values()
    torch.testing.assert_close(one[unknown], nothing)
    if algorithm != "esapn":
        assert not nothing.any()
    far = sum(one[each] - nothing for each in known)
    divided = (1, 1, 1) if pooling == SUM else (3, 4, 3)
    for got, distance, by in zip(together, (far, far, 3 * (one[known[0]] - nothing)), divided, strict=True):
        torch.testing.assert_close(got, nothing + distance / by, rtol=1e-4, atol=1e-5)


def everything(session: StreamSession) -> list[Tensor]:
    """All tensors of the model, of its gradients, and of the session's state."""
    found: list[Tensor] = [*session.model.state_dict().values()]
    found += [p.grad for p in session.model.parameters() if p.grad is not None]

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                walk(each)

    walk(session.state_dict())
    return [each.clone() for each in found]


@pytest.mark.parametrize("algorithm", STREAMS)
def test_forward_passes_of_the_plugins_own_leave_no_trace(algorithm: str) -> None:
    model, session, _ = streamed(PLAIN, algorithm=algorithm)
    torch.manual_seed(5)
    before, drawn = everything(session), torch.get_rng_state()
    session.evaluate(PLAIN.batch(seed=77))
    model.train()
    session.evaluate(PLAIN.batch(seed=78))
    if algorithm in ("autoemb", "darts"):
        session.gradients(PLAIN.batch(seed=79), lambda: [next(iter(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(before, everything(session), strict=True))
    assert torch.equal(drawn, torch.get_rng_state())
    model.eval()
    model(PLAIN.batch(seed=80))  # nor does evaluation by the owner
    assert all(torch.equal(a, b) for a, b in zip(before, everything(session), strict=True))


def test_what_was_looked_up_is_told_per_table() -> None:
    world = WORLDS["several features"]
    model, session, _ = streamed(world, algorithm="fixed")
    features = world.features(12, 5)
    model.eval().collection(features)
    for table, lookup in zip(session.tables, session.lookups, strict=True):
        slow = [
            (int(each), example)
            for feature in table.spec.features
            for example, bag in enumerate(features[feature].to_dense())
            for each in bag.tolist()
        ]
        assert lookup.examples.tolist() == [example for _, example in slow]
        assert lookup.entries.tolist() == table.find(torch.tensor([each for each, _ in slow])).tolist()


def test_outputs_of_every_algorithm_are_on_the_models_device() -> None:
    """On the meta device, an operation on tensors of two devices fails as it would on a GPU."""
    for algorithm in STREAMS:
        model, session, _ = streamed(PLAIN, algorithm=algorithm)
        collection = model.collection.to("meta")
        assert isinstance(collection, StreamingEmbeddingBagCollection)
        for training in (True, False):
            entries = torch.cat([torch.arange(10), torch.tensor([-1])])
            for table in session.tables:
                read = table.read(entries, collection.device, training=training, searching=False)
                assert (read.device.type, read.shape) == ("meta", (11, 8))


@pytest.mark.parametrize("algorithm", STREAMS)
def test_a_copy_of_the_model_is_a_model_of_its_own(algorithm: str) -> None:
    model, session, optimizer = streamed(PLAIN, algorithm=algorithm)
    copied, batch = copy.deepcopy(model), PLAIN.batch(seed=50)
    expected = model.eval()(batch)[1][1]
    for seed in range(60, 63):
        model.train()
        optimizer.zero_grad()
        model(PLAIN.batch(seed=seed))[0].backward()
        optimizer.step()
    assert torch.equal(copied.eval()(batch)[1][1], expected)
    assert not torch.equal(model.eval()(batch)[1][1], expected)
    with pytest.raises(es.EmbsearchError, match="no search"):
        es.session(copied)
    before = everything(session)
    copied.train()(batch)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(session), strict=True))


@pytest.mark.parametrize("algorithm", STREAMS)
def test_a_pickled_model_has_no_session_and_answers_the_same(algorithm: str) -> None:
    model, _, _ = streamed(PLAIN, algorithm=algorithm)
    batch = PLAIN.batch(seed=50)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded.eval()(batch)[1][1], model.eval()(batch)[1][1])
    with pytest.raises(es.EmbsearchError, match="no search"):
        es.session(loaded)
