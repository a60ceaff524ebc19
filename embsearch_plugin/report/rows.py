"""The results as rows of text. The terminal, the HTML page and the Markdown table show these, so they cannot disagree."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.report.inputs import Cell, Metrics, Number
from embsearch_plugin.report.numbers import UNDEFINED, Estimate, measure, percent, ratio
from embsearch_plugin.report.results import Result, dense, results, same_seeds, trial_text
from embsearch_plugin.tasks import Metric, Task


@dataclass(frozen=True)
class Figure:
    """What stands in one field of the table: its text, what rounding hides in it, and whether it is the budget's best."""

    text: str
    exact: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A method at a budget (empty for the dense model): its figures, by column."""

    budget: str
    figures: dict[str, Figure]


_COST = ("embedding bytes", "of dense", "time / dense", "seeds")


def narrow_columns(metrics: Metrics) -> list[str]:
    """Return the names of the columns that fit 80 characters: of the task's metrics the first two."""
    return ["method", "budget", *map(_test, metrics.task.metrics[:2]), *_COST]


def columns(metrics: Metrics) -> list[str]:
    """Return the names of all columns; those of allocations and of trials only if the run has several."""
    several = ["allocation"] if any(cell.allocation for cell in metrics.cells) else []
    tuned = ["trial", "trials run"] if any(cell.trial for cell in metrics.cells) else []
    return [
        "method",
        "budget",
        *map(_test, metrics.task.metrics),
        _val(metrics.task),
        *_COST[:-1],
        "training runs",
        _COST[-1],
        *several,
        *tuned,
    ]


def _test(metric: Metric) -> str:
    return f"test {metric.name}"


def _val(task: Task) -> str:
    return f"val {task.metrics[0].name}"


def result_rows(metrics: Metrics) -> list[Row]:
    """Return a row for each method at each budget, dense first, grouped by budget."""
    found = results(metrics)
    seeds = len({cell.seed for cell in metrics.cells})
    reference = dense(found)
    return [_row(result, metrics, reference, seeds, _best(result, found, metrics.task)) for result in found]


def footnotes(metrics: Metrics) -> list[str]:
    """Return why models have no figures, and which did not converge: a line for each reason of each result."""
    notes: list[str] = []
    for result in results(metrics):
        missing = [(cell.status, _reason(cell)) for cell in result.cells if not cell.done]
        at = result.method + (f" at {result.budget.text}" if result.budget else "")
        some = "" if len(missing) == len(result.cells) else f", {len(missing)} of its {len(result.cells)} models"
        notes += [f"{at}{some}: {status}, {reason}" for status, reason in dict.fromkeys(missing)]
        capped = sorted({stage for cell in result.chosen for stage in cell.capped})
        notes += [f"{at}: not converged, {', '.join(capped)} ended at the last epoch allowed"] if capped else []
    return notes


def _reason(cell: Cell) -> str:
    return " ".join((cell.reason or "no reason given").split())


def _best(result: Result, found: Iterable[Result], task: Task) -> set[Metric]:
    """Return the metrics in which no other method at the result's budget is better; none if there is no other.

    Nor are there any where not all have the same seeds.
    """
    rivals = [other for other in found if other.budget == result.budget and other is not result]
    if not same_seeds([result, *rivals]):
        return set()
    return {metric for metric in task.metrics if _leads(result.test(metric), metric, rivals)}


def _leads(ours: Estimate | None, metric: Metric, rivals: list[Result]) -> bool:
    theirs = [estimate.mean for rival in rivals if (estimate := rival.test(metric))]
    return ours is not None and bool(theirs) and all(metric.sign * (ours.mean - mean) >= 0 for mean in theirs)


def _row(result: Result, metrics: Metrics, reference: Result | None, seeds: int, best: set[Metric]) -> Row:
    first, *others = metrics.task.metrics
    figures = {
        "method": Figure(result.method),
        "budget": _budget(result),
        _test(first): _missing(result) or _tested(result, first, best),
        **{_test(metric): _tested(result, metric, best) for metric in others},
        _val(metrics.task): _validated(result, first),
        "embedding bytes": _size(result),
        "of dense": Figure(UNDEFINED if result.size is None else percent(result.size, metrics.original_bytes)),
        "time / dense": _time(result, reference),
        "training runs": Figure(str(len(result.tried)) if result.tried else UNDEFINED),
        "seeds": _seeds(result, seeds),
        "allocation": _allocation(result, metrics.task.loss),
        "trial": Figure(next((trial_text(cell.trial) for cell in result.chosen), "") or UNDEFINED),
        "trials run": Figure(str(len(result.trials)), "; ".join(filter(None, map(trial_text, result.trials)))),
    }
    return Row(result.budget.text if result.budget else "", figures)


def _budget(result: Result) -> Figure:
    if result.budget is None:
        return Figure(UNDEFINED)
    return Figure(result.budget.text, "" if result.budget.bytes is None else f"{result.budget.bytes:,} bytes")


def _missing(result: Result) -> Figure | None:
    if not result.missing:
        return None
    return Figure(result.missing, "; ".join(dict.fromkeys(_reason(cell) for cell in result.cells if not cell.done)))


def _tested(result: Result, metric: Metric, best: set[Metric]) -> Figure:
    estimate = result.test(metric)
    if estimate is None:
        return Figure(UNDEFINED)
    exact = _by_seed(result.chosen, [metric.of(cell.test) for cell in result.chosen])
    return Figure(str(estimate), exact, metric in best)


def _validated(result: Result, metric: Metric) -> Figure:
    estimate = result.validation(metric)
    return Figure(UNDEFINED) if estimate is None else Figure(measure(estimate.mean), str(estimate))


def _size(result: Result) -> Figure:
    if result.size is None:
        return Figure(UNDEFINED)
    sizes = [cell.bytes for cell in result.chosen]
    same = len(set(sizes)) == 1
    return Figure(human_bytes(result.size), f"{sizes[0]:,} bytes" if same else _by_seed(result.chosen, sizes))


def _time(result: Result, reference: Result | None) -> Figure:
    seconds = [None if cell.seconds is None else f"{cell.seconds:,.1f} s, {cell.epochs} epochs" for cell in result.chosen]
    lost = [f"{len(result.losers)} losing allocations: {sum(cell.seconds or 0.0 for cell in result.losers):,.1f} s"]
    exact = "; ".join([_by_seed(result.chosen, seconds), *(lost if result.losers else [])])
    return Figure(ratio(result.seconds, reference.seconds if reference else None), exact)


def _allocation(result: Result, loss: Metric) -> Figure:
    """Return the chosen allocation; behind it the validation loss of all with the chosen training settings."""
    if not result.chosen or not result.chosen[0].allocation:
        return Figure(UNDEFINED)
    known = [(cell, loss.of(cell.validation)) for cell in (result.chosen[0], *result.losers)]
    losses = [f"{cell.allocation}: {cell.status if value is None else measure(value)}" for cell, value in known]
    return Figure(result.chosen[0].allocation, f"validation {loss.name}, {'; '.join(losses)}")


def _seeds(result: Result, seeds: int) -> Figure:
    if not result.chosen:
        return Figure(UNDEFINED)
    done = len(result.chosen)
    return Figure(f"{done}" if done == seeds else f"{done}/{seeds}", ", ".join(str(cell.seed) for cell in result.chosen))


def _by_seed(cells: list[Cell], values: Sequence[Number | str]) -> str:
    """Return the value of each seed, as far as it is known."""
    known = [(cell.seed, value) for cell, value in zip(cells, values, strict=True) if value is not None]
    return "; ".join(f"seed {seed}: {f'{value:,}' if isinstance(value, int) else value}" for seed, value in known)
