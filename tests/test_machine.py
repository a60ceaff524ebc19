"""What is run on: devices that are not there, and whose time it is."""

from pathlib import Path

import pytest
import torch

from embsearch_plugin.errors import RecipeError, StackError
from embsearch_plugin.machine import begin_to_use, clock, clock_name, machine
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


def test_the_cpu_is_always_there() -> None:
    begin_to_use("cpu")
    assert machine()["gpu"] is None or torch.cuda.is_initialized()


def test_one_thread_has_the_processs_own_time_and_the_name_says_so() -> None:
    assert clock_name() == ("wall clock" if torch.cuda.is_initialized() else "CPU time of the process")
    started = clock()
    assert clock() >= started
