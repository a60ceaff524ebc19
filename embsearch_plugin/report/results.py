"""Cells gathered into results: what one method reached at one budget, over all seeds."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from embsearch_plugin.report.inputs import Budget, Cell, Metrics, Number
from embsearch_plugin.report.numbers import Estimate
from embsearch_plugin.tasks import Metric, Score, Task


@dataclass(frozen=True)
class Result:
    """What a method reached at a budget (None for the dense model): all its cells, in the order of the run."""

    method: str
    budget: Budget | None
    cells: list[Cell]

    @property
    def chosen(self) -> list[Cell]:
        """The cells that are the result, one per seed. The others only helped to choose the trial and the allocation."""
        return [cell for cell in self.cells if cell.chosen]

    @property
    def title(self) -> str:
        """The method's name; where another algorithm made the model that it chose, with that: ``spectral (uniform, dim=2)``."""
        allocation = self.chosen[0].allocation if self.chosen else ""
        other = allocation and "=" not in allocation.split(", ")[0]
        return f"{self.method} ({allocation})" if other else self.method

    @property
    def seeds(self) -> list[int]:
        """The seeds of the chosen cells, ascending."""
        return sorted(cell.seed for cell in self.chosen)

    @property
    def missing(self) -> str:
        """The word for why there is no result: ``infeasible``; empty if there is one."""
        if self.chosen:
            return ""
        return next((cell.status for cell in self.cells if not cell.done), "not tested")

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The different trials that were run to their end."""
        trials: list[dict[str, Any]] = []
        for cell in self.cells:
            if cell.done and cell.trial not in trials:
                trials.append(cell.trial)
        return trials

    @property
    def tried(self) -> list[Cell]:
        """What the result was chosen from: the models of all trials and allocations that were trained from the first seed."""
        return [cell for cell in self.cells if cell.seed == self.cells[0].seed and cell.status != "infeasible"]

    @property
    def losers(self) -> list[Cell]:
        """The other allocations that were tried with the chosen training settings."""
        return [cell for cell in self.tried if self.chosen and cell.trial == self.chosen[0].trial and not cell.chosen]

    def test(self, metric: Metric) -> Estimate | None:
        """Return the estimate on the test split, or None where it is undefined."""
        return _estimate(metric, [cell.test for cell in self.chosen])

    def validation(self, metric: Metric) -> Estimate | None:
        """Return the estimate on the validation split, or None where it is undefined."""
        return _estimate(metric, [cell.validation for cell in self.chosen])

    @property
    def size(self) -> Number:
        """Bytes of the embedding tables, mean over seeds."""
        return _mean(cell.bytes for cell in self.chosen)

    @property
    def seconds(self) -> Number:
        """All training that a result costs, mean over seeds, and what the losing allocations cost.

        What a loser that diverged has cost is not known, and not in it. Trials are not in it: all methods try the same.
        """
        mean = _mean(cell.seconds for cell in self.chosen)
        return None if mean is None else mean + sum(cell.seconds or 0.0 for cell in self.losers)

    @property
    def excess(self) -> int:
        """By how many bytes the largest of the models is over the budget."""
        limit = self.budget.bytes if self.budget else None
        return 0 if limit is None else max((cell.bytes - limit for cell in self.chosen if cell.bytes is not None), default=0)


def results(metrics: Metrics) -> list[Result]:
    """Return a result per method and budget: dense first, then by budget as in the run, methods in order of appearance."""
    groups: dict[tuple[str, str | None], list[Cell]] = {}
    for cell in metrics.cells:
        groups.setdefault((cell.method, cell.budget), []).append(cell)
    budgets: dict[str | None, Budget | None] = {None: None, **{budget.text: budget for budget in metrics.budgets}}
    order = {text: place for place, text in enumerate(budgets)}
    return [
        Result(method, budgets[text], cells)
        for (method, text), cells in sorted(groups.items(), key=lambda group: order[group[0][1]])
    ]


def dense(found: Iterable[Result]) -> Result | None:
    """Return the reference, the model without a budget, if it has a result."""
    return next((result for result in found if result.budget is None and result.chosen), None)


def same_seeds(found: Iterable[Result]) -> bool:
    """Whether all results that exist are of the same seeds: means over others do not compare."""
    return len({tuple(result.seeds) for result in found if result.chosen}) <= 1


def common_metric(found: Iterable[Result], task: Task) -> Metric | None:
    """Return the first of the task's metrics that is defined for all results that exist, or None."""
    tested = [result for result in found if result.chosen]
    return next((metric for metric in task.metrics if all(result.test(metric) for result in tested)), None)


def trial_text(trial: dict[str, Any]) -> str:
    """Return a trial's settings as text: ``l2=0.001, lr=0.01``."""
    return ", ".join(f"{name}={value}" for name, value in trial.items())


def _estimate(metric: Metric, scores: list[Score | None]) -> Estimate | None:
    return Estimate.of([metric.of(score) for score in scores])


def _mean(values: Iterable[Number]) -> Number:
    known = list(values)
    return fmean(value for value in known if value is not None) if known and None not in known else None
