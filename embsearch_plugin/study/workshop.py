"""What trials share: the data, the dense models, and searches that serve several budgets. All of it lies in the run folder.

    models/DIGEST/                      of the data, the model and the training settings; inside, cells as in a run
    models/DIGEST/.../dense/            the dense model, trained once for all trials of these settings
    models/DIGEST/.../NAME-DIGEST/      an algorithm with its settings and its space: its search, if it serves every budget
    models/DIGEST/.../NAME-DIGEST/5%/   a trial's cell: plan.json, model.safetensors, recipe.yaml

A trial that was made before, by this process or another, is not made again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.cells import DENSE_MODEL, Cells, Place, Row
from embsearch_plugin.collection import Table
from embsearch_plugin.data.dataset import Dataset
from embsearch_plugin.files import write_text
from embsearch_plugin.plain import to_plain
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.randomness import private_random
from embsearch_plugin.recipes import Recipe, load_recipe, to_yaml
from embsearch_plugin.run import row_frequencies
from embsearch_plugin.tasks import Score
from embsearch_plugin.training import Watcher

MODELS, RECIPE = "models", "recipe.yaml"


@dataclass(frozen=True)
class Workshop:
    """Makes the cells of trials.

    Args:
        data: of all trials, loaded.
        folder: the run folder.
    """

    data: Dataset
    folder: Path
    _frequencies: dict[tuple[str, ...], Mapping[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """The data's; it takes a while."""
        return self.data.fingerprint()

    def cells(self, recipe: Recipe, seed: int, watcher: Watcher) -> Cells:
        """Return the cells that share a dense model with this recipe."""
        shared = {"data": self.fingerprint, "model": to_plain(recipe.model), "train": to_plain(recipe.train)}
        root = self.folder / MODELS / _digest(shared)
        return Cells(recipe, self.data, seed, {}, 0, root, watcher, lambda: self._frequencies_for(recipe))

    def make(self, recipe: Recipe, seed: int, watcher: Watcher) -> Row:
        """Return the cell of a recipe's algorithm at its first budget; train it, if that was not done."""
        cells, place = self.cells(recipe, seed, watcher), place_of(recipe)
        row = cells.get(place)
        written = cells.root / row["folder"] / RECIPE
        if not written.exists():
            write_text(written, to_yaml(recipe))
        return row

    def dense(self, recipe: Recipe, watcher: Watcher) -> Row:
        """Return the dense model's cell, from the first seed; train it, if that was not done."""
        return self.cells(recipe, recipe.seeds[0], watcher).get(DENSE_MODEL)

    def test(self, cell: str) -> Score:
        """Return how good the model of a trial's cell, a folder in the run folder, is on the test split."""
        recipe = load_recipe(self.folder / cell / RECIPE)
        cells = self.cells(recipe, recipe.seeds[0], Watcher())
        return cells.test(cells.get(place_of(recipe)))

    def path(self, recipe: Recipe, row: Row) -> Path:
        """Return where a cell is."""
        return self.cells(recipe, row["seed"], Watcher()).root / row["folder"]

    def tables(self, recipe: Recipe) -> list[Table]:
        """Return the tables of a recipe's model."""
        with private_random(0):
            found = find_collections(recipe.model.build(self.data.schema))
        return [table for each in found for table in each.tables]

    def _frequencies_for(self, recipe: Recipe) -> Mapping[str, Tensor]:
        """Count how often rows occur once for all models whose tables have the same names."""
        tables = self.tables(recipe)
        names = tuple(map(str, tables))
        if names not in self._frequencies:
            self._frequencies[names] = row_frequencies(self.data, tables, recipe.train.batch_size)
        return self._frequencies[names]


def place_of(recipe: Recipe) -> Place:
    """Return the place of a recipe's algorithm, with its settings and its space, at the recipe's first budget."""
    config, space = recipe.search.algorithm, recipe.search.space
    name = f"{config.name}-{_digest({'algorithm': to_plain(config), 'space': to_plain(space)})}"
    return Place(name, recipe.search.budgets[0], "", config)


def with_method(recipe: Recipe, algorithm: SearchConfig, budget: str) -> Recipe:
    """Return a recipe of one method at one budget."""
    search = replace(recipe.search, algorithm=algorithm, baselines=(), budgets=(budget,))
    return replace(recipe, search=search, study=None)


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:12]
