"""A study of seconds, for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embsearch_plugin.recipes import Recipe, parse_recipe
from embsearch_plugin.study.conduct import Conductor
from embsearch_plugin.tasks import Task
from embsearch_plugin.training import Epoch, Watcher

SMALL: dict[str, Any] = {
    "data": {"name": "planted", "examples": 3000, "fields": 4, "rows": [60], "ranks": [2, 2, 1, 0], "n_dense": 3},
    "model": {"name": "dlrm", "embedding_dim": 8, "dense_layers": [8], "over_layers": [8]},
    "train": {"batch_size": 256, "epochs": 1, "lr": 0.01},
    "search": {"algorithm": {"name": "magnitude"}, "baselines": [], "budgets": ["50%"]},
}
BUDGETS = {"search.budgets": {"low": "20%", "high": "60%"}}
RANDOM = {"name": "RandomSampler", "seed": 0}


def small(study: dict[str, Any], **more: dict[str, Any]) -> Recipe:
    """Return the small recipe with a study; ``more`` are fields of its sections."""
    content = {section: {**fields, **more.get(section, {})} for section, fields in SMALL.items()}
    return parse_recipe({**content, "study": {"sampler": RANDOM, **study}}, "small")


class Seen(Watcher):
    """Remembers the stages of training."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str, steps: int | None, task: Task) -> None:
        self.stages.append(name)

    def epoch(self, name: str, row: Epoch) -> None:
        self.stages.append(f"{name} {row['epoch']}")


Conduct = Callable[..., dict[str, Any]]


@pytest.fixture
def conduct(tmp_path: Path) -> Conduct:
    """Go on with a study in the test's folder; without it, in a folder of it."""

    def run(recipe: Recipe, trials: int = 0, folder: str = "study", **options: Any) -> dict[str, Any]:
        said: list[str] = []
        watcher = options.pop("watcher", Watcher())
        found = Conductor(recipe, tmp_path / folder, watcher, said.append).run(trials, **options)
        return found | {"said": said}

    return run
