"""Several processes on one study: nothing is done twice or lost, and what a killed one leaves is taken up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from embsearch_plugin.errors import StudyError
from embsearch_plugin.files import locked
from embsearch_plugin.recipes import to_yaml
from study.conftest import BUDGETS, Conduct, small

TRIALS = 4
WORKER = "import sys; from embsearch_plugin.cli import main; main(sys.argv[1:])"


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, "study", str(recipe), "--trials", str(TRIALS), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def running(study: Path) -> list[int]:
    """The trials that a living process works on, by what it has in the run folder."""
    folder = study / "running"
    return sorted(int(path.name) for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.slow
def test_two_workers_share_one_study_and_one_that_is_killed_loses_nothing(tmp_path: Path, conduct: Conduct) -> None:
    recipe = small({"fields": {"train.l2": None}}, train={"epochs": 2})
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    out = tmp_path / "study"
    workers = [start(tmp_path / "r.yaml", out) for _ in range(2)]
    killed = workers[0]
    while not running(out):
        time.sleep(0.01)
        assert killed.poll() is None
    killed.kill()
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == (-signal.SIGKILL if worker is killed else 0), errors.decode()
    found = conduct(recipe, TRIALS)  # whatever the killed one left behind is finished now
    finished = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert len(finished) == TRIALS
    assert {trial["state"] for trial in found["trials"]} <= {"complete", "fail"}
    done = {tuple(trial["params"].items()) for trial in finished}
    assert len(done) == TRIALS  # no trial was made twice
    lost = [trial for trial in found["trials"] if trial["state"] == "fail" and trial["params"]]
    assert all(tuple(trial["params"].items()) in done for trial in lost)
    assert running(out) == []
    assert len(list(out.glob("models/*/cells/seed-0/trial-0/dense/cell.json"))) == TRIALS + 1


def test_the_trial_of_a_process_that_is_gone_is_tried_again_at_once(tmp_path: Path, conduct: Conduct) -> None:
    recipe = small({"fields": BUDGETS})
    conduct(recipe, 1)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    study.ask({"search.budgets": optuna.distributions.FloatDistribution(20, 60)})
    found = conduct(recipe, 2)
    assert [trial["state"] for trial in found["trials"]] == ["complete", "fail", "complete"]
    assert found["trials"][2]["params"] == found["trials"][1]["params"]
    assert "trial 1 was lost with its process, and is tried again" in found["said"]


def test_the_trial_of_a_process_that_lives_is_left_alone(tmp_path: Path, conduct: Conduct) -> None:
    recipe = small({"fields": BUDGETS})
    conduct(recipe, 1)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    mark = tmp_path / "study" / "running" / str(study.ask().number)
    code = (
        "import time; from pathlib import Path; from embsearch_plugin.files import locked\n"
        f"with locked(Path({str(mark)!r})):\n    print('in', flush=True)\n    time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        found = conduct(recipe, 2)  # the other one's trial is the second
        assert [trial["state"] for trial in found["trials"]] == ["complete", "running"]
        os.kill(other.pid, signal.SIGKILL)
    assert [trial["state"] for trial in conduct(recipe, 2)["trials"]] == ["complete", "fail", "complete"]


def test_a_study_whose_only_trial_another_process_works_on_says_so(tmp_path: Path, conduct: Conduct) -> None:
    recipe = small({"fields": {"search.budgets": ["1%"]}}, search={"algorithm": "uniform"})
    with pytest.raises(StudyError, match="1 x pruned"):
        conduct(recipe, 1)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    with locked(tmp_path / "study" / "running" / str(study.ask().number)), pytest.raises(StudyError) as error:
        conduct(recipe, 2)
    assert "1 x running: by another process" in str(error.value)
