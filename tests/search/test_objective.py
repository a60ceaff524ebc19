"""What a model may return, moving a batch, and a forward that leaves no trace."""

import random
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import PLAIN, dlrm
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from embsearch_plugin.autocast import Autocast
from embsearch_plugin.errors import ObjectiveError
from embsearch_plugin.randomness import private_random
from embsearch_plugin.search.objective import move, outcome_of, train_task, untouched

LOSS, LOGITS, LABELS = torch.tensor(0.5), torch.zeros(4), torch.ones(4)


def returned(value: Any) -> Any:
    return outcome_of(lambda model, batch: value, nn.Linear(1, 1), None)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param((LOSS, (LOSS, LOGITS, LABELS)), id="train task"),
        pytest.param((LOSS, LOGITS, LABELS), id="objective"),
        pytest.param((LOSS.reshape(1), LOGITS, LABELS), id="loss of shape (1,)"),
        pytest.param(namedtuple("Out", "loss logits labels")(LOSS, LOGITS, LABELS), id="named tuple"),
    ],
)
def test_right_returns(value: Any) -> None:
    outcome = returned(value)
    assert outcome.loss.shape == ()
    assert (outcome.logits is LOGITS, outcome.labels is LABELS) == (True, True)


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (LOSS, "a tensor of shape ()"),
        (None, "a NoneType"),
        ((), "()"),
        ([LOSS, LOGITS, LABELS], "a list"),
        ({"loss": LOSS}, "a dict"),
        ((LOSS, LOGITS), "(a tensor of shape (), a tensor of shape (4,))"),
        ((0.5, LOGITS, LABELS), "(a float, a tensor of shape (4,), a tensor of shape (4,))"),
        ((LOSS, (LOSS, LOGITS)), "(a tensor of shape (), (a tensor of shape (), a tensor of shape (4,)))"),
        ((LOSS, (None, LOGITS, None)), "(a tensor of shape (), (a NoneType, a tensor of shape (4,), a NoneType))"),
        ((LOSS, [LOSS, LOGITS, LABELS]), "(a tensor of shape (), a list)"),
        ((LOGITS, LOGITS, LABELS), "a loss of shape (4,), not one number"),
    ],
)
def test_wrong_returns_are_described(value: Any, described: str) -> None:
    with pytest.raises(ObjectiveError) as error:
        returned(value)
    assert str(error.value) == (
        "Linear must return `loss, (loss, logits, labels)` for a batch, TorchRec's convention; "
        f"got {described}.\n  Possible solutions: 1) prepare the train task around the model (as DLRMTrain)  "
        "2) give objective=, a function (model, batch) -> (loss, logits, labels), to searchable or prepare."
    )


def test_a_model_that_does_not_take_a_batch_is_told_of_the_convention() -> None:
    model = dlrm().model  # takes dense_features and sparse_features
    with pytest.raises(ObjectiveError, match=r"DLRM must return .* got a TypeError: .*'sparse_features'") as error:
        outcome_of(train_task, model, PLAIN.batch())
    assert isinstance(error.value.__cause__, TypeError)


def test_an_error_of_the_users_own_objective_is_raised_as_it_is() -> None:
    def mine(model: nn.Module, batch: Any) -> Any:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        outcome_of(mine, nn.Linear(1, 1), None)


Pair = namedtuple("Pair", "left right")


@dataclass
class Fields:
    left: Any
    right: Any = 0
    derived: Any = field(init=False, default=None)


class Bag(dict[str, Any]):
    note = "a dict with more to it"


META = torch.device("meta")


def is_moved(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device == META


def test_batches_of_every_form_are_moved_and_keep_their_type() -> None:
    one = torch.ones(2)
    nested = {"a": [one, (one, "text")], "b": Pair(one, 3), "c": Fields(one, [one])}
    got = move(nested, META)
    assert all(map(is_moved, (got["a"][0], got["a"][1][0], got["b"].left, got["c"].left, got["c"].right[0])))
    assert (got["a"][1][1], got["b"].right, type(got["b"]), type(got["c"])) == ("text", 3, Pair, Fields)
    assert nested["a"][0] is one  # the batch itself is left alone


@pytest.mark.parametrize("form", [OrderedDict, Bag, lambda items: defaultdict(list, items)])
def test_dicts_of_other_types_stay_what_they_are(form: Callable[[dict[str, Any]], Any]) -> None:
    batch = form({"a": torch.ones(1), "b": 1})
    got = move(batch, META)
    assert (type(got), list(got), is_moved(got["a"]), batch["a"].device.type) == (type(batch), ["a", "b"], True, "cpu")


def test_a_torchrec_batch_is_moved_by_its_own_method() -> None:
    got = move(PLAIN.batch(), META)
    assert isinstance(got, Batch)
    assert all(map(is_moved, (got.dense_features, got.sparse_features.values(), got.labels)))


@pytest.mark.parametrize("batch", [None, "text", 3, np.ones(2), Fields, SimpleNamespace(to=torch.ones(1))])
def test_what_cannot_be_moved_stays(batch: Any) -> None:
    assert move(batch, META) is batch


class Careless(nn.Module):
    """Changes its buffers in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.no_affine = nn.BatchNorm1d(3, momentum=None)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("lazy", None)
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0]))
        self.register_buffer("shared", self.steps[1:])

    def forward(self, values: Tensor) -> Tensor:
        self.steps += 1
        self.replaced = self.replaced + 1
        self.lazy = torch.ones(1)
        self.nan = None
        self.register_buffer("late", torch.ones(1))
        return self.no_affine(self.norm(values + torch.rand(3) + random.random() + np.random.rand()))


def traces(model: nn.Module) -> list[Any]:
    """Everything that must be as before: which tensors the buffers are, their bits, and the random states."""
    buffers = [
        (name, id(b), None if b is None else b.numpy().tobytes()) for m in model.modules() for name, b in m._buffers.items()
    ]
    return [buffers, torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def test_an_untouched_model_is_the_same_bit_for_bit() -> None:
    model = Careless()
    model(torch.randn(8, 3))
    del model.late
    model.lazy = model.nan = None
    before, state = traces(model), list(model.state_dict())
    for seed in range(3):
        with untouched(model, [], seed):
            model(torch.randn(8, 3))
            assert traces(model)[0] != before[0]
        assert traces(model) == before
        assert list(model.state_dict()) == state
    assert int(model.norm.num_batches_tracked) == 1


def test_an_untouched_model_is_restored_after_an_error() -> None:
    model = Careless()
    before = traces(model)
    with pytest.raises(RuntimeError, match="mine"), untouched(model, [], 0):
        model(torch.randn(8, 3))
        raise RuntimeError("mine")
    assert traces(model) == before


def test_excluded_modules_are_not_copied() -> None:
    model = nn.ModuleDict({"tables": Careless(), "rest": Careless()})
    with untouched(model, [model["tables"]], 0):
        model["tables"](torch.ones(2, 3))
        model["rest"](torch.ones(2, 3))
    assert (int(model["tables"].norm.num_batches_tracked), int(model["rest"].norm.num_batches_tracked)) == (1, 0)


def drawn() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


@pytest.mark.parametrize("seed", [0, -1, 2**40, 10**30])
def test_private_random_numbers_come_from_the_seed_and_leave_no_trace(seed: int) -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with private_random(seed):
        first = drawn()
    assert drawn() == expected
    with private_random(seed):
        assert drawn() == first
    with private_random(seed + 1):
        assert not set(drawn()) & set(first)


def test_private_random_restores_after_an_error_and_nests() -> None:
    before = traces(nn.Identity())
    with pytest.raises(RuntimeError), private_random(0):
        first = drawn()
        with private_random(1):
            drawn()
        second = drawn()
        raise RuntimeError
    with private_random(0):
        assert drawn() + drawn() == first + second
    assert traces(nn.Identity()) == before


def test_other_generators_are_private_too() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with private_random(5, [generator]):
        assert torch.equal(torch.rand(2, generator=generator), torch.rand(2))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_repeated(enabled: bool) -> None:
    with torch.autocast("cpu", torch.float16, enabled=enabled):
        seen = Autocast.now("cpu")
    with seen.again():
        assert Autocast.now("cpu") == seen == Autocast("cpu", torch.float16, enabled)
    assert not torch.is_autocast_enabled("cpu")
