"""The plugin manager refuses what it cannot make sense of, by name, and a repaired plugin works at once."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from embsearch_adapters import torchrec_ebc
from support import PLAIN, searched, task
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.collection import FoundCollection
from embsearch_plugin.errors import AdapterConflict, NoCollectionFound, UnknownAlgorithm
from embsearch_plugin.plugins import adapters, algorithm_config, algorithms, find_collections, manager


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    """Each test has a manager of its own."""
    manager.cache_clear()
    algorithms.cache_clear()
    yield
    manager.cache_clear()
    algorithms.cache_clear()


@dataclass(frozen=True, kw_only=True)
class Mine(AlgorithmConfig):
    name: ClassVar[str] = "mine"


@dataclass(frozen=True, kw_only=True)
class SecondDnis(AlgorithmConfig):
    name: ClassVar[str] = "dnis"


def registering(*configs: type[AlgorithmConfig]) -> object:
    """Return a plugin that registers ``configs``."""

    @es.hookimpl
    def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
        return configs

    return SimpleNamespace(embsearch_register_algorithms=embsearch_register_algorithms)


def taking(path: str) -> object:
    """Return an adapter that takes the module at ``path``."""

    @es.hookimpl
    def embsearch_find_collections(model: nn.Module) -> Sequence[FoundCollection]:
        return [FoundCollection("greedy", (path,), model.get_submodule(path), ())]

    return SimpleNamespace(embsearch_find_collections=embsearch_find_collections)


def test_an_algorithm_is_a_name_or_a_config() -> None:
    assert algorithm_config("dnis") == es.Dnis()
    assert algorithm_config(es.Dnis(lr=1.0)).lr == 1.0  # type: ignore[attr-defined]
    assert algorithm_config(Mine()) == Mine()  # also one that nobody registered


def test_an_unknown_algorithm_is_told_what_there_is() -> None:
    with pytest.raises(UnknownAlgorithm, match=r"^'dniss'\. Did you mean 'dnis'\? Available: .*dnis"):
        es.prepare(task(PLAIN), algorithm="dniss")
    with pytest.raises(UnknownAlgorithm, match=r"a name or a config object, such as es\.Dnis\(\); got <class .*Dnis'>"):
        algorithm_config(es.Dnis)  # type: ignore[arg-type]


def test_a_registered_algorithm_is_there() -> None:
    manager().register(registering(Mine))
    assert algorithms()["mine"] is Mine
    assert algorithm_config("mine") == Mine()


def test_two_algorithms_of_one_name_are_both_named() -> None:
    manager().register(registering(SecondDnis))
    for _ in range(2):  # the failure is not remembered as a result
        with pytest.raises(AdapterConflict, match="'dnis' is registered twice") as error:
            algorithms()
        assert all(config.__name__ in str(error.value) for config in (es.Dnis, SecondDnis))


@pytest.mark.parametrize("path", ["collection", "collection.embedding_bags.t1"])
def test_two_adapters_that_take_the_same_table_are_an_error(path: str) -> None:
    manager().register(taking(path), name="greedy")
    with pytest.raises(AdapterConflict, match="two collections hold the same table") as error:
        find_collections(task(PLAIN))
    assert all(text in str(error.value) for text in ("'torchrec_ebc'", "'greedy'", "'collection'", f"{path!r}"))


def test_collections_that_share_a_table_are_refused() -> None:
    first, second = PLAIN.collection(), PLAIN.collection()
    second.embedding_bags["t0"] = first.embedding_bags["t0"]
    with pytest.raises(AdapterConflict, match="give each collection its own tables"):
        find_collections(nn.ModuleDict({"first": first, "second": second}))


def test_a_collection_is_built_by_exactly_one_adapter() -> None:
    manager().unregister(name="torchrec_ebc")
    manager().register(taking("collection"), name="greedy")
    with pytest.raises(AdapterConflict, match=r"exactly one adapter must build 'collection', found by 'greedy'; 0 did\."):
        es.prepare(task(PLAIN))


@pytest.mark.parametrize("form", ["searchable", "compact"])
def test_an_adapter_that_builds_something_else_is_named_and_the_model_stays(form: str) -> None:
    plan = searched(PLAIN)[1].derive() if form == "compact" else None

    @es.hookimpl
    def build(collection: FoundCollection) -> nn.Module:
        return nn.Identity()

    @es.hookimpl
    def find(model: nn.Module) -> Sequence[FoundCollection]:
        return [replace(found, adapter="greedy") for found in torchrec_ebc.embsearch_find_collections(model)]

    manager().unregister(name="torchrec_ebc")
    hooks = {"embsearch_find_collections": find, "embsearch_build_supernet": build, "embsearch_build_compact": build}
    manager().register(SimpleNamespace(**hooks), name="greedy")
    model = task(PLAIN)
    with pytest.raises(AdapterConflict, match=r"'collection', found by the adapter 'greedy', must be a .*; got a Identity"):
        es.prepare(model) if plan is None else es.apply(model, plan)
    assert type(model.collection) is EmbeddingBagCollection


def test_a_model_without_a_collection_is_shown_what_looks_like_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse = nn.ModuleDict({f"t{i}": nn.EmbeddingBag(9, 4) for i in range(4)})
            self.dense = nn.Linear(4, 1)

    with pytest.raises(NoCollectionFound) as error:
        es.prepare(Model())
    assert str(error.value) == (
        f"no embedding collection in Model (7 modules; adapters tried: {', '.join(adapters())}).\n"
        "  Looks like one but no adapter takes it: 'sparse.t0' (torch.nn.modules.sparse.EmbeddingBag), "
        "'sparse.t1' (torch.nn.modules.sparse.EmbeddingBag), 'sparse.t2' (torch.nn.modules.sparse.EmbeddingBag), .... "
        "Put its tables into a torchrec EmbeddingBagCollection."
    )
    with pytest.raises(NoCollectionFound, match="prepare the module that holds the EmbeddingBagCollection"):
        es.prepare(nn.Linear(1, 1))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Return a function that installs a package ``theirs`` with a plugin of some name and source; gives its module."""

    def install(name: str, source: str) -> str:
        module = f"theirs_{len(list(tmp_path.glob('*.py')))}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(f"import embsearch_plugin as es\n{source}\n")
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[embsearch]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return module

    return install


MISSPELT = "@es.hookimpl\ndef embsearch_register_algoritms(): return []"
OF_A_SESSION = "@es.hookimpl\ndef embsearch_after_step(metrics): pass"
WRONG_ARGUMENT = "@es.hookimpl\ndef embsearch_report_rows(plans): return {}"
WORKING = "@es.hookimpl\ndef embsearch_report_rows(plan): return {}"


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        pytest.param("theirs", MISSPELT, "unknown hook 'embsearch_register_algoritms'", id="misspelt hook"),
        pytest.param("theirs", OF_A_SESSION, "unknown hook 'embsearch_after_step'", id="hook of a session"),
        pytest.param("theirs", WRONG_ARGUMENT, r"Argument\(s\) \{'plans'\} are declared", id="unknown argument"),
        pytest.param("theirs", "import no_such_module", "ModuleNotFoundError: .*'no_such_module'", id="broken import"),
        pytest.param("theirs", "1 / 0", "ZeroDivisionError", id="error at import"),
        pytest.param("dnis", WORKING, "name already registered: dnis", id="name of a built-in plugin"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    install: Callable[[str, str], str], name: str, source: str, expected: str
) -> None:
    module = install(name, source)
    with pytest.raises(es.EmbsearchError, match=expected) as error:
        algorithms()
    assert str(error.value).startswith(f"the plugin {name!r} ({module}, of theirs) cannot be used: ")
    assert str(error.value).endswith("2) pip uninstall theirs.")
    install("theirs", WORKING)
    assert "dnis" in algorithms()
    assert manager().has_plugin("theirs")


def test_an_algorithm_is_for_searches_or_for_streams() -> None:
    with pytest.raises(UnknownAlgorithm, match="'mine' must derive from SearchConfig or StreamConfig"):
        es.prepare(task(PLAIN), algorithm=Mine())
