"""The stream of validation batches: it never ends, and nobody else's random numbers change by it."""

import random
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from support import DEVICE, PLAIN, moved, tables_of, task, train
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import embsearch_plugin as es
from embsearch_plugin.errors import AttachError
from embsearch_plugin.search.validation import ValidationStream

NUMBERS = TensorDataset(torch.arange(10))


class Noisy(Dataset[Tensor]):
    """Draws from every global random state for each example."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand())]).float()


class ShuffledByPython(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(random.sample(range(10), 10))


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: [torch.tensor([i]) for i in range(10)],
    "in order": lambda: DataLoader(NUMBERS, batch_size=3),
    "shuffling": lambda: DataLoader(NUMBERS, batch_size=3, shuffle=True),
    "generator": lambda: DataLoader(NUMBERS, batch_size=3, shuffle=True, generator=torch.Generator()),
    "sampler": lambda: DataLoader(NUMBERS, batch_size=3, sampler=RandomSampler(NUMBERS, generator=torch.Generator())),
    "replacement": lambda: DataLoader(NUMBERS, batch_size=3, sampler=RandomSampler(NUMBERS, True, 100)),
    "augmenting": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "shuffled by Python": lambda: DataLoader(ShuffledByPython(), batch_size=3),
}


def taken(stream: ValidationStream, count: int) -> list[float]:
    """Take some batches; return the numbers in them."""
    batches = (stream.next() for _ in range(count))
    tensors = (batch[0] if isinstance(batch, list) else batch for batch in batches)
    return [number for tensor in tensors for number in tensor.flatten().tolist()]


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("name", LOADERS)
def test_no_random_state_changes_over_passes(name: str) -> None:
    before = random_states()
    stream = ValidationStream(LOADERS[name](), 0)
    for _ in range(13):
        stream.next()
        assert random_states() == before


@pytest.mark.parametrize(
    "loader_with",
    [
        lambda generator: DataLoader(NUMBERS, batch_size=3, shuffle=True, generator=generator),
        lambda generator: DataLoader(NUMBERS, batch_size=3, sampler=RandomSampler(NUMBERS, generator=generator)),
    ],
)
def test_a_generator_that_training_may_share_is_left_alone(loader_with: Callable[[torch.Generator], Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    taken(ValidationStream(loader_with(generator), 0), 9)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", LOADERS)
def test_a_stream_goes_on_where_it_stopped(name: str) -> None:
    stream = ValidationStream(LOADERS[name](), 3)
    taken(stream, 6)
    state, expected = stream.state_dict(), taken(stream, 9)
    torch.rand(5), random.random(), np.random.rand()  # another process has other random states
    resumed = ValidationStream(LOADERS[name](), 3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert taken(resumed, 9) == expected


@pytest.mark.parametrize("position", [0, 1, 3, 4, 5, 8])
def test_every_position_can_be_resumed(position: int) -> None:
    stream = ValidationStream(LOADERS["shuffling"](), 0)
    taken(stream, position)
    state, expected = stream.state_dict(), taken(stream, 6)
    assert state in ({"passes": position // 4, "taken": position % 4}, {"passes": position // 4 - 1, "taken": 4})
    stream.load_state_dict(state)
    assert taken(stream, 6) == expected


def test_each_pass_has_all_batches_in_an_order_of_its_own() -> None:
    stream = ValidationStream(LOADERS["shuffling"](), 0)
    passes = [taken(stream, 4) for _ in range(4)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len(set(map(tuple, passes))) == 4
    again, other = ValidationStream(LOADERS["shuffling"](), 0), ValidationStream(LOADERS["shuffling"](), 1)
    assert taken(again, 4) == passes[0] != taken(other, 4)


def test_batches_of_a_pass_do_not_share_their_random_numbers() -> None:
    numbers = taken(ValidationStream(LOADERS["augmenting"](), 0), 8)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("loader", [[], DataLoader(NUMBERS, batch_size=20, drop_last=True)])
def test_an_empty_loader_is_refused(loader: Iterable[Any]) -> None:
    with pytest.raises(AttachError, match=r"gave no batch.*\n  Possible solutions: 1\) drop_last=False"):
        ValidationStream(loader, 0).next()


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        (iter([1]), "list_iterator"),
        ((i for i in range(3)), "generator"),
        (islice([1], 1), "islice"),
        (iter(DataLoader(NUMBERS)), "_SingleProcessDataLoaderIter"),
        (None, "NoneType"),
        (NUMBERS, "TensorDataset"),
    ],
)
def test_what_ends_for_good_is_refused(loader: Any, kind: str) -> None:
    with pytest.raises(AttachError, match=rf"must start anew when it ends; got a {kind}\.\n.*not iter\(loader\)"):
        ValidationStream(loader, 0)


def test_training_draws_the_same_numbers_with_and_without_search_steps() -> None:
    states = []
    for warm_up in (2, 100):
        model = task(PLAIN)
        session = es.prepare(model, algorithm=es.Dnis(warm_up=warm_up))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [PLAIN.batch(seed=i) for i in range(3)]
        session.attach(optimizer, validation=DataLoader(batches, batch_size=None, shuffle=True))
        train(model, optimizer, [PLAIN.batch(seed=i) for i in range(8)])
        states.append((random_states(), bool(session.search_steps)))
    assert [searched for _, searched in states] == [True, False]
    assert states[0][0] == states[1][0]


def test_first_batches_of_a_loader_with_persistent_workers_keep_the_streams_place() -> None:
    loader = DataLoader(range(8), batch_size=None, num_workers=1, persistent_workers=True)
    stream = ValidationStream(loader, 0)
    seen = [stream.next() for _ in range(3)]
    assert stream.first(2) == [0, 1]
    assert [*seen, *(stream.next() for _ in range(6))] == [0, 1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize("given_as", ["validation", "training", "frequencies"])
def test_a_loops_own_pass_over_a_loader_with_persistent_workers_goes_on(given_as: str) -> None:
    loader = DataLoader([PLAIN.batch(seed=i).to("cpu") for i in range(6)], None, num_workers=1, persistent_workers=True)
    model = task(PLAIN)
    counted = loader if given_as == "frequencies" else None
    session = es.prepare(model, algorithm=es.Dnis(warm_up=2, xi=0.01), frequencies=counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loaders = {"validation": [PLAIN.batch(seed=9)]} | ({given_as: loader} if given_as != "frequencies" else {})
    session.attach(optimizer, **loaders)
    assert len(train(model, optimizer, (batch.to(DEVICE) for batch in islice(loader, 20)))) == 6
    assert session.search_steps == 5


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_counting_a_loader_changes_no_random_state(shuffle: bool, generator: torch.Generator | None) -> None:
    batches = [PLAIN.batch(seed=i) for i in range(3)]
    loader = DataLoader(batches, batch_size=None, shuffle=shuffle, generator=generator)
    session = es.prepare(task(PLAIN), algorithm=es.Dnis(warm_up=0), frequencies=loader)
    before = random_states(), generator and generator.get_state().tolist()
    session.step(PLAIN.batch(seed=9))
    assert (random_states(), generator and generator.get_state().tolist()) == before


def test_counting_a_loader_is_none_of_the_loops_passes() -> None:
    """Fused kernels of some optimizers take every forward with gradients for a step."""
    model = task(PLAIN)
    loader = [PLAIN.batch(seed=i) for i in range(3)]
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1), frequencies=loader)
    graphs: list[bool] = []
    model.collection.inner.register_forward_hook(lambda module, inputs, output: graphs.append(torch.is_grad_enabled()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.attach(optimizer, validation=[PLAIN.batch(seed=9)])
    train(model, optimizer, [PLAIN.batch(seed=5)])
    assert session.search_steps == 1 and model.collection.forwards == 1
    assert len(graphs) == 5 and sum(graphs) == 1  # the loop's one, three that count, and that of the search step


def test_a_loader_that_fails_while_it_is_counted_leaves_the_loop_as_it_was() -> None:
    def failing() -> Any:
        yield PLAIN.batch(seed=1)
        raise OSError("the disk is gone")

    class Batches:
        def __iter__(self) -> Any:
            return failing()

    model = task(PLAIN)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1), frequencies=Batches())
    with pytest.raises(OSError, match="the disk is gone"):
        _ = session.frequencies
    before = tables_of(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), [PLAIN.batch(seed=5)])
    assert moved(model, before)


def test_an_objective_that_differentiates_serves_a_loader_that_is_counted() -> None:
    def penalized(model: Any, batch: Any) -> Any:
        batch.dense_features.requires_grad_()
        loss, (_, logits, labels) = model(batch)
        (gradient,) = torch.autograd.grad(loss, batch.dense_features, create_graph=True)
        return loss + gradient.square().sum(), logits, labels

    session = es.prepare(task(PLAIN), objective=penalized, frequencies=[PLAIN.batch(seed=1)])
    assert sum(int(counts.sum()) for counts in session.frequencies) == 64
