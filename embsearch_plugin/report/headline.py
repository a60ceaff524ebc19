"""The results of a run in a few sentences: who wins at each budget, whoever it is, and whether the lead is one."""

from typing import Any

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.report.inputs import Budget, Metrics, checked
from embsearch_plugin.report.numbers import DIGITS, Estimate, measure
from embsearch_plugin.report.results import Result, common_metric, dense, results, same_seeds
from embsearch_plugin.tasks import Metric, Task


def headline(metrics: Metrics | dict[str, Any]) -> str:
    """Return the sentences of :func:`sentences` as one text.

    Raises:
        RunFolderError: where the content of a ``metrics.json`` does not say what a report needs.
    """
    return " ".join(sentences(checked(metrics)))


def sentences(metrics: Metrics) -> list[str]:
    """Say for each budget which method is best on the test set, then what the dense model reaches and what ± means.

    The best has the best mean over seeds of the task's first metric: of clicks the test AUC, or the log loss where an AUC is
    undefined. It wins if it leads every other by more than the larger of both spreads; those it does not lead by so much are
    named beside it. The recipe's own algorithm is named in any case. Where some have lost seeds, nobody wins.
    """
    found = results(metrics)
    by_budget = [_sentence(metrics, budget, [r for r in found if r.budget == budget]) for budget in metrics.budgets]
    return [*by_budget, _reference(dense(found), metrics.task), *_spread(found)]


def _sentence(metrics: Metrics, budget: Budget, found: list[Result]) -> str:
    tested = [result for result in found if result.chosen]
    metric = common_metric(tested, metrics.task)
    if not tested:
        return f"At {budget.text}, {_nothing(found)}."
    if metric is None:
        names = _listed([result.method for result in tested])
        return f"At {budget.text}, {names} cannot be compared: no test metric is defined for all."
    missing = "".join(f"; {result.method} is {result.missing}" for result in found if result.missing)
    if not same_seeds(tested):
        reached = _listed([f"{r.title} {r.test(metric)} (seeds {', '.join(map(str, r.seeds))})" for r in tested])
        return f"At {budget.text}, nobody wins, since not all have the same seeds: test {metric.name} of {reached}{missing}."
    over = [f"{result.method} is {human_bytes(result.excess)} over" for result in tested if result.excess > 0]
    own = next((result.title for result in tested if result.method == metrics.algorithm), "")
    return f"At {budget.text}, {_verdict(tested, metric, own)}{missing}.{f' But {_listed(over)} the budget.' if over else ''}"


def _nothing(found: list[Result]) -> str:
    if not found:
        return "nothing was run"
    if len({result.missing for result in found}) == 1:
        return f"every method is {found[0].missing}"
    return _listed([f"{result.method} is {result.missing}" for result in found])


def _verdict(tested: list[Result], metric: Metric, own: str) -> str:
    """Compare the results at one budget, all of which are defined in ``metric``; ``own`` is that of the recipe's algorithm."""
    ranked = sorted(
        ((result.title, estimate) for result in tested if (estimate := result.test(metric))),
        key=lambda entry: (-metric.sign * entry[1].mean, entry[0]),
    )
    (best, leader), others = ranked[0], ranked[1:]
    rivals = [(name, other) for name, other in others if _within_spread(leader, other, metric)]
    behind = [(name, other) for name, other in others if (name, other) not in rivals]
    # Of those that are clearly behind: the runner-up if it is one, and the recipe's own algorithm.
    named = [entry for entry in behind if entry[0] == own or entry == others[0]]
    trailing = _listed([f"{measure(_lead(leader, other, metric))} ahead of {name} ({other})" for name, other in named])
    figure = f"test {metric.name} {leader}"
    if rivals:
        verb = "is" if len(rivals) == 1 else "are"
        relation = "equal" if all(other == leader for _, other in rivals) else "within the spread"
        names = _listed([f"{name} ({other})" for name, other in rivals])
        rest = f"; {best} is {trailing}" if named else ""
        return f"no clear winner: {best} has {figure}, and {names} {verb} {relation}{rest}"
    if not others:
        return f"only {best} has a result, {figure}"
    if leader.spread is None:
        return f"{best} is ahead with {figure}, {trailing}"
    return f"{best} wins with {figure}, {trailing}"


def _within_spread(leader: Estimate, other: Estimate, metric: Metric) -> bool:
    """Whether the leader's lead is not larger than the larger of the two spreads."""
    return _lead(leader, other, metric) <= max(leader.spread or 0.0, other.spread or 0.0)


def _lead(leader: Estimate, other: Estimate, metric: Metric) -> float:
    return round(metric.sign * (leader.mean - other.mean), DIGITS)


def _reference(reference: Result | None, task: Task) -> str:
    if reference is None or reference.size is None:
        return "There is no dense model to compare with."
    metric = common_metric([reference], task)
    figure = f"test {metric.name} {reference.test(metric)}" if metric else "no test metric that is defined,"
    return f"The {reference.method} model, the reference, has {figure} at {human_bytes(reference.size)}."


def _spread(found: list[Result]) -> list[str]:
    """Say what the figures after ± are."""
    seeds = {len(result.chosen) for result in found if result.chosen}
    if not seeds:
        return []
    if seeds == {1}:
        return ["One seed: how far seeds differ is not known."]
    counts = f"{max(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return [f"± is the standard deviation over {counts} seeds."]


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
