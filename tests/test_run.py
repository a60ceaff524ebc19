"""The main job, in small: what it writes, that it can be stopped and resumed, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import embsearch_plugin as es
from embsearch_plugin.cli import main
from embsearch_plugin.data import criteo, movielens
from embsearch_plugin.data.planted import Planted
from embsearch_plugin.errors import NonFiniteLoss
from embsearch_plugin.recipes import Fused, Recipe, load_recipe
from embsearch_plugin.run import run
from embsearch_plugin.training import Epoch, Watcher

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = ["train.batch_size=256", "train.epochs=2", "search.algorithm.warm_up=5", "model.embedding_dim=8"]


def small(**train: object) -> Recipe:
    recipe = load_recipe(RECIPES / "demo.yaml", SMALL)
    planted = Planted(examples=4000, fields=4, rows=(60,), ranks=(2, 2, 1, 0), n_dense=3)
    return replace(recipe, data=planted, train=replace(recipe.train, **train))


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".safetensors" or path.stem == "model"}


@pytest.mark.parametrize("fused", [None, Fused("EXACT_ROWWISE_ADAGRAD", 0.05)])
def test_a_run_writes_what_it_promises(fused: Fused | None, tmp_path: Path) -> None:
    recipe = small(fused=fused)
    metrics = run(recipe, tmp_path)
    assert files_of(tmp_path) >= {"plan.json", "model.safetensors", "metrics.json", "recipe.yaml", "report.html"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    dense, compact = metrics["models"]
    assert compact["bytes"] <= metrics["budget"]["bytes"] == dense["bytes"] // 2
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    loaded = es.load(tmp_path, recipe.model.build(recipe.data.load().schema))
    assert sum(p.numel() for p in loaded.parameters()) == compact["params"]


class Killed(Exception):
    pass


class KilledAfter(Watcher):
    """Stops a run dead after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def epoch(self, name: str, row: Epoch) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


def timeless(folder: Path) -> object:
    """What a run found, without how long it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for row in [*metrics["models"], *(row for rows in metrics["stages"].values() for row in rows)]:
        row.pop("seconds")
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("fused", [None, Fused("EXACT_ROWWISE_ADAGRAD", 0.05)])
def test_a_run_killed_at_any_epoch_ends_as_if_it_had_not_been(fused: Fused | None, tmp_path: Path) -> None:
    recipe = small(fused=fused)
    run(recipe, tmp_path / "whole")
    epochs = sum(map(len, json.loads((tmp_path / "whole" / "metrics.json").read_text())["stages"].values()))
    for killed in range(1, epochs + 1):
        folder = tmp_path / str(killed)
        with pytest.raises(Killed):
            run(recipe, folder, watcher=KilledAfter(killed))
        run(recipe, folder, resume=True)
        assert timeless(folder) == timeless(tmp_path / "whole")
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(es.EmbsearchError, match="exists already and is not empty; nothing in it was touched"):
        run(small(), tmp_path)
    with pytest.raises(es.EmbsearchError, match="a run of another recipe"):
        run(small(), tmp_path, resume=True)
    assert files_of(tmp_path) == {"mine"}


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    class Broken(Planted):
        def load(self) -> object:
            data = super().load()
            data.dense[data.splits["train"][0]] = float("nan")
            return data

    recipe = small()
    with pytest.raises(NonFiniteLoss, match="in step .* of epoch 1 of dense"):
        run(replace(recipe, data=Broken(examples=4000, fields=4, rows=(60,), ranks=(2, 2, 1, 0), n_dense=3)), tmp_path)
    assert (tmp_path / "checkpoints" / "dense.safetensors").exists()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs_in_a_small_form(recipe: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "search.budget=50%"]
    if "ml1m" in recipe.stem:
        movielens.write_sample(tmp_path / "data")
        overrides.append(f"data.path={tmp_path / 'data'}")
    elif "criteo" in recipe.stem:
        criteo.write_sample(tmp_path / "train.txt.gz", rows=3000)
        overrides += [f"data.path={tmp_path / 'train.txt.gz'}", "data.rows=500"]
    else:
        overrides += ["data.examples=3000", "data.rows=[50]"]
    result = CliRunner().invoke(main, ["run", str(recipe), *overrides, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    again = CliRunner().invoke(main, ["report", str(tmp_path / "out")])
    assert again.exit_code == 0


def test_an_error_of_ours_is_a_message_without_a_traceback() -> None:
    result = CliRunner().invoke(main, ["run", "recipes/none.yaml"])
    assert result.exit_code == 1
    assert "RecipeError: cannot read the recipe recipes/none.yaml" in result.output
    assert "Traceback" not in result.output


def test_doctor_and_lists() -> None:
    assert "All good" in CliRunner().invoke(main, ["doctor"]).output
    assert "dnis" in CliRunner().invoke(main, ["list", "algorithms"]).output
    assert "torchrec_ebc" in CliRunner().invoke(main, ["list", "adapters"]).output


def test_importing_the_package_is_light() -> None:
    code = "import sys, embsearch_plugin; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_run_draws_nothing_from_the_callers_random_numbers_beyond_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run(small(epochs=1), tmp_path / "a")
    torch.manual_seed(2)
    run(small(epochs=1), tmp_path / "b")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
