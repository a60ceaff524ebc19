"""Tables on fused kernels: the same on one kernel and on several."""

import copy
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from support import PLAIN, WORLDS, searched, task
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

import embsearch_plugin as es
from embsearch_plugin.errors import SessionError
from embsearch_plugin.fused import FusedEmbeddingBags

ADAGRAD = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "stochastic_rounding": False}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("columns", [1, 8, 16, 1000])
def test_several_kernels_do_what_one_does(name: str, columns: int) -> None:
    world = WORLDS[name]
    plain = world.collection()
    one = FusedEmbeddingBags(copy.deepcopy(plain), ADAGRAD)
    several = FusedEmbeddingBags(copy.deepcopy(plain), ADAGRAD, kernel_columns=columns, ids_checked=True)
    for seed in range(3):
        features = world.features(20, seed)
        mine, theirs = several(features), one(features)
        assert mine.keys() == theirs.keys()
        torch.testing.assert_close(mine.values(), theirs.values(), atol=0, rtol=0)
        for output in (mine, theirs):
            output.values().square().sum().backward()
    for mine_weight, weight in zip(several.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine_weight, weight, atol=0, rtol=0)
    for table, state in one.optimizer_states().items():
        for key, tensor in state.items():
            torch.testing.assert_close(several.optimizer_states()[table][key], tensor, atol=0, rtol=0)


def test_fused_kernels_of_replicas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = task(PLAIN)
    es.prepare(model, fused={"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1})
    monkeypatch.setattr("embsearch_plugin.distributed.world_size", lambda: 2)
    with pytest.raises(SessionError, match="replicas would drift apart"):
        model(PLAIN.batch())


def test_tables_are_dealt_evenly() -> None:
    collection = FusedEmbeddingBags(WORLDS["unequal dims"].collection(), ADAGRAD, kernel_columns=16)
    assert [len(kernel.split_embedding_weights()) for kernel in collection.kernels] == [1, 2]
    assert collection.kernels_in_order


def test_mixed_pooling_needs_the_output_put_in_order() -> None:
    world = WORLDS["unequal dims"]
    mixed = world.tables[0], (*world.tables[1][:4], WORLDS["mean"].tables[0][4]), world.tables[2]
    collection = FusedEmbeddingBags(type(world)(mixed).collection(), ADAGRAD)
    assert not collection.kernels_in_order


@pytest.mark.parametrize("other", [(torch.optim.SGD, {"lr": 0.2}), (torch.optim.Adagrad, {"lr": 0.1})])
def test_tables_of_a_collection_marked_for_different_optimizers_are_named(other: Any) -> None:
    model = task(PLAIN)
    first, second = model.collection.parameters()
    apply_optimizer_in_backward(torch.optim.SGD, [first], {"lr": 0.1})
    apply_optimizer_in_backward(other[0], [second], other[1])
    es.prepare(model)
    with pytest.raises(SessionError, match=r"alike.*; 'embedding_bags\.t0\.weight' has .* 'embedding_bags\.t1\.weight' has"):
        model(PLAIN.batch())


def rates_of(collection: FusedEmbeddingBags) -> set[float]:
    return {round(kernel.get_learning_rate(), 6) for kernel in collection.kernels}


def test_a_learning_rate_that_was_lowered_stays_so_in_a_state_and_in_compact_tables() -> None:
    model, session, _ = searched(PLAIN, fused=ADAGRAD)
    for kernel in model.collection.inner.kernels:
        kernel.set_learning_rate(0.001)
    again, resumed, _ = searched(PLAIN, steps=0, fused=ADAGRAD)
    resumed.load_state_dict(session.state_dict())
    assert rates_of(again.collection.inner) == {0.001}
    session.compact(session.derive())
    assert rates_of(model.collection.chunks) == {0.001}
