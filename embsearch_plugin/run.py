"""The main job: a matrix of runs, as a recipe says, with a report that names the winner at each budget, whoever it is.

    for each seed:  the dense model, and each method (the recipe's algorithm, and its baselines) at each budget

Every model is trained to convergence by early stopping on the validation split. From the first seed every method tries the
recipe's trials, all of them the same, and in each trial all of its allocations (grid and random search have several); what has
the best validation loss is kept for that method and budget, and the other seeds use it. The test split is read once, at the
end, by the cells that were chosen.
"""

import math
import shutil
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.cells import CHECKPOINTS, DENSE, DENSE_MODEL, Cells, Place, Row
from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.data.dataset import Dataset, Split
from embsearch_plugin.errors import BudgetError, DataError, NonFiniteLoss, RecipeError
from embsearch_plugin.files import write_json
from embsearch_plugin.machine import begin_to_use, machine, versions
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import find_collections, manager
from embsearch_plugin.randomness import private_random
from embsearch_plugin.recipes import Recipe, recorded, settings
from embsearch_plugin.report.page import write_report
from embsearch_plugin.run_folder import check_folder, opened
from embsearch_plugin.saving import PLAN
from embsearch_plugin.search.tables import check_fused_widths
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.training import Watcher

Contest = tuple[str, str | None]
"""A method and a budget (the dense model has none): what one result is of."""

Choice = tuple[int, Place]
"""The number of a trial, and an allocation."""


def run(recipe: Recipe, folder: Path, *, resume: bool = False, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a recipe and write its results into ``folder``; return what ``metrics.json`` holds.

    Writes ``recipe.yaml`` (resolved), a folder per cell (``plan.json`` and its sidecar, ``model.safetensors``, ``cell.json``),
    ``metrics.json`` and ``report.html``. A run that was killed goes on at the last epoch of the cell it was in.

    Raises:
        RunFolderError: where the folder is not empty and ``resume`` is not given, where it holds another recipe's run or one
            on other data, or while another process runs in it.
        NonFiniteLoss: where the dense model diverges in every trial.
        StackError: where the recipe's device is not there.
    """
    check_folder(recipe, folder, resume)
    begin_to_use(recipe.train.device)
    data = recipe.data.load()
    with opened(recipe, folder, data):
        matrix = Matrix(recipe, folder, data, watcher or Watcher())
        matrix.check()
        chosen = matrix.train_trials()
        matrix.train_other_seeds(chosen)
        metrics = _metrics(matrix, chosen)
        write_json(folder / "metrics.json", metrics)
        write_report(folder)
        for checkpoints in folder.glob(f"cells/**/{CHECKPOINTS}"):  # every cell is finished
            shutil.rmtree(checkpoints)
    return metrics


def _metrics(matrix: "Matrix", chosen: dict[Contest, Choice]) -> dict[str, Any]:
    rows = matrix.rows(chosen)
    return {
        "recipe": recorded(matrix.recipe),
        "versions": versions(),
        "machine": machine(),
        "algorithm": next(iter(matrix.recipe.search.methods)),
        "task": matrix.data.schema.task.name,
        "original_bytes": matrix.original_bytes,
        "budgets": [{"text": text, "bytes": _bytes(text, matrix.original_bytes)} for text in matrix.recipe.search.budgets],
        "cells": rows,
        "course": matrix.course(chosen),
        "rows": matrix.plugin_rows(rows),
    }


def _bytes(text: str, original: int) -> int | None:
    budget = Budget.of(text)
    return budget.limit(original) if budget.unit is Unit.BYTES else None


@dataclass(frozen=True)
class Matrix:
    """All cells of a recipe, in one folder."""

    recipe: Recipe
    folder: Path
    data: Dataset
    watcher: Watcher

    def at(self, seed: int, trial: int) -> Cells:
        """Return the cells of a seed and a trial, by the trial's number."""
        settings = self.recipe.tune.trials()[trial]
        return Cells(self.recipe, self.data, seed, settings, trial, self.folder, self.watcher, lambda: self._frequencies)

    def check(self) -> None:
        """Find what cannot work before hours are spent.

        Raises:
            SpaceError: where a method, the space, or fused kernels do not fit the tables.
            DataError: where a split holds no examples.
            RecipeError: where the training is too short for a search to come to a plan.
        """
        for config in self.recipe.search.methods.values():
            space = config.space(self.recipe.search.space)
            config.check(self._tables, space)
            if self.recipe.train.fused:
                check_fused_widths(self._tables, space)
        for split in get_args(Split):
            if not any(len(batch.labels) for batch in islice(self.data.batches(split, 1), 1)):
                raise DataError(f"every split must hold examples; {split!r} holds none. Try: more data, or other fractions.")
        for name, config in self.recipe.search.methods.items():
            self._check_steps(name, config)

    def _check_steps(self, name: str, config: SearchConfig) -> None:
        train, batches = self.recipe.train, self.data.batches("train", self.recipe.train.batch_size)
        least = config.least_weight_steps
        if config.trains and isinstance(batches, Sized) and (steps := train.epochs * len(batches)) < least:
            raise RecipeError(
                f"{name} must have {least:,} weight steps to come to a plan; {train.epochs} epochs of {len(batches):,} batches "
                f"are {steps:,}.\n  Possible solutions: 1) more train.epochs  2) a smaller train.batch_size  3) a smaller "
                "warm_up or every of the algorithm."
            )

    def train_trials(self) -> dict[Contest, Choice]:
        """Train all trials from the first seed; return, for each method and budget, what is best on validation."""
        first = [self.at(self.recipe.seeds[0], trial) for trial in self._trials]
        dense = [cells.get(DENSE_MODEL) for cells in first]
        if all(row["status"] != "done" for row in dense):
            raise NonFiniteLoss(
                f"the dense model diverged in every trial, so there is nothing to compare with. {dense[0]['reason']}"
            )
        losses = {
            contest: {(cells.number, place): self._loss(cells.get(place)) for cells in first for place in places}
            for contest, places in self._contests.items()
        }
        return {contest: min(tried, key=tried.__getitem__) for contest, tried in losses.items()}

    def train_other_seeds(self, chosen: dict[Contest, Choice]) -> None:
        """Train what was chosen from the other seeds."""
        for seed in self.recipe.seeds[1:]:
            for trial, place in chosen.values():
                self.at(seed, trial).get(place)

    def rows(self, chosen: dict[Contest, Choice]) -> list[Row]:
        """Return all cells, result by result, with the test metrics of the chosen ones; reads the test split."""
        return [self._row(cells, place, chosen) for cells, place in self._counting(chosen)]

    def course(self, chosen: dict[Contest, Choice]) -> list[dict[str, float]]:
        """Return the recorded search steps of the recipe's algorithm: first seed, first budget, what was chosen there."""
        trial, place = chosen[next(iter(self.recipe.search.methods)), self.recipe.search.budgets[0]]
        return self.at(self.recipe.seeds[0], trial).course(place)

    def plugin_rows(self, rows: list[Row]) -> dict[str, str]:
        """Return what plugins have to say about the plan of the recipe's algorithm, at the first budget that has one."""
        method = next(iter(self.recipe.search.methods))
        plans = [self.folder / row["folder"] / PLAN for row in rows if row["method"] == method and row["chosen"]]
        found = manager().hook.embsearch_report_rows(plan=SizePlan.load(plans[0])) if plans else []
        return {label: text for some in found for label, text in some.items()}

    @property
    def original_bytes(self) -> int:
        """Weight bytes of the dense model's tables."""
        return sum(table.size_bytes for table in self._tables)

    @cached_property
    def _tables(self) -> list[Table]:
        with private_random(0):
            found = find_collections(self.recipe.model.build(self.data.schema))
        return [table for each in found for table in each.tables]

    @cached_property
    def _frequencies(self) -> dict[str, Tensor]:
        return row_frequencies(self.data, self._tables, self.recipe.train.batch_size)

    @property
    def _trials(self) -> range:
        return range(len(self.recipe.tune.trials()))

    @cached_property
    def _contests(self) -> dict[Contest, list[Place]]:
        """The allocations that each method tries at each budget."""
        search = self.recipe.search
        return {(DENSE, None): [DENSE_MODEL]} | {
            (method, budget): self._allocations(method, budget) for method in search.methods for budget in search.budgets
        }

    def _allocations(self, method: str, budget: str) -> list[Place]:
        config = self.recipe.search.methods[method]
        tried = allocations_of(config, self._tables, budget, self.recipe.search.space)
        return [Place(method, budget, _told_apart(each, config), each) for each in tried]

    def _counting(self, chosen: dict[Contest, Choice]) -> Iterator[tuple[Cells, Place]]:
        """Yield, result by result, all that was tried from the first seed, and what was chosen from the others."""
        first, *others = self.recipe.seeds
        for contest, places in self._contests.items():
            yield from ((self.at(first, trial), place) for trial in self._trials for place in places)
            trial, place = chosen[contest]
            yield from ((self.at(seed, trial), place) for seed in others)

    def _row(self, cells: Cells, place: Place, chosen: dict[Contest, Choice]) -> Row:
        row = cells.get(place)
        counts = chosen[place.method, place.budget] == (cells.number, place) and row["status"] == "done"
        return row | {"chosen": counts, "test": cells.test(row) if counts else None}

    def _loss(self, row: Row) -> float:
        """Return the validation loss that trials are compared by; infeasible cells come last."""
        loss = self.data.schema.task.loss.of(row["validation"])
        return math.inf if loss is None else loss


def allocations_of(
    config: SearchConfig, tables: Sequence[Table], budget: str, space: SearchSpace | None
) -> Sequence[SearchConfig]:
    """Return what a method tries within a budget; itself where nothing fits: its search then says why it is infeasible."""
    try:
        return config.allocations(tables, Budget.of(budget), config.space(space))
    except BudgetError:
        return [config]


def row_frequencies(data: Dataset, tables: list[Table], batch_size: int) -> dict[str, Tensor]:
    """Count how often examples of the training split look each row up, by table: one pass over it."""
    counts = {table: torch.zeros(table.rows, dtype=torch.int64) for table in tables}
    for batch in data.apart().batches("train", batch_size):
        bags = batch.sparse_features.to_dict()
        for table in counts:
            for feature in table.features:
                counts[table] += torch.bincount(bags[feature].values(), minlength=table.rows)
    return {str(table): count for table, count in counts.items()}


def _told_apart(allocation: SearchConfig, method: SearchConfig) -> str:
    """Name an allocation by what is not the method's own: another algorithm, other settings. The method itself has no name."""
    other = [allocation.name] if allocation.name != method.name else []
    return ", ".join([*other, *(text for text in settings(allocation) if text not in settings(method))])
