"""What is run on: devices that are not there, and whose time it is."""

import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from embsearch_plugin.cli import main
from embsearch_plugin.errors import RecipeError, StackError
from embsearch_plugin.machine import begin_to_use, clock, clock_name
from embsearch_plugin.recipes import load_recipe
from embsearch_plugin.run import run

DEMO = Path("recipes/demo.yaml")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "mps", ""])
def test_a_device_of_another_name_is_a_problem_of_the_recipe(device: str) -> None:
    with pytest.raises(RecipeError, match="device must be cpu, cuda or cuda:N"):
        load_recipe(DEMO, [f"train.device={device!r}"])


def test_a_device_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, ["train.device=cuda:77"])
    with pytest.raises(StackError, match=r"'cuda:77' is not there: torch sees \d+ CUDA device"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_benchmark_names_a_wrong_device() -> None:
    result = CliRunner().invoke(main, ["bench", "--device", "gpu"])
    assert result.exit_code == 2
    assert "--device: device must be cpu, cuda or cuda:N, got 'gpu'" in result.output


def test_time_is_the_processs_own_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert clock_name() == "CPU time of the process"
    started = clock()
    time.sleep(0.2)
    assert clock() - started < 0.1


def test_where_a_gpu_is_used_time_is_the_walls_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    assert clock_name() == "wall clock"
    started = clock()
    time.sleep(0.2)
    assert clock() - started >= 0.2
    assert len(waits) == 2


def test_the_device_that_is_used_is_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for device in ("cpu", "cuda", "cuda:1"):
        begin_to_use(device)
    assert used == [0, 1]
