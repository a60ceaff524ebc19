"""One trial: a recipe with other values, trained, and what its model is worth."""

import re
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import optuna
from torch import nn

from embsearch_plugin.bench.timing import forward, medians
from embsearch_plugin.cells import Place, Row
from embsearch_plugin.data.dataset import Dataset
from embsearch_plugin.errors import BudgetError, ModelError, RecipeError, SessionError, SpaceError, StudyError, did_you_mean
from embsearch_plugin.evaluation import device_of
from embsearch_plugin.recipes import Recipe
from embsearch_plugin.search.objective import move
from embsearch_plugin.study.config import BYTES, LATENCY, METRIC
from embsearch_plugin.study.drawing import prune, suggest
from embsearch_plugin.study.parameters import study_of
from embsearch_plugin.study.pruning import report
from embsearch_plugin.study.workshop import Workshop, place_of
from embsearch_plugin.tasks import Metric, Task
from embsearch_plugin.training import Epoch, Watcher, outermost_collections

CELL, SECONDS, STEPS = "cell", "trained_seconds", "trained_steps"
DOES_NOT_GO = (BudgetError, ModelError, RecipeError, SessionError, SpaceError)
LOOKUPS, BATCHES = 20, 4


def objectives_of(recipe: Recipe, task: Task) -> list[Metric]:
    """Return the study's objectives, each with the direction that is better.

    Raises:
        StudyError: where the task has no such metric.
    """
    by_name = {BYTES: Metric("bytes", "bytes", -1), LATENCY: Metric("latency", "lookup in µs per batch", -1)}
    by_name |= {METRIC: task.metrics[0]} | {metric.key: metric for metric in task.metrics}
    unknown = [name for name in study_of(recipe).objectives if name not in by_name]
    if unknown:
        raise StudyError(f"the task {task.name!r} has no metric {unknown[0]!r}.{did_you_mean(unknown[0], by_name)}")
    return [by_name[name] for name in study_of(recipe).objectives]


class TrialWatcher(Watcher):
    """Counts what a trial trains, and reports the epochs of its compact model to the pruner.

    Searches are not reported: what they validate is the model in its full size, and several trials may share one.

    Args:
        shown: sees everything too.
        trial: Optuna's.
        place: of the trial's cell.
        metric: what is reported; None where nothing is pruned.
    """

    def __init__(self, shown: Watcher, trial: optuna.Trial, place: Place, metric: Metric | None) -> None:
        self._shown, self._trial, self._name = shown, trial, str(place)
        self._spent = {SECONDS: 0.0, STEPS: 0.0}
        self.metric = metric

    def stage(self, name: str, steps: int | None, task: Task) -> None:
        """Show that a stage begins."""
        self._shown.stage(self._readable(name), steps, task)

    def step(self) -> None:
        """Show a step."""
        self._shown.step()

    def _readable(self, name: str) -> str:
        """Return a stage's name with the trial's number in place of the digests that tell its cells from others."""
        return f"trial {self._trial.number} {re.sub('-[0-9a-f]{12}', '', name, count=1)}"

    def epoch(self, name: str, row: Epoch) -> None:
        """Count the epoch; report it, if it is the compact model's."""
        self._shown.epoch(self._readable(name), row)
        for attribute, figure in ((SECONDS, "seconds"), (STEPS, "steps")):
            self._spent[attribute] += row[figure] or 0.0
            self._trial.set_user_attr(attribute, self._spent[attribute])
        value = None if self.metric is None else self.metric.of(row)
        if value is not None and name.startswith(self._name) and "search_steps" not in row:
            report(self._trial, value, int(row["epoch"] or 0))


@dataclass(frozen=True)
class Objective:
    """What Optuna calls with a trial.

    Args:
        recipe: with its study.
        workshop: what trials share.
        watcher: sees every epoch.
    """

    recipe: Recipe
    workshop: Workshop
    watcher: Watcher

    @property
    def objectives(self) -> list[Metric]:
        """What is wanted."""
        return objectives_of(self.recipe, self.workshop.data.schema.task)

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Return the values of the study's objectives: the metric's mean over seeds, the largest of bytes and latency.

        Raises:
            optuna.TrialPruned: where the pruner says so, and where there is no model: no plan within the budget, values that
                do not go together, a training that diverged. The user attribute ``reason`` says why.
        """
        trial.set_user_attr(SECONDS, 0.0)
        drawn, objectives = suggest(trial, self.recipe), self.objectives
        metric = next(each for each in objectives if each.key not in (BYTES, LATENCY))
        watched = TrialWatcher(self.watcher, trial, place_of(drawn), metric if len(objectives) == 1 else None)
        rows = []
        try:
            for seed in drawn.seeds:
                rows.append(self.workshop.make(drawn, seed, watched))
                watched.metric = None  # the pruner compares the epochs of one seed
        except DOES_NOT_GO as error:
            prune(trial, str(error), error)
        except optuna.TrialPruned as pruned:
            prune(trial, str(pruned), pruned)
        return self._values(trial, drawn, rows, objectives)

    def _values(self, trial: optuna.Trial, drawn: Recipe, rows: list[Row], objectives: list[Metric]) -> tuple[float, ...]:
        trial.set_user_attr(CELL, str(self.workshop.path(drawn, rows[0]).relative_to(self.workshop.folder)))
        for row in rows:
            if row["status"] != "done":
                prune(trial, f"{row['status']}: {row['reason']}")
        values = [worth(objective, drawn, rows, self.workshop) for objective in objectives]
        if None in values:
            prune(trial, f"the validation {objectives[values.index(None)].name} is undefined")
        return tuple(value for value in values if value is not None)


def worth(objective: Metric, recipe: Recipe, rows: list[Row], workshop: Workshop) -> float | None:
    """Return the value of an objective for the models of a recipe, one per seed; None where it is undefined."""
    if objective.key == BYTES:
        return float(max(row["bytes"] for row in rows))
    if objective.key == LATENCY:
        cells = [workshop.cells(recipe, row["seed"], Watcher()) for row in rows]
        return max(latency(each.model(row), workshop.data, recipe) for each, row in zip(cells, rows, strict=True))
    values = [objective.of(row["validation"]) for row in rows]
    return None if None in values else fmean(value for value in values if value is not None)


def latency(model: nn.Module, data: Dataset, recipe: Recipe) -> float:
    """Return the median time of looking up a validation batch in all of a model's collections, in microseconds."""
    batches = [move(batch, device_of(model)) for batch in islice(data.batches("validation", recipe.train.batch_size), BATCHES)]
    collections = [forward(collection) for collection in outermost_collections(model.eval())]
    found = medians({str(number): lookup for number, lookup in enumerate(collections)}, batches, LOOKUPS)
    return 1000 * sum(found.values())
