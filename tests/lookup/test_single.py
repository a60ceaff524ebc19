"""Rows of bags of one id: beside nn.EmbeddingBag on the ids that a table holds, forward and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, WORLDS, World, searched, train
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embsearch_plugin as es
from embsearch_plugin.lookup.single import is_single, rows_of

KEYS = ("a", "b")


def collection(**options: Any) -> EmbeddingBagCollection:
    tables = (EmbeddingBagConfig(5, 4, name=f"t_{key}", feature_names=[key], **options) for key in KEYS)
    return EmbeddingBagCollection(list(tables))


def features(lengths: list[int] | None = None) -> KeyedJaggedTensor:
    lengths = lengths or [1] * 6
    return KeyedJaggedTensor(list(KEYS), torch.arange(sum(lengths)) % 5, lengths=torch.tensor(lengths))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), partial=st.booleans())
def test_rows_and_gradients(data: st.DataObject, partial: bool) -> None:
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows, width, examples = (data.draw(st.integers(1, most)) for most in (6, 5, 9))
    weight = torch.randn(rows, width, generator=draw).requires_grad_()
    reads = [torch.randint(0, rows + 3 * partial, (examples,), generator=draw) for _ in range(2)]
    got = torch.cat([rows_of(weight, ids, partial=partial) for ids in reads], 1)
    padded = torch.cat([weight, torch.zeros(3, width)])
    expected = torch.cat([torch.stack([padded[i] for i in ids.tolist()]) for ids in reads], 1)
    assert torch.equal(got, expected)
    upstream = torch.randn(got.shape, generator=draw)
    mine, theirs = (torch.autograd.grad((output * upstream).sum(), weight)[0] for output in (got, expected))
    torch.testing.assert_close(mine, theirs)


def test_a_row_that_is_no_number_does_not_reach_what_is_left_out() -> None:
    assert torch.equal(rows_of(torch.full((2, 3), torch.nan), torch.tensor([2, 7]), partial=True), torch.zeros(2, 3))


def test_an_id_without_a_row() -> None:
    for ids in ([3], [-1]):
        with pytest.raises(IndexError):
            rows_of(torch.zeros(3, 2), torch.tensor(ids))


def test_what_is_looked_up_here() -> None:
    assert is_single(collection(), features())
    assert not is_single(collection(), features([1, 1, 2, 1, 0, 1]))  # as many ids as bags
    assert not is_single(collection(), features([1, 1, 0, 1, 1, 1]))
    assert not is_single(collection(data_type=DataType.FP16), features())
    weighted = EmbeddingBagCollection(collection().embedding_bag_configs(), is_weighted=True)
    assert not is_single(weighted, features())
    other = features()
    assert not is_single(collection(), KeyedJaggedTensor(other.keys(), other.values().short(), lengths=other.lengths()))
    indices = list(KEYS), torch.tensor([[0, 1, 1]] * 2)
    expanded = KeyedJaggedTensor(other.keys(), other.values(), lengths=other.lengths(), inverse_indices=indices)
    assert not is_single(collection(), expanded)
    with torch.inference_mode():
        without_autograd = features()
    assert not is_single(collection(), without_autograd)


def test_what_transforms_a_forward_sees_the_collections_own() -> None:
    """A trace would keep what is right for bags of one id only, and torch.func cannot go through it."""
    tables, batch = collection().requires_grad_(False), features()

    def look_up(scale: Tensor) -> Tensor:
        return tables(batch).values().sum() * scale if not is_single(tables, batch) else torch.tensor(torch.nan)

    assert torch.func.grad(look_up)(torch.ones(())) == tables(batch).values().sum()
    assert not make_fx(look_up)(torch.ones(()))(torch.ones(())).isnan()
    with pytest.warns(torch.jit.TracerWarning):
        assert not torch.jit.trace(look_up, torch.ones(()), check_trace=False)(torch.ones(())).isnan()


def test_sparse_gradients_stay_sparse() -> None:
    sparse = collection()
    for bag in sparse.embedding_bags.values():
        bag.sparse = True
    assert not is_single(sparse, features())
    with torch.no_grad():
        assert is_single(sparse, features())


CHANGES: dict[str, Callable[[EmbeddingBagCollection, nn.EmbeddingBag], Any]] = {
    "hook": lambda whole, _: whole.register_forward_hook(lambda *_: None),
    "hook of a table": lambda _, table: table.register_forward_pre_hook(lambda *_: None),
    "backward hook of a table": lambda _, table: table.register_full_backward_hook(lambda *_: None),
    "parametrized": lambda _, table: nn.utils.parametrize.register_parametrization(table, "weight", nn.Identity()),
    "another module": lambda whole, _: whole.embedding_bags.update({"t_a": nn.Identity()}),
    "forward": lambda whole, _: setattr(whole, "forward", whole.forward),
    "forward of a table": lambda _, table: setattr(table, "forward", table.forward),
    "more rows": lambda _, table: setattr(table, "weight", nn.Parameter(torch.ones(7, 4))),
    "a row of zeros": lambda _, table: setattr(table, "padding_idx", 2),
    "largest norm": lambda _, table: setattr(table, "max_norm", 1.0),
    "gradient by frequency": lambda _, table: setattr(table, "scale_grad_by_freq", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_collection_that_somebody_changed_is_left_to_itself(change: Callable[..., Any]) -> None:
    changed = collection()
    change(changed, changed.embedding_bags["t_a"])
    assert not is_single(changed, features())


def test_global_hooks_are_called() -> None:
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not is_single(collection(), features())
    assert is_single(collection(), features())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a CPU only rows are gathered without nn.EmbeddingBag")
@pytest.mark.parametrize("world", [WORLDS["one id"], WORLDS["shared feature, one id"], WORLDS["unequal dims"]])
@pytest.mark.parametrize("algorithm", [es.Dnis(warm_up=2, lr=0.1), es.Magnitude()])
def test_training_is_as_by_the_collection(world: World, algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, compact and train on: losses as where every lookup is nn.EmbeddingBag's."""

    def losses() -> list[float]:
        model, session, optimizer = searched(world, algorithm=algorithm)
        session.compact(session.derive())
        return train(model, optimizer, (world.batch(seed=i) for i in range(5)))

    with monkeypatch.context() as without:
        without.setattr(nn.EmbeddingBag, "forward", None)
        quick = losses()
    for module in ("supernet.searchable", "compact.collection"):
        monkeypatch.setattr(f"embsearch_plugin.{module}.is_single", lambda *_: False)
    assert quick == pytest.approx(losses(), rel=1e-4)
    assert len(set(quick)) > 1
