"""A model and loaders of the user's own, named in a recipe."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embsearch_plugin.errors import DataError, ModelError, RecipeError
from embsearch_plugin.plain import to_plain
from embsearch_plugin.recipes import load_recipe, parse_recipe
from embsearch_plugin.run import run
from embsearch_plugin.study.conduct import Conductor
from embsearch_plugin.training import Watcher

MODULE = """
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import embsearch_plugin as es
from embsearch_plugin.data.planted import Planted

DATA = Planted(examples=2000, fields=4, rows=(60,), ranks=(2, 2, 1, 0), n_dense=3).load()


class Loader:
    def __init__(self, split, size):
        self.batches, self.sampler, self.epochs = DATA.batches(split, size), self, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def loaders(size=256):
    return {split: Loader(split, size) for split in ("train", "validation", "test")}


def dataset():
    return DATA


@es.searchable(algorithm="dnis", budget="10%")
def build_model(dim=8):
    tables = [
        EmbeddingBagConfig(name=f"t_{f.name}", num_embeddings=f.rows, embedding_dim=dim, feature_names=[f.name])
        for f in DATA.schema.fields
    ]
    return DLRMTrain(DLRM(EmbeddingBagCollection(tables), 3, [8, dim], [8, 1]))


def build_for(schema):
    return build_model.original(dim=4 * len(schema.fields))


def build_even(dim=8):
    if dim % 2:
        raise ValueError("dim must be even")
    return build_model.original(dim)


def build_later():
    import a_package_that_is_not_there


def absent():
    raise FileNotFoundError(2, "No such file or directory", "clicks.parquet")


def nothing():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package in the working directory, as a user has it."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_package.my_module"
    for name in ("my_package", "my_package.my_module"):
        sys.modules.pop(name, None)


def content(**more: Any) -> dict[str, Any]:
    return {
        "data": "my_package.my_module:loaders",
        "model": "my_package.my_module:build_model",
        "train": {"epochs": 1},
        "search": {"algorithm": "magnitude", "baselines": [], "budgets": ["50%"]},
        **more,
    }


def test_a_run_on_a_model_and_loaders_of_ones_own(module: str, tmp_path: Path) -> None:
    recipe = parse_recipe(content(), "mine")
    metrics = run(recipe, tmp_path / "out")
    assert [cell["status"] for cell in metrics["cells"]] == ["done", "done"]
    assert metrics["original_bytes"] == 4 * 60 * 8 * 4
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe == parse_recipe(to_plain(recipe), "itself")


def test_options_and_the_schema_are_handed_on(module: str) -> None:
    recipe = parse_recipe(
        content(
            model={"name": f"{module}:build_model", "options": {"dim": 16}},
            data={"name": f"{module}:loaders", "options": {"size": 500}},
        ),
        "mine",
    )
    data = recipe.data.load()
    batches = data.batches("train", 1)
    assert len(next(iter(batches)).labels) == 500 and len(batches) == 4
    assert list(batches) and batches._loader.epochs == [0, 0]  # the first iteration was not finished
    assert sum(p.shape[-1] == 16 for p in recipe.model.build(data.schema).parameters() if p.dim() == 2 and len(p) == 60) == 4
    other = parse_recipe(content(model=f"{module}:build_for", data=f"{module}:dataset"), "mine")
    assert any(p.shape == (60, 16) for p in other.model.build(other.data.load().schema).parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "my_package.my_module:build"}, "cannot import 'my_package.my_module:build'.*@ recipe.model"),
        ({"data": "my_packag:loaders"}, "cannot import 'my_packag:loaders', .*No module named.*@ recipe.data"),
        ({"model": "my_package.my_module:DATA"}, "must be a function or a class; got PlantedDataset"),
        ({"data": {"name": "my_package.my_module:loaders", "task": "clck"}}, "task must be one of click, rating, top-k"),
    ],
)
def test_what_cannot_be_imported_is_listed_with_its_path(module: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content(**more), "mine")


def test_functions_that_return_something_else(module: str) -> None:
    wrong = parse_recipe(content(model=f"{module}:nothing", data=f"{module}:nothing"), "mine")
    with pytest.raises(DataError, match="must return a loader for each of train, validation, test; got 3"):
        wrong.data.load()
    with pytest.raises(ModelError, match="must return an nn.Module; got int"):
        wrong.model.build(None)
    wrong = parse_recipe(
        content(
            model={"name": f"{module}:build_model", "options": {"dm": 3}},
            data={"name": f"{module}:loaders", "options": {"x": 1}},
        ),
        "mine",
    )
    with pytest.raises(ModelError, match="cannot be built with .*dm"):
        wrong.model.build(None)
    with pytest.raises(DataError, match="cannot be made with .*x"):
        wrong.data.load()


def test_a_study_of_a_model_of_ones_own_prunes_what_the_model_refuses(module: str, tmp_path: Path) -> None:
    study = {"fields": {"model.options.dim": [8, 9]}, "sampler": "BruteForceSampler"}
    recipe = parse_recipe(content(model=f"{module}:build_even", study=study), "mine")
    found = Conductor(recipe, tmp_path / "out", Watcher()).run(2)
    reasons = {trial["params"]["model.options.dim"]: trial["reason"] for trial in found["trials"]}
    assert reasons[8] is None and "cannot be built with {'dim': 9}: dim must be even" in reasons[9]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"model": "my_package.my_module:build_later"}, ModuleNotFoundError),
        ({"data": "my_package.my_module:absent"}, FileNotFoundError),
    ],
)
def test_an_error_in_ones_own_code_is_not_taken_for_the_storages(
    module: str, more: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    recipe = parse_recipe(content(**more, study={"fields": {"train.lr": None}}), "mine")
    with pytest.raises(error):
        Conductor(recipe, tmp_path / "out", Watcher()).run(1)
