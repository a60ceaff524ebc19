"""Searchable and compact models under torch.fx, whose recorded graph computes what the model does."""

import pytest
import torch
from support import WORLDS, Around, Told, default_optimizer, task, train
from torch import Tensor, fx, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es


class Columns(nn.Module):
    """A module that can be traced but for its collection."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        output: Tensor = self.collection(features).values()
        return output + 1


@pytest.mark.parametrize("form", ["searchable", "compact"])
def test_a_collection_is_a_leaf_of_a_graph(form: str) -> None:
    world = WORLDS["mean"]
    model = task(world)
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1), budget="40%")
    told = Told()
    session.register(told)
    optimizer = default_optimizer(world)(model.parameters())
    session.attach(optimizer, validation=[world.batch(16, seed=9)])
    train(model, optimizer, [world.batch(16, seed=seed) for seed in range(3)])
    if form == "compact":
        session.compact(session.derive())
    before = len(told.steps)
    columns = Columns(model.collection)
    graph = fx.symbolic_trace(columns)
    assert len(told.steps) == before  # recording is no step of the loop
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["collection"]
    features = world.features(16, seed=5)
    assert torch.equal(graph(features), columns(features))


def test_a_searched_model_inside_another_is_traced_without_a_step() -> None:
    model = task(WORLDS["mean"])
    session = es.prepare(model, algorithm=es.Dnis(warm_up=1))
    told = Told()
    session.register(told)
    assert fx.symbolic_trace(Around(model))
    assert not told.steps
