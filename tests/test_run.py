"""The main job, in small: what it writes, that it can be stopped and resumed, and what it refuses."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import embsearch_plugin as es
from embsearch_plugin.algorithms.magnitude import Magnitude
from embsearch_plugin.algorithms.uniform import Uniform
from embsearch_plugin.cells import slug
from embsearch_plugin.cli import main
from embsearch_plugin.data import avazu, criteo, kkbox, movielens, movielens_csv
from embsearch_plugin.data.dataset import Split, TabularBatches, TabularDataset
from embsearch_plugin.data.planted import Planted
from embsearch_plugin.errors import NonFiniteLoss
from embsearch_plugin.evaluation import evaluate
from embsearch_plugin.models.fm import Fm
from embsearch_plugin.models.neumf import NeuMf
from embsearch_plugin.recipes import OPTIMIZERS, Fused, Recipe, Tune, load_recipe
from embsearch_plugin.report.headline import headline
from embsearch_plugin.report.text import results_markdown
from embsearch_plugin.run import run
from embsearch_plugin.run_folder import opened
from embsearch_plugin.tasks import TASKS
from embsearch_plugin.training import Epoch, Watcher

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = ["train.batch_size=256", "train.epochs=2", "search.algorithm.warm_up=5", "model.embedding_dim=8"]
ONE_CELL_EACH = ["train.epochs=1", "search.budgets=[50%]", "seeds=[0]", "tune={}"]
FEW_ALLOCATIONS = {
    "baselines": [
        "search.algorithm.temperatures=[0.4]",
        "search.baselines=[{name: random, draws: 2}, {name: random, by: block, draws: 2}]",
    ],
    "grid": ["search.algorithm.dims=[1, 2, 4]"],
    "random": ["search.algorithm.draws=2", "search.baselines=[{name: random, by: block, draws: 2}]"],
    "mde": ["search.algorithm.temperatures=[0.2, 0.8]", "search.algorithm.block_counts=[1, 3]"],
    "magnitude": ["search.algorithm.every=5"],
    "m_nis": ["search.baselines=[{name: nis, mode: se, warm_up: 5}]"],
    "searchers": [
        "search.baselines=[{name: autodim, candidates: [2, 8]}, {name: sam, candidates: [2, 8]}, "
        "{name: magnitude, rounds: 2, warm_up: 5, every: 5}, {name: magnitude, fine_grained: true}]",
    ],
    "ncf_nis": ["search.baselines=[{name: nis, mode: se, warm_up: 5, quality: recall@1}, uniform]"],
    "rating_all": [
        "search.baselines=[{name: grid, dims: [2, 4]}, {name: random, by: block, draws: 2}, "
        "{name: mde, temperatures: [0.4], block_counts: [2]}]",
    ],
    "spectral": ["search.algorithm.rivals=[1]"],
}
"""Overrides for recipes of many trainings, by the end of their name."""

DATA = Planted(examples=4000, fields=4, rows=(60,), ranks=(2, 2, 1, 0), n_dense=3)
ITERATIVE = Magnitude(rounds=2, every=2, warm_up=0)


def small(search: Mapping[str, object] | None = None, train: Mapping[str, object] | None = None, **more: object) -> Recipe:
    recipe = load_recipe(RECIPES / "demo.yaml", SMALL)
    return replace(
        recipe,
        data=DATA,
        search=replace(recipe.search, **(search or {})),
        train=replace(recipe.train, **(train or {})),
        **more,
    )


def by_place(metrics: dict[str, object], **wanted: object) -> list[dict[str, object]]:
    return [cell for cell in metrics["cells"] if all(cell[name] == value for name, value in wanted.items())]


@pytest.mark.parametrize("fused", [None, Fused("EXACT_ROWWISE_ADAGRAD", 0.05)])
def test_a_run_writes_what_it_promises(fused: Fused | None, tmp_path: Path) -> None:
    recipe = small(train={"fused": fused})
    metrics = run(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "recipe.yaml", "report.html", "cells"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert [cell["method"] for cell in metrics["cells"]] == ["dense", "dnis", "uniform", "magnitude"]
    dense, *compact = metrics["cells"]
    assert dense["bytes"] == metrics["original_bytes"]
    for cell in compact:
        assert cell["bytes"] <= metrics["budgets"][0]["bytes"] == metrics["original_bytes"] // 2
        loaded = es.load(tmp_path / cell["folder"], recipe.model.build(DATA.load().schema))
        assert sum(p.numel() for p in loaded.parameters()) == cell["params"]
        assert evaluate(loaded, DATA.load().batches("test", 256)) == pytest.approx(cell["test"], abs=1e-6)
    assert not list(tmp_path.glob("cells/**/checkpoints"))


@pytest.mark.parametrize("fused", [None, Fused("EXACT_ROWWISE_ADAGRAD", 0.05)])
def test_every_method_is_trained_by_the_same_optimizer(fused: Fused | None, tmp_path: Path) -> None:
    """With fused kernels the tables of a method that never trained before its plan are fused too."""
    rates = []
    for rate in (0.05, 0.5):
        train = {"fused": fused and replace(fused, learning_rate=rate), "lr": 0.003 if fused else rate / 10}
        metrics = run(small({"baselines": (Uniform(), Magnitude(), ITERATIVE)}, train), tmp_path / str(rate))
        rates.append([cell["validation"]["log_loss"] for cell in metrics["cells"]])
    assert all(one != other for one, other in zip(*rates, strict=True))


def test_a_plan_that_serves_two_budgets_is_retrained_once(tmp_path: Path) -> None:
    stages: list[str] = []

    class Listening(Watcher):
        def stage(self, name: str, *_: object) -> None:
            stages.append(name)

    search = {"algorithm": es.AutoDim(candidates=(2, 4), every=2), "baselines": (), "budgets": ("90%", "80%", "30%")}
    metrics = run(small({**search, "space": es.SearchSpace(align=1)}), tmp_path, watcher=Listening())
    large, same, less = by_place(metrics, method="autodim")
    assert [name for name in stages if "retrain" in name] == ["autodim 90% retrain", "autodim 30% retrain"]
    stages.clear()
    search = {"algorithm": es.Spectral(rivals=()), "baselines": (), "budgets": ("90%", "80%"), "strict": False}
    one, other = by_place(run(small(search), tmp_path / "own rule", watcher=Listening()), method="spectral")
    assert [name for name in stages if "fine-tune" in name] == ["spectral 90% fine-tune"]
    assert other == one | {"budget": "80%", "folder": other["folder"]}
    assert same == large | {"budget": "80%", "folder": same["folder"]}
    assert less["bytes"] < same["bytes"]
    loaded = es.load(tmp_path / same["folder"], small().model.build(DATA.load().schema))
    assert evaluate(loaded, DATA.load().batches("test", 256)) == pytest.approx(same["test"], abs=1e-6)


def test_a_plan_whose_retraining_diverges_diverges_at_every_budget(tmp_path: Path) -> None:
    class Diverging(Watcher):
        def stage(self, name: str, *_: object) -> None:
            if "retrain" in name:
                raise NonFiniteLoss("as large as it gets")

    search = {"algorithm": es.AutoDim(candidates=(2, 4), every=2), "baselines": (), "budgets": ("90%", "80%")}
    metrics = run(small({**search, "space": es.SearchSpace(align=1)}), tmp_path, watcher=Diverging())
    assert [cell["status"] for cell in by_place(metrics, method="autodim")] == ["diverged"] * 2


def test_the_matrix_tunes_on_the_first_seed_and_reads_test_for_what_was_chosen(tmp_path: Path) -> None:
    recipe = small({"budgets": ("50%", "10%")}, {"epochs": 1}, tune=Tune(l2=(0.0, 0.1), lr=(0.001, 0.01)), seeds=(3, 5))
    metrics = run(recipe, tmp_path)
    places = {(cell["method"], cell["budget"]) for cell in metrics["cells"]}
    assert len(places) == 1 + 3 * 2
    for method, budget in places:
        cells = by_place(metrics, method=method, budget=budget)
        first = [cell for cell in cells if cell["seed"] == 3]
        assert [cell["trial"] for cell in first] == recipe.tune.trials()
        if cells[0]["status"] == "infeasible":
            assert (method, budget) == ("uniform", "10%")
            assert not any(cell["chosen"] for cell in cells)
            assert "no uniform dim fits 10%" in cells[0]["reason"]
            continue
        best = min(first, key=lambda cell: cell["validation"]["log_loss"])["trial"]
        assert all((cell["test"] is None) != cell["chosen"] for cell in cells)
        assert [(cell["seed"], cell["trial"]) for cell in cells if cell["chosen"]] == [(3, best), (5, best)]


def test_the_test_split_is_read_once_by_each_chosen_cell_when_all_training_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    batches = TabularDataset.batches

    def spy(self: TabularDataset, split: Split, batch_size: int, *, seed: int | None = None) -> TabularBatches:
        if batch_size > 1:  # not the look whether there is anything in it
            read.append(split)
        return batches(self, split, batch_size, seed=seed)

    monkeypatch.setattr(TabularDataset, "batches", spy)
    recipe = small({"budgets": ("50%", "25%")}, {"epochs": 1}, tune=Tune(l2=(0.0, 0.1)), seeds=(0, 1))
    metrics = run(recipe, tmp_path)
    chosen = [cell for cell in metrics["cells"] if cell["chosen"]]
    assert set(read[read.index("test") :]) == {"test"}
    assert read.count("test") == len(chosen) == 2 * (1 + 3 * 2 - 1)  # a quarter of dim 8 is no uniform dim
    run(recipe, tmp_path, resume=True)
    assert read.count("test") == len(chosen)


def test_pruning_goes_on_with_the_optimizer_state_of_fused_tables(tmp_path: Path) -> None:
    """A search deals wide tables to several kernels, and the dense model has them on one."""
    wide = replace(small().model, embedding_dim=128)
    metrics = run(small({"baselines": (Magnitude(),)}, {"fused": Fused(), "epochs": 1}, model=wide), tmp_path)
    (dense,), (pruned,) = (by_place(metrics, method=method) for method in ("dense", "magnitude"))
    at_first = pruned["stages"]["fine-tune"][0]["log_loss"]
    assert at_first == pytest.approx(dense["validation"]["log_loss"], abs=0.05)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_are_clipped_for_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    losses = {}
    for norm in (None, 1e6, 1e-12):
        train = {"optimizer": optimizer, "clip_norm": norm, "lr": 0.003, "epochs": 1, "patience": 9}
        metrics = run(small({"baselines": ()}, train), tmp_path / str(norm))
        (dense,) = by_place(metrics, method="dense")
        losses[norm] = [row["log_loss"] for row in dense["stages"]["dense"]]
    assert losses[1e6] == losses[None]
    assert losses[1e-12] != losses[None]
    if optimizer == "sgd":  # the others divide by the size of the gradients
        assert losses[1e-12][1] == pytest.approx(losses[1e-12][0], abs=1e-6)


@pytest.mark.parametrize(("task", "loss"), [("rating", "mse"), ("top-k", "log_loss")])
def test_trials_and_epochs_go_by_the_loss_of_the_task(task: str, loss: str, tmp_path: Path) -> None:
    movielens.write_sample(tmp_path / "data")
    recipe = small({"budgets": ("6000 params",)}, {"epochs": 2}, tune=Tune(lr=(1e-6, 0.01)), model=NeuMf(4))
    recipe = replace(recipe, data=movielens.MovieLens1M(str(tmp_path / "data"), task=task))
    metrics = run(recipe, tmp_path / "out")
    assert (metrics["task"], metrics["budgets"]) == (task, [{"text": "6000 params", "bytes": None}])
    for method in ("dense", "dnis", "uniform", "magnitude"):
        cells = by_place(metrics, method=method)
        best = min(cells, key=lambda cell: cell["validation"][loss])
        assert [cell["chosen"] for cell in cells] == [cell is best for cell in cells]
        assert best["validation"][loss] == pytest.approx(min(row[loss] for row in [*best["stages"].values()][-1]), rel=1e-5)
        assert set(best["test"]) == {metric.key for metric in TASKS[task].metrics}
        if method != "dense":
            plan = es.SizePlan.load(tmp_path / "out" / best["folder"] / "plan.json")
            assert plan.n_params <= 6000


@pytest.mark.parametrize("fused", [None, Fused("EXACT_ROWWISE_ADAGRAD", 0.05)])
def test_a_method_that_retrains_starts_its_plan_from_scratch(fused: Fused | None, tmp_path: Path) -> None:
    algorithm = es.AutoDim(candidates=(4, 8), every=2)
    recipe = small({"algorithm": algorithm, "baselines": (), "budgets": ("80%",)}, {"fused": fused, "epochs": 2})
    metrics = run(recipe, tmp_path)
    (cell,) = by_place(metrics, method="autodim")
    assert list(cell["stages"]) == ["search", "retrain"]
    torch.manual_seed(recipe.seeds[0])
    plan = es.SizePlan.load(tmp_path / cell["folder"] / "plan.json")
    fresh = es.apply(recipe.model.build(DATA.load().schema), plan)
    at_first = evaluate(fresh, DATA.load().batches("validation", recipe.train.batch_size))
    assert cell["stages"]["retrain"][0]["log_loss"] == pytest.approx(at_first["log_loss"], abs=1e-6)
    assert cell["validation"]["log_loss"] < at_first["log_loss"]


def test_methods_that_share_a_name_are_told_apart_by_their_settings() -> None:
    methods = replace(small().search, baselines=(Uniform(), Magnitude(), ITERATIVE)).methods
    assert list(methods) == ["dnis", "uniform", "magnitude", "magnitude (warm_up=0, every=2, rounds=2)"]
    assert len({slug(name) for name in methods}) == 4
    assert list(replace(small().search, algorithm=Uniform()).methods) == ["uniform", "magnitude"]


def test_a_search_that_serves_every_budget_is_run_once_and_one_that_does_not_for_each(tmp_path: Path) -> None:
    search = {"budgets": ("50%", "25%"), "baselines": (Magnitude(), ITERATIVE)}
    metrics = run(small(search), tmp_path)
    one, two = by_place(metrics, method="dnis")
    assert one["stages"]["search"] == two["stages"]["search"]
    one, two = by_place(metrics, method="magnitude (warm_up=0, every=2, rounds=2)")
    assert one["stages"]["search"] != two["stages"]["search"]
    (dense,) = by_place(metrics, method="dense")
    for cell in by_place(metrics, method="magnitude"):
        assert cell["stages"]["dense"] == dense["stages"]["dense"]
        assert cell["seconds"] > dense["seconds"]
    # The dense model, pruned: what it comes as is what it was before, but for what was taken away.
    assert one["stages"]["search"][0]["log_loss"] == pytest.approx(dense["validation"]["log_loss"], abs=1e-5)


def test_of_several_allocations_the_best_on_validation_is_kept_and_used_for_the_other_seeds(tmp_path: Path) -> None:
    search = {"algorithm": es.Random(draws=3), "baselines": (es.Grid(dims=(1, 2, 4)), Uniform()), "budgets": ("50%", "12.5%")}
    search["space"] = es.SearchSpace(align=1)
    metrics = run(small(search, {"epochs": 1}, tune=Tune(lr=(0.001, 0.01)), seeds=(0, 1)), tmp_path)
    tried = {"random": ["draw=0", "draw=1", "draw=2"], "uniform": [""]}
    for budget in ("50%", "12.5%"):
        tried["grid"] = ["uniform, dim=1", "uniform, dim=2", "uniform, dim=4"] if budget == "50%" else ["uniform, dim=1"]
        for method, allocations in tried.items():
            cells = by_place(metrics, method=method, budget=budget)
            first = [cell for cell in cells if cell["seed"] == 0]
            assert [(c["trial"]["lr"], c["allocation"]) for c in first] == [
                (lr, a) for lr in (0.001, 0.01) for a in allocations
            ]
            best = min(first, key=lambda cell: cell["validation"]["log_loss"])
            chosen = [cell for cell in cells if cell["chosen"]]
            assert [cell["seed"] for cell in chosen] == [0, 1] and len(cells) == len(first) + 1
            assert {(cell["allocation"], cell["trial"]["lr"]) for cell in chosen} == {(best["allocation"], best["trial"]["lr"])}
            assert all((cell["test"] is None) != cell["chosen"] for cell in cells)
            assert all(cell["bytes"] <= es.Budget.of(budget).limit(metrics["original_bytes"]) for cell in cells)
            one, two = (json.loads((tmp_path / cell["folder"] / "plan.json").read_text())["tables"] for cell in chosen)
            assert [table["blocks"] for table in one] == [table["blocks"] for table in two]


def test_a_run_that_is_not_strict_derives_by_the_papers_own_rule(tmp_path: Path) -> None:
    search = {"algorithm": es.AutoDim(candidates=(2, 4, 8), warm_up=0), "baselines": (Uniform(),), "budgets": ("30%",)}
    search["space"] = es.SearchSpace(align=1)
    train = {"epochs": 1}
    kept, free = (run(small(search | {"strict": strict}, train), tmp_path / str(strict)) for strict in (True, False))
    limit = es.Budget.of("30%").limit(kept["original_bytes"])
    cells = [by_place(metrics, method="autodim")[0] for metrics in (kept, free)]
    assert cells[0]["stages"]["search"][-1]["log_loss"] == cells[1]["stages"]["search"][-1]["log_loss"]
    assert cells[0]["bytes"] <= limit < cells[1]["bytes"]
    assert [by_place(metrics, method="uniform")[0]["bytes"] for metrics in (kept, free)] == [kept["original_bytes"] // 4] * 2
    assert "over the budget" in headline(free)


@pytest.mark.parametrize(("share", "epochs", "steps"), [(0.1, 1, 0.2), (0.4, 1, 0.8), (0.75, 1, 1), (1.0, 2, 2)])
@pytest.mark.parametrize("sized", [True, False])
def test_fine_tuning_of_the_spectral_method_is_limited(
    share: float, epochs: int, steps: float, sized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sized:
        monkeypatch.setattr("embsearch_plugin.data.dataset.TabularBatches", Unsized)
    seen = Counted()
    search = {"algorithm": es.Spectral(rivals=(), fine_tuning=share), "baselines": ()}
    metrics = run(small(search, {"epochs": 2, "patience": 9}), tmp_path, watcher=seen)  # the dense model takes both epochs
    (cell,) = by_place(metrics, method="spectral")
    assert len(cell["stages"]["fine-tune"]) - 1 == epochs
    dense, fine_tuning = seen.steps.values()
    assert fine_tuning == math.ceil(steps * dense / 2)


@pytest.mark.parametrize("dense_epochs", [1, 2, 3, 7])
def test_by_itself_the_spectral_method_adds_at_most_three_tenths_to_the_dense_training(
    dense_epochs: int, tmp_path: Path
) -> None:
    seen = Counted()
    search = {"algorithm": es.Spectral(rivals=()), "baselines": (), "budgets": ("50%", "25%")}
    run(small(search, {"epochs": dense_epochs, "patience": 9}), tmp_path, watcher=seen)
    dense, *fine_tunings = seen.steps.values()
    assert len(fine_tunings) == 2 and all(0.1 * dense < steps <= 0.3 * dense for steps in fine_tunings)


class Unsized(TabularBatches):
    """Batches of which nobody knows how many there are."""

    __len__ = None


class Counted(Watcher):
    """Counts the weight steps of each stage."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.name = ""

    def stage(self, name: str, *_: object) -> None:
        self.name = name

    def step(self) -> None:
        self.steps[self.name] = self.steps.get(self.name, 0) + 1


def test_an_allocation_that_does_not_depend_on_the_budget_is_trained_once_for_all(tmp_path: Path) -> None:
    search = {"algorithm": es.Grid(dims=(1, 2)), "baselines": (es.Spectral(rivals=(2,)),), "budgets": ("50%", "25%")}
    search["space"] = es.SearchSpace(align=1)
    epochs = KilledAfter(10_000)
    metrics = run(small(search, {"epochs": 1}), tmp_path, watcher=epochs)
    assert epochs.left == 10_000 - 2 * 5  # dense, dims 1 and 2, the spectral method twice: a first look and an epoch each
    shared = [cell for cell in metrics["cells"] if cell["allocation"] == "uniform, dim=2"]
    assert [(cell["method"], cell["budget"]) for cell in shared] == [
        (method, budget) for method in ("grid", "spectral") for budget in ("50%", "25%")
    ]
    assert len({cell["folder"] for cell in shared}) == len({json.dumps(cell["validation"]) for cell in shared}) == 1
    for budget in ("50%", "25%"):  # the spectral method and its rival: validation decides
        rivals = by_place(metrics, method="spectral", budget=budget)
        best = min(rivals, key=lambda cell: cell["validation"]["log_loss"])
        assert len(rivals) == 2 and [cell for cell in rivals if cell["chosen"]] == [best]


def test_a_grid_of_which_nothing_fits_is_infeasible(tmp_path: Path) -> None:
    search = {"algorithm": es.Grid(dims=(4, 8)), "baselines": (Uniform(dim=2), Uniform(dim=8)), "budgets": ("25%",)}
    metrics = run(small(search | {"space": es.SearchSpace(align=1)}, {"epochs": 1}), tmp_path)
    (grid,), (over,) = (by_place(metrics, method=method) for method in ("grid", "uniform (dim=8)"))
    assert grid["status"] == over["status"] == "infeasible"
    assert "smaller dims (the grid has [4, 8])" in grid["reason"] and "dim 8 needs" in over["reason"]
    assert by_place(metrics, method="uniform (dim=2)")[0]["bytes"] == metrics["original_bytes"] // 4


def test_an_allocation_that_is_finished_is_never_trained_again(tmp_path: Path) -> None:
    recipe = small({"algorithm": es.Random(draws=3), "baselines": ()}, {"epochs": 1})
    whole = KilledAfter(10_000)
    run(recipe, tmp_path / "whole", watcher=whole)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", watcher=KilledAfter(5))  # an epoch of the second draw: dense and draw=0 took four
    rest = KilledAfter(10_000)
    run(recipe, tmp_path / "killed", resume=True, watcher=rest)
    assert whole.left == 10_000 - 4 * 2 and rest.left == 10_000 - 3
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert models(tmp_path / "killed") == models(tmp_path / "whole")


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
    for cell in metrics["cells"]:
        cell.pop("seconds")
        for row in (row for rows in cell["stages"].values() for row in rows):
            row.pop("seconds")
    return metrics


def models(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("cells/**/model.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("fused", [None, Fused("EXACT_ROWWISE_ADAGRAD", 0.05)])
def test_a_run_killed_at_any_epoch_ends_as_if_it_had_not_been(fused: Fused | None, tmp_path: Path) -> None:
    search = {"budgets": ("50%", "25%"), "baselines": (Uniform(), ITERATIVE)}
    recipe = small(search, {"fused": fused, "epochs": 1})
    epochs = KilledAfter(10_000)
    run(recipe, tmp_path / "whole", watcher=epochs)
    for killed in range(1, 10_000 - epochs.left + 1, 3):
        folder = tmp_path / str(killed)
        with pytest.raises(Killed):
            run(recipe, folder, watcher=KilledAfter(killed))
        run(recipe, folder, resume=True)
        assert timeless(folder) == timeless(tmp_path / "whole")
        assert models(folder) == models(tmp_path / "whole")


def test_a_finished_run_that_is_resumed_trains_nothing(tmp_path: Path) -> None:
    metrics = run(small(), tmp_path)
    assert run(small(), tmp_path, resume=True, watcher=KilledAfter(1)) == metrics


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(es.EmbsearchError, match="exists already and is not empty; nothing in it was touched"):
        run(small(), tmp_path)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(es.EmbsearchError, match="holds no run to go on with"):
            run(small(), folder, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_of_before_a_field_was_there_goes_on_with_its_default(tmp_path: Path) -> None:
    recipe = small({"baselines": ()}, {"epochs": 1})
    before = run(recipe, tmp_path)
    written = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(written.replace("  strict: true\n", ""))
    assert run(recipe, tmp_path, resume=True) == before
    (tmp_path / "recipe.yaml").write_text(written.replace("  strict: true\n", "  strict: false\n"))
    with pytest.raises(es.EmbsearchError, match="another recipe"):
        run(recipe, tmp_path, resume=True)


def test_a_run_goes_on_with_its_own_recipe_and_data_only_and_alone(tmp_path: Path) -> None:
    recipe = small(train={"epochs": 1})
    with pytest.raises(Killed):
        run(recipe, tmp_path, watcher=KilledAfter(3))
    with pytest.raises(es.EmbsearchError, match="another recipe.*; there and here: - lr: 0.003; [+] lr: 0.5"):
        run(small(train={"epochs": 1, "lr": 0.5}), tmp_path, resume=True)
    with opened(recipe, tmp_path, DATA.load()), pytest.raises(es.EmbsearchError, match="another process is running in"):
        run(recipe, tmp_path, resume=True)
    (tmp_path / "cells/data.json").write_text('{"fingerprint": "of other data"}')
    with pytest.raises(es.EmbsearchError, match="the data is not what it was"):
        run(recipe, tmp_path, resume=True)


def test_a_run_goes_on_by_its_own_clock_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small()
    with opened(recipe, tmp_path, DATA.load()):
        written = json.loads((tmp_path / "cells" / "data.json").read_text())
    threads = 2 if written["clock"] == "CPU time of the process" else 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(es.EmbsearchError, match="timed by another clock"), opened(recipe, tmp_path, DATA.load()):
        pass


def test_a_test_score_that_is_no_number_is_undefined(tmp_path: Path) -> None:
    class NanInTest(Planted):
        def load(self) -> TabularDataset:
            data = super().load()
            data.dense[data.splits["test"][0]] = math.nan
            return data

    data = NanInTest(examples=4000, fields=4, rows=(60,), ranks=(2, 2, 1, 0), n_dense=3)
    metrics = run(replace(small({"budgets": ("50%",), "baselines": ()}, {"epochs": 1}), data=data), tmp_path / "run")
    assert all(cell["test"] == {"auc": None, "log_loss": None} for cell in metrics["cells"] if cell["chosen"])
    assert "cannot be compared" in headline(metrics)


def test_a_cell_that_was_deleted_is_trained_and_tested_anew(tmp_path: Path) -> None:
    recipe = small(train={"epochs": 1})
    run(recipe, tmp_path)
    before = timeless(tmp_path)
    cell = tmp_path / "cells/seed-0/trial-0/magnitude/50%"
    (cell / "cell.json").unlink()
    (cell / "test.json").write_text('{"auc": 1.0, "log_loss": 0.0}')
    run(recipe, tmp_path, resume=True)
    assert timeless(tmp_path) == before
    (cell / "cell.json").write_text('{"met')
    with pytest.raises(es.EmbsearchError, match="cell.json is damaged: .*\n.*delete it"):
        run(recipe, tmp_path, resume=True)


def test_a_trial_that_diverges_loses_and_the_run_goes_on(tmp_path: Path) -> None:
    metrics = run(small(train={"epochs": 2}, tune=Tune(lr=(0.003, 1e30))), tmp_path)
    for method in ("dense", "dnis", "uniform", "magnitude"):
        good, bad = by_place(metrics, method=method)
        assert good["chosen"] and good["status"] == "done"
        assert bad["status"] == "diverged" and "must be a number" in bad["reason"]
    assert "the dense model it starts from" in by_place(metrics, method="magnitude")[1]["reason"]


def test_what_did_not_converge_is_said(tmp_path: Path) -> None:
    metrics = run(small(train={"epochs": 1}), tmp_path)
    assert {cell["method"]: cell["capped"] for cell in metrics["cells"]} == {
        "dense": ["dense"],
        "dnis": ["search", "fine-tune"],
        "uniform": ["train"],
        "magnitude": ["dense", "fine-tune"],
    }
    assert "dnis at 50%: not converged, fine-tune, search ended at the last epoch allowed" in results_markdown(metrics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"space": es.SearchSpace(column_chunks=(3, 3))}}, "sum to the table's dim 8"),
        ({"search": {"baselines": (es.Grid(dims=(1, 6)),)}}, "dims must be multiples of align=4; got 1"),
        (
            {"search": {"baselines": (es.Given(dims={"nobody": 4}),)}},
            "dims must be of tables.*there is no 'nobody'",
        ),
        ({"search": {"baselines": (es.Sam(candidates=(16,)),)}}, r"the candidates are \[16\], and the tables' dims \[8\]"),
        ({"search": {"baselines": (Uniform(dim=3),)}}, "dims must be multiples of align=4; got 3"),
        ({"data": replace(DATA, examples=3)}, "'test' holds none"),
        ({"model": Fm(8), "train": {"fused": Fused()}}, "widths that are multiples of 4; table .* has dim 1"),
        ({"train": {"batch_size": 4000}}, "dnis must have 5 weight steps to come to a plan; 2 epochs of 1 batches are 2"),
        (
            {"search": {"baselines": (Magnitude(rounds=3, every=400),)}},
            "magnitude must have 850 weight steps",
        ),
        ({"model": NeuMf(8)}, "must know a user's fields from an item's"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_trained(change: dict[str, object], message: str, tmp_path: Path) -> None:
    recipe = small(change.get("search"), change.get("train"))
    whole = {name: change[name] for name in ("data", "model") if name in change}
    with pytest.raises(es.EmbsearchError, match=message):
        run(replace(recipe, **whole), tmp_path, watcher=KilledAfter(1))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    class Broken(Planted):
        def load(self) -> object:
            data = super().load()
            data.dense[data.splits["train"][0]] = float("nan")
            return data

    with pytest.raises(NonFiniteLoss, match="diverged in every trial.* in step .* of epoch 1 of dense"):
        run(replace(small(), data=Broken(**vars(DATA))), tmp_path)
    assert (tmp_path / "cells/seed-0/trial-0/dense/checkpoints/dense.safetensors").exists()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("[!s]*.yaml")), ids=lambda path: path.stem)  # not those of studies
def test_every_recipe_runs_in_a_small_form(recipe: Path, tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        *ONE_CELL_EACH,
        *(text for end, texts in FEW_ALLOCATIONS.items() if recipe.stem.endswith(end) for text in texts),
    ]
    if "ml1m" in recipe.stem:
        movielens.write_sample(tmp_path / "data")
        overrides.append(f"data.path={tmp_path / 'data'}")
    if "criteo" in recipe.stem:
        criteo.write_sample(tmp_path / "train.txt.gz", rows=3000)
        overrides += [f"data.path={tmp_path / 'train.txt.gz'}", "data.rows=500"]
    if "moviestream" in recipe.stem:
        movielens_csv.write_sample(tmp_path / "data")
        overrides.append(f"data.path={tmp_path / 'data'}")
    if "kkbox" in recipe.stem:
        kkbox.write_sample(tmp_path / "data")
        overrides.append(f"data.path={tmp_path / 'data'}")
    if "avazu" in recipe.stem:
        avazu.write_sample(tmp_path / "train.csv")
        overrides.append(f"data.path={tmp_path / 'train.csv'}")
    if recipe.stem.startswith(("demo", "planted")):
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
    with CliRunner().isolated_filesystem():
        assert "no recipes/*.yaml in this folder" in CliRunner().invoke(main, ["list", "recipes"]).output


def test_importing_the_package_is_light() -> None:
    code = "import sys, embsearch_plugin; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_run_draws_nothing_from_the_callers_random_numbers_beyond_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run(small(train={"epochs": 1}), tmp_path / "a")
    torch.manual_seed(2)
    run(small(train={"epochs": 1}), tmp_path / "b")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
