"""The main job: a matrix of runs, as a recipe says, with a report that names the winner at each budget, whoever it is.

    for each seed:  the dense model, and each method (the recipe's algorithm, and its baselines) at each budget

Every model is trained to convergence by early stopping on the validation split. From the first seed every method tries the
recipe's trials, all of them the same; the one with the best validation loss is kept for that method and budget, and the other
seeds use it. The test split is read once, at the end, by the cells that were chosen.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embsearch_plugin.budget import Budget
from embsearch_plugin.cells import CELL, CHECKPOINTS, COURSE, DENSE, Cells, Row, slug
from embsearch_plugin.data.dataset import Dataset
from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.files import write_json, write_text
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import find_collections, manager
from embsearch_plugin.recipes import Recipe, to_plain, to_yaml
from embsearch_plugin.report.page import write_report
from embsearch_plugin.saving import PLAN
from embsearch_plugin.training import Watcher

Place = tuple[str, str | None]
"""A method and a budget; the dense model has none."""


def run(recipe: Recipe, folder: Path, *, resume: bool = False, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a recipe and write its results into ``folder``; return what ``metrics.json`` holds.

    Writes ``recipe.yaml`` (resolved), a folder per cell (``plan.json`` and its sidecar, ``model.safetensors``, ``cell.json``),
    ``metrics.json`` and ``report.html``. A run that was killed goes on at the last epoch of the cell it was in.

    Raises:
        RunFolderError: where the folder is not empty and ``resume`` is not given, or holds another recipe's run.
    """
    _open_folder(recipe, folder, resume)
    matrix = Matrix(recipe, folder, recipe.data.load(), watcher or Watcher())
    chosen = matrix.choose()
    rows = matrix.cells(chosen)
    metrics = {
        "recipe": to_plain(recipe),
        "versions": _versions(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform()},
        "algorithm": next(iter(recipe.search.methods)),
        "original_bytes": next(row["bytes"] for row in rows if row["method"] == DENSE),
        "budgets": [],
        "cells": rows,
        "course": matrix.course(chosen),
        "rows": matrix.plugin_rows(rows),
    }
    metrics["budgets"] = [_budget(text, metrics["original_bytes"]) for text in recipe.search.budgets]
    write_json(folder / "metrics.json", metrics)
    write_report(folder)
    for checkpoints in folder.glob(f"cells/**/{CHECKPOINTS}"):  # every cell is finished
        shutil.rmtree(checkpoints)
    return metrics


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

    def choose(self) -> dict[Place, int]:
        """Train all trials from the first seed; return, for each method and budget, the number of the best on validation."""
        first, trials = self.recipe.seeds[0], range(len(self.recipe.tune.trials()))
        rows = {(place, trial): self._cell(self.at(first, trial), place) for trial in trials for place in self._places()}
        return {place: min(trials, key=lambda trial: _loss(rows[place, trial])) for place in self._places()}

    def cells(self, chosen: dict[Place, int]) -> list[Row]:
        """Train the chosen trials from the other seeds; return all cells, with the test metrics of the chosen ones."""
        for seed in self.recipe.seeds[1:]:
            for place, trial in chosen.items():
                self._cell(self.at(seed, trial), place)
        return [self._finished(cells, place, chosen) for cells, place in self._recorded()]

    def course(self, chosen: dict[Place, int]) -> list[dict[str, float]]:
        """Return the recorded search steps of the recipe's algorithm: first seed, first budget, the trial chosen there."""
        method, budget = next(iter(self.recipe.search.methods)), self.recipe.search.budgets[0]
        shared = self.at(self.recipe.seeds[0], chosen[method, budget]).folder / slug(method)
        found = [path for path in (shared / COURSE, shared / slug(budget) / COURSE) if path.exists()]
        course: list[dict[str, float]] = json.loads(found[0].read_text(encoding="utf-8")) if found else []
        return course

    def plugin_rows(self, rows: list[Row]) -> dict[str, str]:
        """Return what plugins have to say about the plan of the recipe's algorithm, at the first budget that has one."""
        method = next(iter(self.recipe.search.methods))
        plans = [self.folder / row["folder"] / PLAN for row in rows if row["method"] == method and row["chosen"]]
        found = manager().hook.embsearch_report_rows(plan=SizePlan.load(plans[0])) if plans else []
        return {label: text for some in found for label, text in some.items()}

    @cached_property
    def _frequencies(self) -> dict[str, Tensor]:
        """How often each row occurs in the training split, by table: one pass over it."""
        found = find_collections(self.recipe.model.build(self.data.schema))
        counts = {table: torch.zeros(table.rows, dtype=torch.int64) for each in found for table in each.tables}
        for batch in self.data.batches("train", self.recipe.train.batch_size):
            bags = batch.sparse_features.to_dict()
            for table in counts:
                for feature in table.features:
                    counts[table] += torch.bincount(bags[feature].values(), minlength=table.rows)
        return {str(table): count for table, count in counts.items()}

    def _places(self) -> Iterator[Place]:
        yield DENSE, None
        for method in self.recipe.search.methods:
            for budget in self.recipe.search.budgets:
                yield method, budget

    def _cell(self, cells: Cells, place: Place) -> Row:
        method, budget = place
        return cells.dense() if budget is None else cells.compact(method, budget)

    def _recorded(self) -> Iterator[tuple[Cells, Place]]:
        """Yield every cell that was trained, place by place."""
        for method, budget in self._places():
            for seed in self.recipe.seeds:
                for trial in range(len(self.recipe.tune.trials())):
                    cells = self.at(seed, trial)
                    if (cells.folder / slug(method) / slug(budget or "") / CELL).exists():
                        yield cells, (method, budget)

    def _finished(self, cells: Cells, place: Place, chosen: dict[Place, int]) -> Row:
        row = self._cell(cells, place)
        counts = chosen[place] == cells.number and row["status"] == "done"
        return row | {"chosen": counts, "test": cells.test(row) if counts else None}


def _loss(row: Row) -> float:
    """Return the validation loss that trials are compared by; infeasible cells come last."""
    return float(row["validation"]["log_loss"]) if row["status"] == "done" else float("inf")


def _budget(text: str, original_bytes: int) -> dict[str, Any]:
    return {"text": text, "bytes": Budget.of(text).limit(original_bytes)}


def _open_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    written = folder / "recipe.yaml"
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            raise RunFolderError(
                f"the run folder {folder} exists already and is not empty; nothing in it was touched.\n  Possible solutions: "
                "1) --resume, to go on with a run that was stopped  2) another --out  3) remove the folder."
            )
        if not written.exists() or written.read_text(encoding="utf-8") != to_yaml(recipe):
            raise RunFolderError(
                f"{folder} holds a run of another recipe or other overrides, so it cannot be resumed with this one.\n"
                "  Possible solution: give the same recipe and overrides, or another --out."
            )
    write_text(written, to_yaml(recipe))


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("embsearch-plugin", "torch", "torchrec", "fbgemm-gpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
