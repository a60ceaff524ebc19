"""Pruning: trials end early where Optuna's pruner says that they will not be good."""

from collections.abc import Mapping

import optuna

from embsearch_plugin.errors import SessionError, did_you_mean
from embsearch_plugin.hookspecs import hookimpl


class OptunaPruning:
    """An observer for a study of your own: reports each validation of a session to a trial, and prunes it.

    Register it by ``session.register(es.OptunaPruning(trial, monitor="auc"))``, and report what a validation gave by
    ``session.validated({"auc": ...})``. Optuna is asked whether to go on after each; where it is not,
    ``optuna.TrialPruned`` is raised out of ``session.validated``.

    Args:
        trial: Optuna's, of a study with one objective.
        monitor: the metric that the study optimizes, as ``session.validated`` is given it.

    Raises:
        SessionError: where the study has several objectives, with which Optuna does not prune.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        if len(trial.study.directions) > 1:
            raise SessionError(
                f"pruning takes a study with one objective; this one has {len(trial.study.directions)}.\n"
                "  Possible solution: leave OptunaPruning out, or fix the budget and optimize the metric alone."
            )
        self._trial, self._monitor = trial, monitor

    @hookimpl
    def embsearch_validation_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the metric at this weight step."""
        if self._monitor not in metrics:
            raise SessionError(f"the validation has no metric {self._monitor!r}.{did_you_mean(self._monitor, metrics)}")
        report(self._trial, metrics[self._monitor], step)


def report(trial: optuna.Trial, value: float, step: int) -> None:
    """Report an intermediate value; raise ``optuna.TrialPruned`` where the study's pruner wants no more of it."""
    trial.report(value, step)
    if trial.should_prune():
        raise optuna.TrialPruned(f"pruned at step {step}, with {value:.5g}")
