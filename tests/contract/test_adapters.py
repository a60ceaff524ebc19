"""What must hold for every adapter. A new adapter is tested here once it has examples, and fails until it has."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support import DEVICE, WORLDS, relative_error, stored_bytes, task
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from embsearch_plugin.plan import TablePlan
from embsearch_plugin.plugins import adapters, build_compact, build_supernet, find_collections
from embsearch_plugin.space import SearchSpace, cut_tables

# Per adapter, per example: a function that builds a model, and one that gives its collection's input for a seed.
Example = tuple[Callable[[], nn.Module], Callable[[int], Any]]
EXAMPLES: Mapping[str, Mapping[str, Example]] = {
    "torchrec_ebc": {
        name: (lambda world=world: task(world), lambda seed, world=world: world.features(30, seed))
        for name, world in WORLDS.items()
    },
}
everywhere = pytest.mark.parametrize(
    ("adapter", "example"), [(adapter, example) for adapter, examples in EXAMPLES.items() for example in examples]
)


def outputs(answer: KeyedTensor) -> dict[str, Tensor]:
    return {key: answer[key] for key in answer.keys()}  # noqa: SIM118


def test_every_adapter_has_examples() -> None:
    assert set(adapters()) == set(EXAMPLES)


@everywhere
def test_finding_changes_nothing_and_names_its_finder(adapter: str, example: str) -> None:
    model = EXAMPLES[adapter][example][0]()
    before = {name: id(module) for name, module in model.named_modules()}
    found = find_collections(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {collection.adapter for collection in found} == {adapter}
    weights = sum(p.nbytes for collection in found for p in collection.module.parameters())
    assert sum(table.size_bytes for collection in found for table in collection.tables) == weights


@everywhere
def test_the_supernet_answers_as_the_original_and_keeps_its_parameters(adapter: str, example: str) -> None:
    build, features = EXAMPLES[adapter][example]
    (found,) = find_collections(build())
    original = copy.deepcopy(found.module)
    supernet = build_supernet(found, ())
    supernet.set_blocks(cut_tables(found.tables, [torch.arange(t.rows) for t in found.tables], SearchSpace()), DEVICE)
    got, expected = outputs(supernet(features(3))), outputs(original(features(3)))
    assert list(got) == list(expected)
    for key, value in got.items():
        assert value.dtype == expected[key].dtype
        assert relative_error(value, expected[key]) <= (1e-3 if example == "half" else 1e-6)
    assert {id(p) for p in supernet.parameters()} == {id(p) for p in found.module.parameters()}
    assert supernet.state_dict().keys() == original.state_dict().keys()


@everywhere
def test_the_compact_form_of_a_whole_plan_has_the_originals_shape_and_bytes(adapter: str, example: str) -> None:
    build, features = EXAMPLES[adapter][example]
    model = build()
    (found,) = find_collections(model)
    plans = [TablePlan.nested(t, [t.dim], [torch.arange(t.rows, dtype=torch.int32)]) for t in found.tables]
    compact = build_compact(found, plans)
    expected = found.module(features(4))
    got = compact(features(4))
    assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
    assert got.values().shape == expected.values().shape
    assert got.values().dtype == expected.values().dtype
    found.replace_in(model, compact)
    assert stored_bytes(model) == sum(table.size_bytes for table in found.tables)
