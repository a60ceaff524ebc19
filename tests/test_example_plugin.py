"""A package of its own adds an algorithm and an observer, and the project is not touched."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "example_plugin"
SEARCH = """
import torch
from support import PLAIN, stored_bytes, task, train

import embsearch_plugin as es
from embsearch_plugin.budget import Budget
from embsearch_plugin.plugins import algorithms

print(*algorithms())

@es.searchable(algorithm="frequency", budget="20%")
def build():
    return task(PLAIN)

model = build()
search = es.session(model)
optimizer = torch.optim.Adam(model.parameters())
search.attach(optimizer, validation=[PLAIN.batch(seed=900)])
train(model, optimizer, (PLAIN.batch(seed=i) for i in range(60)))

for budget in ("1%", "55.5%", "100%", es.Budget(bytes=3000), es.Budget(params=1234), "20%"):
    plan, budget = search.derive(budget), Budget.of(budget)
    size = plan.n_params if budget.unit == "parameters" else plan.size_bytes
    assert size <= budget.limit(search.original_bytes), (str(budget), size)
assert plan.size_bytes > 0.15 * plan.original_bytes, str(plan)
assert all(len(table.blocks) > 1 for table in plan.tables), str(plan)

search.compact(plan)
assert stored_bytes(model) == plan.size_bytes <= 0.2 * plan.original_bytes
train(model, optimizer, [PLAIN.batch()])
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Install the example package into a folder of its own, from a copy: building leaves files beside the sources."""
    leftovers = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(EXAMPLE, tmp_path / "source", ignore=leftovers)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, *offline, str(source)], check=True)
    return tmp_path / "site"


def test_the_example_keeps_the_budget_and_its_observer_sees_every_step(installed: Path, tmp_path: Path) -> None:
    log, path = tmp_path / "steps.csv", os.pathsep.join([str(installed), str(Path(__file__).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "EMBSEARCH_CSV": str(log)}
    command = [sys.executable, "-c", SEARCH]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"frequency", "dnis"} <= set(done.stdout.split())
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(50, 61))
    assert all(0 < float(row["loss"]) < 10 for row in rows)
