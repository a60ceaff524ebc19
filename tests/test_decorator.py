"""``@searchable`` above functions and classes, and finding the session again through whatever is put around a model."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import PLAIN, Around, Task, World, task, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.errors import SessionError, UnsupportedCollection
from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection

WIDTH = 16


@es.searchable(budget="40%")
def build(world: World = PLAIN, *, seed: int = 0) -> Task:
    """Build a task."""
    return task(world, seed)


@es.searchable(budget="40%")
class Model(Task):
    """A decorated class, in the spelling of ``super`` that looks its own name up."""

    def __init__(self, world: World = PLAIN) -> None:
        super(Model, self).__init__(world.collection(), WIDTH)  # noqa: UP008
        self.world = world


def test_the_default_algorithm_is_spectral() -> None:
    assert es.session(build()).config == es.Spectral()
    assert es.prepare(task(PLAIN, 0), budget="40%").config == es.Spectral()


class TwoTowers(Model):
    """A subclass that is not decorated and adds a collection when its base is through."""

    def __init__(self) -> None:
        super().__init__()
        self.second = PLAIN.collection()

    def forward(self, batch: Batch) -> Any:
        self.second(batch.sparse_features)
        return super().forward(batch)


class Heir(Model):
    """A subclass without an ``__init__`` of its own."""


class Mixin(nn.Module):
    """Comes before the decorated class, and adds a collection after it."""

    def __init__(self) -> None:
        super().__init__()
        self.added = PLAIN.collection()


class Mixed(Mixin, Model):
    pass


@es.searchable(budget="20%")
class Nested(nn.Module):
    """Builds decorated things on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.built, self.model = build(), Model()


def collections(model: nn.Module) -> int:
    return sum(isinstance(module, EmbeddingBagCollection) for module in model.modules())


def searched(model: nn.Module) -> int:
    return sum(isinstance(module, SearchableEmbeddingBagCollection) for module in model.modules())


def test_a_decorated_function_keeps_its_looks() -> None:
    assert (build.__name__, build.__doc__, build.__module__) == ("build", "Build a task.", __name__)
    assert list(inspect.signature(build).parameters) == ["world", "seed"]


def test_a_decorated_function_returns_a_searched_model() -> None:
    model = build(seed=3)
    assert searched(model) == 1
    assert es.session(model).budget == es.Budget("40%")
    assert torch.equal(model.over[0].weight, task(PLAIN, 3).over[0].weight)


def test_original_builds_without_a_search() -> None:
    for model in (build.original(PLAIN, seed=1), Model.original(PLAIN), TwoTowers.original(), Heir.original(PLAIN)):
        assert searched(model) == 0
        with pytest.raises(SessionError, match="no search on this"):
            es.session(model)


def test_original_is_of_the_class_it_is_called_on() -> None:
    assert type(TwoTowers.original()) is TwoTowers


def test_original_leaves_nested_decorated_things_alone() -> None:
    model = Nested.original()
    assert (searched(model), collections(model)) == (0, 2)


def test_a_decorated_class_stays_a_class() -> None:
    assert isinstance(Model, type)
    assert type(Model) is type
    assert issubclass(Heir, Model)
    assert isinstance(TwoTowers(), Model)
    assert (Model.__name__, Model.__qualname__) == ("Model", "Model")
    assert list(inspect.signature(Model).parameters) == ["world"]
    assert list(inspect.signature(Heir).parameters) == ["world"]


def test_arguments_reach_the_class() -> None:
    world = World(PLAIN.tables, longest_bag=3)
    assert Model(world=world).world is world


def test_a_decorated_class_is_pickled_by_name() -> None:
    for cls in (Model, Heir):
        assert pickle.loads(pickle.dumps(cls)) is cls


@pytest.mark.parametrize("make", [Model, TwoTowers, Heir, Mixed])
def test_constructing_prepares_once_after_the_outermost_init(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []

    def prepare(model: nn.Module, **options: Any) -> None:
        prepared.append(collections(model))

    monkeypatch.setattr("embsearch_plugin.decorator.prepare", prepare)
    model = make()
    assert prepared == [collections(model)]


@pytest.mark.parametrize(("make", "count"), [(Model, 1), (Heir, 1), (TwoTowers, 2), (Mixed, 2), (Nested, 2)])
def test_every_collection_is_searched(make: Callable[[], nn.Module], count: int) -> None:
    model = make()
    assert searched(model) == collections(model) == count
    assert es.session(model).original_bytes == count * 500 * 8 * 4


def test_only_the_outermost_construction_prepares() -> None:
    model = Nested()
    assert es.session(model).budget == es.Budget("20%")
    for part in (model.built, model.model):
        with pytest.raises(SessionError):
            es.session(part)


def test_a_subclass_may_have_options_of_its_own() -> None:
    @es.searchable(budget="5%")
    class Small(Model):
        pass

    class Smaller(Small):
        pass

    assert es.session(Small()).budget == es.session(Smaller()).budget == es.Budget("5%")
    assert es.session(Model()).budget == es.Budget("40%")


def test_a_class_hook_for_subclasses_still_runs() -> None:
    @es.searchable()
    class Registered(Model):
        names: dict[str, type] = {}  # noqa: RUF012

        def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.names[name] = cls

    class First(Registered, name="first"):
        pass

    assert Registered.names == {"first": First}
    assert searched(First()) == 1


def test_a_failed_construction_leaves_no_trace() -> None:
    @es.searchable()
    def fails() -> nn.Module:
        Model()
        raise RuntimeError("mine")

    @es.searchable()
    class Fails(Model):
        def __init__(self) -> None:
            super().__init__()
            raise RuntimeError("mine")

    for make in (fails, Fails, fails.original, Fails.original):
        with pytest.raises(RuntimeError, match="mine"):
            make()
        assert searched(Model()) == 1


def test_what_is_decorated_must_give_a_module() -> None:
    @es.searchable()
    def forgets_to_return() -> nn.Module:  # type: ignore[return]
        Model()

    with pytest.raises(SessionError, match=r"^forgets_to_return must return an nn\.Module; got NoneType\.$"):
        forgets_to_return()
    with pytest.raises(SessionError, match="got the class int"):
        es.searchable()(int)
    with pytest.raises(SessionError, match=r"prepare takes an nn\.Module; got str"):
        es.prepare("model")  # type: ignore[arg-type]
    with pytest.raises(SessionError, match=r"session takes an nn\.Module; got NoneType"):
        es.session(None)  # type: ignore[arg-type]


def test_a_misspelt_option_fails_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="algoritm"):
        es.searchable(algoritm="dnis")


@pytest.mark.parametrize("make", [build, Model])
def test_preparing_twice_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    session = es.session(model)
    with pytest.raises(UnsupportedCollection, match=r"'collection' is being searched already"):
        es.prepare(model)
    assert es.session(model) is session


def test_a_compact_model_has_no_session() -> None:
    model = build()
    session = es.session(model)
    optimizer = torch.optim.Adam(model.parameters())
    session.attach(optimizer, validation=[PLAIN.batch(seed=1)])
    train(model, optimizer, [PLAIN.batch()])
    session.step(PLAIN.batch(seed=1))
    session.compact(session.derive())
    with pytest.raises(SessionError, match=r"after compact\(\) the search is over"):
        es.session(model)


@pytest.mark.parametrize("make", [build, Model, TwoTowers])
def test_a_copy_is_the_same_model_without_a_session(make: Callable[[], nn.Module]) -> None:
    model = make()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), [PLAIN.batch()])
    copied = copy.deepcopy(model)
    with pytest.raises(SessionError):
        es.session(copied)
    assert es.session(model).model is model
    assert_equal(model, copied)


@pytest.mark.parametrize("make", [build, Model, TwoTowers])
def test_a_pickled_model_has_no_session(make: Callable[[], nn.Module]) -> None:
    model = make()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model)
    with pytest.raises(SessionError):
        es.session(loaded)
    assert_equal(model, loaded)


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    model.eval(), other.eval()
    assert torch.equal(model(PLAIN.batch())[0], other(PLAIN.batch())[0])
    other.train()
    other(PLAIN.batch())[0].backward()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, Around, lambda model: nn.ModuleList([nn.Linear(1, 1), Around(model)])]
)
def test_the_session_is_found_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = build()
    assert es.session(wrap(model)) is es.session(model)


def test_the_session_is_found_through_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = build()
        parallel = DistributedDataParallel(model)
        session = es.session(parallel)
        assert session is es.session(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        session.attach(optimizer, validation=[PLAIN.batch(seed=9)])
        train(parallel, optimizer, [PLAIN.batch(seed=i) for i in range(3)])
        assert session.step_count == 3
    finally:
        dist.destroy_process_group()


def test_two_searches_in_one_model_are_not_guessed_at() -> None:
    both = nn.ModuleList([build(), build()])
    with pytest.raises(SessionError, match="2 parts of this ModuleList are searched"):
        es.session(both)
    assert es.session(both[0]) is not es.session(both[1])
