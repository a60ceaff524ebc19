"""How each result's training settings were chosen: the validation loss of every trial."""

import math

from embsearch_plugin.report.inputs import Cell, Metrics
from embsearch_plugin.report.numbers import UNDEFINED, measure
from embsearch_plugin.report.results import Result, results, trial_text
from embsearch_plugin.report.rows import Figure
from embsearch_plugin.tasks import Task


def trial_columns(metrics: Metrics) -> list[str]:
    """Return the different trials of a run as text, in order of appearance; none if nothing was tuned."""
    return list(dict.fromkeys(trial_text(cell.trial) for cell in metrics.cells if cell.trial))


def trial_rows(metrics: Metrics) -> list[tuple[str, list[Figure]]]:
    """Return for each method at each budget its name, and its first seed's figure in each trial, the chosen one marked."""
    trials = trial_columns(metrics)
    return [(_name(result), [_figure(result, trial, metrics.task) for trial in trials]) for result in results(metrics)]


def _name(result: Result) -> str:
    return f"{result.method} at {result.budget.text}" if result.budget else result.method


def _figure(result: Result, trial: str, task: Task) -> Figure:
    seed = result.cells[0].seed
    cells = [cell for cell in result.cells if cell.seed == seed and trial_text(cell.trial) == trial]
    if not cells:
        return Figure(UNDEFINED)
    cell = min(cells, key=lambda cell: _loss(cell, task))  # of the allocations that were tried
    if not cell.done:
        return Figure(cell.status, cell.reason or "")
    loss, first = task.loss.of(cell.validation), task.metrics[0].of(cell.validation)
    return Figure(
        UNDEFINED if loss is None else measure(loss),
        "" if first is None else f"validation {task.metrics[0].name} {measure(first)}",
        any(other.trial == cell.trial for other in result.chosen),
    )


def _loss(cell: Cell, task: Task) -> float:
    loss = task.loss.of(cell.validation)
    return math.inf if loss is None else loss
