"""Rows of bags of one id: beside nn.EmbeddingBag on the ids that a table holds, forward and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import WORLDS, World, searched, train
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.supernet.single import Single, is_single, rows_of, single

KEYS = ("a", "b")


def collection(**options: Any) -> EmbeddingBagCollection:
    tables = (EmbeddingBagConfig(5, 4, name=f"t_{key}", feature_names=[key], **options) for key in KEYS)
    return EmbeddingBagCollection(list(tables))


def features(lengths: list[int] | None = None) -> KeyedJaggedTensor:
    lengths = lengths or [1] * 6
    return KeyedJaggedTensor(list(KEYS), torch.arange(sum(lengths)) % 5, lengths=torch.tensor(lengths))


def slow(lookup: Single) -> Tensor:
    """Return the rows one by one."""
    weight = lookup.bag.weight
    return torch.stack([weight[i] if i < len(weight) else torch.zeros(weight.shape[1]) for i in lookup.ids.tolist()])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_and_gradients(data: st.DataObject) -> None:
    draw, examples = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))), data.draw(st.integers(1, 9))
    bags = [nn.EmbeddingBag(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))) for _ in range(3)]
    lookups = []
    for bag in [*bags, bags[0]]:  # one is looked up twice
        partial = data.draw(st.booleans())
        ids = torch.randint(0, bag.num_embeddings + 3 * partial, (examples,), generator=draw)
        lookups.append(Single(bag, ids, partial))
    got, expected = rows_of(lookups), torch.cat([slow(lookup) for lookup in lookups], 1)
    assert torch.equal(got, expected)
    weights = torch.randn(got.shape, generator=draw)
    tables = [bag.weight for bag in bags]
    everything = sum(table.sum() for table in tables)  # so that there is a gradient where all ids are left out
    theirs = torch.autograd.grad((expected * weights).sum() + everything, tables)
    for mine, other in zip(torch.autograd.grad((got * weights).sum(), tables), theirs, strict=True):
        torch.testing.assert_close(mine + 1, other)


def test_a_row_that_is_no_number_does_not_reach_what_is_left_out() -> None:
    bag = nn.EmbeddingBag(2, 3)
    nn.init.constant_(bag.weight, torch.nan)
    assert torch.equal(rows_of([Single(bag, torch.tensor([2, 7]), partial=True)]), torch.zeros(2, 3))


def test_a_frozen_table_gets_no_gradient() -> None:
    frozen, trained = nn.EmbeddingBag(3, 2), nn.EmbeddingBag(3, 2)
    frozen.weight.requires_grad_(False)
    rows_of([Single(bag, torch.tensor([0, 2]), partial=False) for bag in (frozen, trained)]).sum().backward()
    assert frozen.weight.grad is None and trained.weight.grad.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_an_empty_bag_is_zero_and_trains_nothing() -> None:
    bag, plain, lengths = nn.EmbeddingBag(3, 2), nn.EmbeddingBag(3, 2, mode="sum"), torch.tensor([0, 1, 0, 1])
    plain.load_state_dict(bag.state_dict())
    for ids in (torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64)):
        size = lengths * bool(ids.numel())
        got, expected = rows_of([single(bag, ids, size)]), plain(ids, size.cumsum(0) - size)
        assert torch.equal(got, expected)
        for output in (got, expected):
            output.sum().backward()
        assert torch.equal(bag.weight.grad, plain.weight.grad)


def test_an_id_without_a_row() -> None:
    for ids in ([3], [-1]):
        with pytest.raises(IndexError):
            rows_of([Single(nn.EmbeddingBag(3, 2), torch.tensor(ids), partial=False)])


def test_what_is_looked_up_here() -> None:
    assert is_single(collection(), features())
    assert not is_single(collection(), features([1, 1, 2, 1, 0, 1]))  # as many ids as bags
    assert is_single(collection(), features([1, 1, 0, 1, 1, 1]))
    assert not is_single(collection(data_type=DataType.FP16), features())
    weighted = EmbeddingBagCollection(collection().embedding_bag_configs(), is_weighted=True)
    assert not is_single(weighted, features())


def test_sparse_gradients_stay_sparse() -> None:
    sparse = collection()
    for bag in sparse.embedding_bags.values():
        bag.sparse = True
    assert not is_single(sparse, features())
    with torch.no_grad():
        assert is_single(sparse, features())


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.register_forward_hook(lambda *_: None),
        lambda c: c.embedding_bags["t_a"].register_forward_pre_hook(lambda *_: None),
        lambda c: c.embedding_bags["t_a"].register_full_backward_hook(lambda *_: None),
        lambda c: nn.utils.parametrize.register_parametrization(c.embedding_bags["t_a"], "weight", nn.Identity()),
        lambda c: c.embedding_bags.update({"t_a": nn.Identity()}),
    ],
    ids=["hook", "hook of a table", "backward hook of a table", "parametrized", "another module"],
)
def test_a_collection_that_somebody_looks_into_is_left_to_itself(change: Callable[[EmbeddingBagCollection], Any]) -> None:
    changed = collection()
    change(changed)
    assert not is_single(changed, features())


def test_global_hooks_are_called() -> None:
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not is_single(collection(), features())
    assert is_single(collection(), features())


@pytest.mark.parametrize("world", [WORLDS["one id"], WORLDS["shared feature, one id"], WORLDS["unequal dims"]])
@pytest.mark.parametrize("algorithm", [es.Dnis(warm_up=2, lr=0.1), es.Magnitude()])
def test_training_is_as_by_the_collection(world: World, algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, compact and train on: losses as where every lookup is nn.EmbeddingBag's."""

    def losses() -> list[float]:
        model, session, optimizer = searched(world, algorithm=algorithm)
        session.compact(session.derive())
        return train(model, optimizer, (world.batch(seed=i) for i in range(5)))

    quick = losses()
    for module in ("supernet.searchable", "compact.collection"):
        monkeypatch.setattr(f"embsearch_plugin.{module}.is_single", lambda *_: False)
    assert quick == pytest.approx(losses(), rel=1e-4)
    assert len(set(quick)) > 1
