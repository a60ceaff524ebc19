"""Studies in small: what they write, what trials share, how they go on, and what they refuse."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner

import embsearch_plugin as es
from embsearch_plugin import cells
from embsearch_plugin.cli import main
from embsearch_plugin.data import movielens
from embsearch_plugin.errors import RecipeError, RunFolderError, SpaceError, StudyError
from embsearch_plugin.recipes import load_recipe, to_yaml
from embsearch_plugin.study import compare
from embsearch_plugin.study.storage import storage_of
from embsearch_plugin.study.trial import STEPS
from study.conftest import BUDGETS, RANDOM, Conduct, Seen, small

RECIPES = Path(__file__).parents[2] / "recipes"


def states(found: dict[str, Any]) -> list[str]:
    return [trial["state"] for trial in found["trials"]]


def test_a_study_by_the_command_line_from_the_trials_to_the_plan(tmp_path: Path) -> None:
    baselines = ["uniform", {"name": "random", "draws": 3}]
    search = {"algorithm": {"name": "spectral", "rivals": [4]}, "baselines": baselines}
    recipe = small({"fields": {**BUDGETS, "model.embedding_dim": [8, 16]}}, search=search)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    command = ["study", str(tmp_path / "r.yaml"), "--out", str(out)]
    result = CliRunner().invoke(main, [*command, "--trials", "4", "--best", str(plan)])
    assert result.exit_code == 0, result.output
    assert "4 trials cost at most" in result.output and "plain training runs: one for the dense model" in result.output
    assert {path.name for path in out.iterdir()} == {
        "models",
        "recipe.yaml",
        "report.html",
        "running",
        "study.db",
        "study.json",
    }
    found = json.loads((out / "study.json").read_text())
    assert states(found) == ["complete"] * 4
    cell = out / found["trials"][found["chosen"]]["cell"]
    assert es.SizePlan.load(plan).size_bytes == es.SizePlan.load(cell / "plan.json").size_bytes
    trial = load_recipe(cell / "recipe.yaml")
    assert trial.model.embedding_dim == found["trials"][found["chosen"]]["params"]["model.embedding_dim"]
    applied = CliRunner().invoke(main, ["apply", str(plan), str(cell / "recipe.yaml")])
    assert applied.exit_code == 0 and "measured in the rewritten model" in applied.output
    other = next(trial["number"] for trial in found["trials"] if trial["number"] != found["chosen"])
    again = CliRunner().invoke(main, [*command, "--best", str(plan), "--trial", str(other)])
    assert again.exit_code == 0, again.output
    assert es.SizePlan.load(plan).size_bytes == found["trials"][other]["values"][1]
    assert "there is no complete trial 77" in CliRunner().invoke(main, [*command, "--best", str(plan), "--trial", "77"]).output
    assert "written: " in CliRunner().invoke(main, ["report", str(out)]).output
    markdown = CliRunner().invoke(main, ["report", str(out), "--markdown"]).output
    assert f"Trial {found['chosen']} is suggested" in markdown
    table = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    assert [line[0] for line in table[2:6]] == [f"| {trial['number']}" for trial in found["trials"]]
    assert len(table) == 2 + len(found["trials"]) + len(found["references"]) and len({len(line) for line in table}) == 1
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4 and "uniform at 50%" in page and "Pareto front" in page
    assert page.count("allocations that a run tries, one") == page.count("; of the 3 allocations that a run tries, one") == 1


def test_the_storage_is_optunas_own(conduct: Conduct, tmp_path: Path) -> None:
    conduct(small({"fields": BUDGETS}), 2)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["AUC", "bytes"]


def test_trials_share_the_dense_model_and_a_search_that_serves_every_budget(conduct: Conduct) -> None:
    seen = Seen()
    algorithm = {"algorithm": {"name": "dnis", "warm_up": 2}}
    found = conduct(small({"fields": BUDGETS}, search=algorithm), 3, watcher=seen)
    assert [stage.split()[-1] for stage in seen.stages if stage[-1] not in "01"] == [
        "dense",
        "search",
        *["fine-tune"] * 1,
        *["search", "fine-tune"] * 2,  # a search that is finished is taken up, and has no epochs left
    ]
    assert len([stage for stage in seen.stages if "search" in stage and stage.endswith("1")]) == 1
    assert len({trial["values"][1] for trial in found["trials"]}) > 1


def test_equal_trials_are_trained_once(conduct: Conduct) -> None:
    seen = Seen()
    found = conduct(small({"fields": {"search.budgets": ["50%"]}}), 3, watcher=seen)
    assert states(found) == ["complete"] * 3
    assert len({tuple(trial["values"]) for trial in found["trials"]}) == 1
    assert sum(stage.endswith("fine-tune") for stage in seen.stages) == 1


def test_a_study_goes_on_where_it_was(conduct: Conduct) -> None:
    first = conduct(small({"fields": BUDGETS}), 2)
    again = conduct(small({"fields": BUDGETS}), 2)
    assert again["trials"] == first["trials"]
    more = conduct(small({"fields": BUDGETS, "sampler": "TPESampler"}), 4)  # another sampler may take over
    assert more["trials"][:2] == [trial | {"front": more["trials"][n]["front"]} for n, trial in enumerate(first["trials"])]
    assert states(more) == ["complete"] * 4


def test_one_objective_is_pruned_from_what_is_validated(conduct: Conduct) -> None:
    pruner = {"name": "ThresholdPruner", "lower": 0.999, "n_warmup_steps": 1}
    study = {"fields": {"train.lr": None}, "objectives": ["auc"], "pruner": pruner}
    with pytest.raises(StudyError, match="no trial has succeeded yet. Of 2: . x pruned: pruned at step 1, with 0"):
        conduct(small(study), 2)
    found = conduct(small({**study, "pruner": {"name": "PatientPruner", "patience": 9, "wrapped_pruner": pruner}}), 3)
    assert states(found) == ["pruned", "pruned", "complete"]
    assert found["chosen"] == 2 and "the best validation AUC" in found["how"]


@pytest.mark.parametrize("pruner", ["MedianPruner", "HyperbandPruner"])
def test_optunas_pruners_are_taken_by_name(pruner: str, conduct: Conduct) -> None:
    found = conduct(small({"fields": {"train.lr": None}, "objectives": ["metric"], "pruner": pruner}), 2)
    assert states(found) == ["complete"] * 2


def test_what_is_infeasible_is_pruned_with_the_reason(conduct: Conduct) -> None:
    fields = {"search.budgets": ["1%", "50%"]}
    found = conduct(small({"fields": fields}, search={"algorithm": "uniform"}), 6)
    by_budget = {trial["params"]["search.budgets"]: trial for trial in found["trials"]}
    assert by_budget["50%"]["state"] == "complete"
    assert by_budget["1%"]["state"] == "pruned" and "no uniform dim fits 1%" in by_budget["1%"]["reason"]
    with pytest.raises(StudyError, match="no trial has succeeded yet.*pruned: infeasible: no uniform dim fits 1%"):
        conduct(small({"fields": {"search.budgets": ["1%"]}}, search={"algorithm": "uniform"}), 2, "none")


def test_a_training_that_diverges_is_pruned(conduct: Conduct) -> None:
    found = conduct(small({"fields": {"train.lr": [0.01, 1e30]}}, search={"algorithm": "uniform"}), 5)
    reasons = {trial["params"]["train.lr"]: trial["reason"] for trial in found["trials"]}
    assert reasons[0.01] is None and reasons[1e30].startswith("diverged: the training loss must be a number")


def test_three_objectives_and_layouts_by_groups(conduct: Conduct) -> None:
    layout = {"groups": {"first": ["t_cat_0"], "rest": ["*"]}, "column_chunks": {"low": 1, "high": 2}}
    study = {"fields": BUDGETS, "layout": layout, "objectives": ["log_loss", "bytes", "latency"]}
    found = conduct(small(study, search={"space": {"min_block_rows": 1}}), 3)
    assert all(len(trial["values"]) == 3 and trial["values"][2] > 0 for trial in found["trials"])
    assert [objective["sign"] for objective in found["objectives"]] == [-1, -1, -1]
    assert found["trials"][found["chosen"]]["front"]


@pytest.mark.parametrize("choices", [[None], [None, 1.0]])
def test_a_choice_may_be_null(choices: list[Any], conduct: Conduct, tmp_path: Path) -> None:
    found = conduct(small({"fields": {"train.clip_norm": choices}}), 3)
    assert {trial["params"]["train.clip_norm"] for trial in found["trials"]} == set(choices)
    assert ">null</text>" in (tmp_path / "study" / "report.html").read_text()


def test_a_group_of_no_table_is_refused_at_once(conduct: Conduct) -> None:
    with pytest.raises(SpaceError, match="none is called 't_user'. Available: t_cat_0"):
        conduct(small({"fields": BUDGETS, "layout": {"groups": {"large": ["t_user"], "rest": ["*"]}}}), 3)


def test_values_are_means_over_seeds(conduct: Conduct) -> None:
    study, folder = {"fields": {"search.budgets": ["50%"]}}, {}
    for seeds in ((0,), (1,), (0, 1)):
        recipe = replace(small(study), seeds=seeds)
        folder[seeds] = conduct(recipe, 1, str(seeds))["trials"][0]["values"][0]
    assert folder[0, 1] == pytest.approx((folder[0,] + folder[1,]) / 2)


def test_a_study_ends_at_a_number_of_plain_training_runs(conduct: Conduct, tmp_path: Path) -> None:
    conduct(small({"fields": BUDGETS}), 100, plain_runs=3)
    dense = json.loads(next((tmp_path / "study").glob("models/**/dense/cell.json")).read_text())
    one = sum(epoch["steps"] for epoch in dense["stages"]["dense"])
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    steps = [trial.user_attrs[STEPS] for trial in study.trials]
    assert sum(steps[:-1]) < 2 * one <= sum(steps)


def test_a_full_disk_stops_the_study_and_loses_nothing(conduct: Conduct, monkeypatch: pytest.MonkeyPatch) -> None:
    conduct(small({"fields": BUDGETS}), 1)
    whole = cells.write_json

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cells, "write_json", full)
    with pytest.raises(StudyError, match="No space left on device.*\n.*the disk is not full.*\n.*Nothing is lost"):
        conduct(small({"fields": BUDGETS}), 3)
    monkeypatch.setattr(cells, "write_json", whole)
    found = conduct(small({"fields": BUDGETS}), 3)
    assert states(found) == ["complete", "fail", "complete", "complete"]
    assert found["trials"][2]["params"] == found["trials"][1]["params"]  # what was stopped is tried again


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("sqlite:////nowhere/at/all/study.db", "unable to open database file"),
        ("postgresql://me:secret@localhost:1/x", "me:\\*\\*\\*@localhost"),
        ("nonsense", "Could not parse"),
        ("journal:////nowhere/at/all/study.log", "No such file or directory"),
    ],
)
def test_a_storage_that_cannot_be_reached(storage: str, message: str, conduct: Conduct) -> None:
    with pytest.raises(StudyError, match=message) as error:
        conduct(small({"fields": BUDGETS, "storage": storage}), 1)
    assert "Possible solutions" in str(error.value) and "secret" not in str(error.value)


def test_a_journal_file_will_do(conduct: Conduct, tmp_path: Path) -> None:
    found = conduct(small({"fields": BUDGETS, "storage": f"journal:///{tmp_path / 'study.log'}"}), 2)
    assert states(found) == ["complete"] * 2
    assert not (tmp_path / "study" / "study.db").exists()


def test_the_password_of_a_storage_is_written_nowhere(
    conduct: Conduct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embsearch_plugin.study.conduct.storage_of", lambda url: storage_of(f"sqlite:///{tmp_path / 'all.db'}"))
    conduct(small({"fields": BUDGETS, "storage": "postgresql://me:secret@localhost/x"}), 1)
    written = [path for path in (tmp_path / "study").rglob("*") if path.is_file()]
    assert len(written) > 3 and not [path for path in written if b"secret" in path.read_bytes()]


def test_a_study_of_another_space_is_not_joined(conduct: Conduct, tmp_path: Path) -> None:
    storage = {"storage": f"sqlite:///{tmp_path / 'all.db'}", "name": "mine"}
    conduct(small({"fields": BUDGETS, **storage}), 1)
    narrower = {"search.budgets": {"low": "30%", "high": "60%"}}
    with pytest.raises(RunFolderError, match=r"another recipe or other overrides; there and here: .*- low: 20%.*\+ low: 30%"):
        conduct(small({"fields": narrower, **storage}), 2)
    with pytest.raises(StudyError, match=r"'mine' in sqlite.* begun with another space .*- low: 20%.*\+ low: 30%"):
        conduct(small({"fields": narrower, **storage}), 2, "elsewhere")
    with pytest.raises(StudyError, match="the data is not what it was"):
        conduct(small({"fields": BUDGETS, **storage}, data={"seed": 1}), 2)
    assert states(conduct(small({"fields": BUDGETS, **storage}), 2, "another folder")) == ["complete"] * 2
    foreign = optuna.create_study(storage=storage["storage"], study_name="foreign")
    foreign.add_trial(optuna.create_trial(value=0.0))
    with pytest.raises(StudyError, match="'foreign' in .* was not begun by embsearch"):
        conduct(small({"fields": BUDGETS, **storage, "name": "foreign"}), 2, "third")


def test_an_empty_study_made_by_hand_is_taken_if_its_directions_are_ours(conduct: Conduct, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    optuna.create_study(storage=storage, study_name="up", direction="maximize")
    optuna.create_study(storage=storage, study_name="down", direction="minimize")
    study = {"fields": BUDGETS, "objectives": ["auc"], "storage": storage}
    assert states(conduct(small({**study, "name": "up"}), 1)) == ["complete"]
    with pytest.raises(
        StudyError, match="'down' in .* it has trials, or other directions than maximize.\n.*another study.name"
    ):
        conduct(small({**study, "name": "down"}), 1, "another")


def test_the_folder_of_a_run_is_left_alone(conduct: Conduct, tmp_path: Path) -> None:
    recipe = small({"fields": BUDGETS})
    (tmp_path / "study" / "cells").mkdir(parents=True)
    (tmp_path / "study" / "recipe.yaml").write_text(to_yaml(recipe))
    with pytest.raises(RunFolderError, match="holds a run, whose report is kept.\n.*another --out"):
        conduct(recipe, 1)


def test_a_folder_that_holds_something_else_is_left_alone(conduct: Conduct, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="is not empty and holds no study"):
        conduct(small({"fields": BUDGETS}), 1)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"sampler": "TPESampla"}, "Optuna has no sampler 'TPESampla'. Did you mean 'TPESampler'"),
        ({"sampler": {"name": "TPESampler", "sead": 1}}, "TPESampler cannot be made with {'sead': 1}: .*sead"),
        ({"objectives": ["auc"], "pruner": "MedianPrunr"}, "Optuna has no pruner 'MedianPrunr'. Did you mean 'MedianPruner'"),
        (
            {"sampler": {"name": "GridSampler", "search_space": {"lr": [1, 2]}}},
            "GridSampler cannot draw what this study varies: .*search.budgets, is not found in the given grid.* @ recipe.study",
        ),
        ({"objectives": ["ndcg_10"]}, "the task 'click' has no metric 'ndcg_10'"),
    ],
)
def test_what_optuna_does_not_have(study: dict[str, Any], message: str, conduct: Conduct, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, StudyError), match=message):
        conduct(small({"fields": BUDGETS, **study}), 1)


def test_no_trial_at_all_says_how_to_get_one(conduct: Conduct) -> None:
    with pytest.raises(StudyError, match="There was none.\n.*--trials N"):
        conduct(small({"fields": BUDGETS, "sampler": RANDOM}))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("study_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_study_runs_in_a_small_form(recipe: Path, tmp_path: Path) -> None:
    overrides = ["train.batch_size=256", "train.epochs=1", "search.baselines=[]"]
    if "ml1m" in recipe.stem:
        movielens.write_sample(tmp_path / "data")
        overrides += [f"data.path={tmp_path / 'data'}"]
    else:
        overrides += ["data.examples=2000", "data.fields=6"]
    if "layout" in recipe.stem:
        overrides += ["study.fields.dnis.warm_up=[2]"]
    elif "per_table" not in recipe.stem:
        overrides += ["study.fields.search.algorithm=[magnitude]"]  # which fits every budget; one trial must succeed
    result = CliRunner().invoke(main, ["study", str(recipe), *overrides, "--trials", "1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").exists()


def test_studies_are_compared_by_one_command(tmp_path: Path) -> None:
    for name, fields in (("ours", BUDGETS), ("theirs", {"given.dims.t_cat_0": {"low": 0, "high": 8}, "train.l2": None})):
        algorithm = {"name": "magnitude"} if name == "ours" else {"name": "given"}
        recipe = small({"fields": fields, "sampler": "RandomSampler"}, search={"algorithm": algorithm, "space": {"align": 1}})
        (tmp_path / f"{name}.yaml").write_text(to_yaml(recipe))
    recipes = [str(tmp_path / f"{name}.yaml") for name in ("ours", "theirs")]
    command = [*recipes, "search.budgets=[100%]", "--plain-runs", "2", "--seeds", "0", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(compare.main, command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["seeds"][0]
    assert found["seed"] == 0 and len(found["fronts"]) == 2
    assert "Hypervolume, first to second" in result.output and "| 0 | theirs |" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,x"], "whole numbers with commas between them"),
        (["--seeds", "1,1"], "no one twice"),
        (["--plain-runs", "0"], "0.0 is not in the range x>=1"),
        (["search.algorithm=nobody"], "unknown name 'nobody'"),
    ],
)
def test_a_comparison_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    recipes = [str(RECIPES / f"study_planted_{name}.yaml") for name in ("dlrm", "deepfm")]
    result = CliRunner().invoke(compare.main, [*recipes, "--plain-runs", "2", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code != 0 and "Traceback" not in result.output
    assert message in " ".join(result.output.split())
