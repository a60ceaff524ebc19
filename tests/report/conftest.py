"""Runs as plain data, in full and in small, and a way to write them down."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import Data, full_run, plan_of, small_run


@pytest.fixture
def metrics() -> Data:
    return full_run()


@pytest.fixture
def small() -> Data:
    return small_run()


@pytest.fixture
def make_plan() -> Callable[[int], Data]:
    return plan_of


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[[Data, Data], Path]:
    """Write a run down, with the same plan for each of its compact models."""

    def write(metrics: Data, plan: Data) -> Path:
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        for cell in metrics["cells"]:
            if cell["budget"] and cell["status"] == "done":
                (tmp_path / cell["folder"]).mkdir(parents=True, exist_ok=True)
                (tmp_path / cell["folder"] / "plan.json").write_text(json.dumps(plan))
        return tmp_path

    return write
