"""The result of a run in one sentence, whoever wins."""

from embsearch_plugin.budget import human_bytes
from embsearch_plugin.report.inputs import Budget, Metrics, Model

DIGITS = 4


def headline(metrics: Metrics) -> str:
    """Say how the compact model compares with the dense one on the test set: by AUC, or by log loss without one.

    Differences are those of the printed figures, so what rounds to the same figure is called equal.
    """
    compact, dense = metrics.model("compact"), metrics.model("dense")
    start = f"At a budget of {_budget(metrics.budget)}"
    if compact is None or dense is None:
        return f"{start} there is no pair of a compact and a dense model to compare."
    return f"{start} the compact model{_excess(compact, metrics.budget)} {_comparison(compact, dense)}."


def _comparison(compact: Model, dense: Model) -> str:
    for metric, ours, theirs, sign in (
        ("AUC", compact.test.auc, dense.test.auc, 1),
        ("log loss", compact.test.log_loss, dense.test.log_loss, -1),
    ):
        if ours is not None and theirs is not None:
            figures = f"test {metric} {ours:.{DIGITS}f}, the dense model {theirs:.{DIGITS}f}"
            lead = sign * round(round(ours, DIGITS) - round(theirs, DIGITS), DIGITS)
            return f"has {figures}: {_verdict(compact, dense, lead)}"
    return "cannot be compared with the dense model: no test metric is defined for both"


def _verdict(compact: Model, dense: Model, lead: float) -> str:
    if lead == 0:
        return f"no difference, {_size(compact, dense)}"
    winner, loser = (compact, dense) if lead > 0 else (dense, compact)
    return f"{winner.name} is better by {abs(lead):.{DIGITS}f} {_size(winner, loser)}"


def _size(model: Model, other: Model) -> str:
    if not other.bytes:
        return f"at {human_bytes(model.bytes)} against none"
    ratio = model.bytes / other.bytes
    return f"at {ratio:.1f} times the bytes" if ratio >= 1 else f"at {ratio:.1%} of the bytes"


def _budget(budget: Budget) -> str:
    return budget.text if budget.bytes is None else f"{budget.text} ({human_bytes(budget.bytes)})"


def _excess(model: Model, budget: Budget) -> str:
    excess = 0 if budget.bytes is None else model.bytes - budget.bytes
    return f", {human_bytes(excess)} over it," if excess > 0 else ""
