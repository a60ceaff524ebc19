"""Pruning in a loop of one's own, and what a study says it costs."""

from typing import Any

import optuna
import pytest
from support import PLAIN, searched

import embsearch_plugin as es
from embsearch_plugin.errors import SessionError
from embsearch_plugin.study.cost import estimate
from study.conftest import BUDGETS, small


def test_a_session_of_ones_own_is_pruned_by_its_validations() -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.6))
    trial = study.ask()
    _, session, _ = searched(PLAIN, steps=3)
    session.register(es.OptunaPruning(trial, monitor="auc"))
    session.validated({"auc": 0.7, "loss": 1.0})
    with pytest.raises(SessionError, match="no metric 'auc'. Did you mean 'acu'?"):
        session.validated({"acu": 0.7})
    searched_on, step = session.step_count, session.step_count
    assert study.trials[0].intermediate_values == {step: 0.7} and searched_on == 3
    session.step_count += 1
    with pytest.raises(optuna.TrialPruned, match="pruned at step 4, with 0.5"):
        session.validated({"auc": 0.5})


def test_several_objectives_are_not_pruned() -> None:
    trial = optuna.create_study(directions=["maximize", "minimize"]).ask()
    with pytest.raises(SessionError, match="pruning takes a study with one objective; this one has 2"):
        es.OptunaPruning(trial, monitor="auc")


@pytest.mark.parametrize(
    ("fields", "algorithm", "layout", "once", "each"),
    [
        (BUDGETS, "spectral", None, 1, 0.2),
        (BUDGETS, "magnitude", None, 1, 1),
        (BUDGETS, "dnis", None, 2, 1),
        (BUDGETS, "dnis", {}, 1, 2),
        (BUDGETS, "nis", None, 1, 2),  # its search depends on the budget
        ({"dnis.lr": None}, "dnis", None, 1, 2),
        ({"spectral.fine_tuning": None}, "spectral", None, 1, 1),  # its range ends at one dense training
        ({"magnitude.rounds": [1, 3]}, "magnitude", None, 1, 2),  # pruned in rounds, the model trains meanwhile
        ({"train.lr": None}, "magnitude", None, 1, 2),
        ({"train.lr": None}, "uniform", None, 1, 1),
        ({"search.algorithm": ["uniform", "dnis"], "train.lr": None}, "uniform", None, 1, 2),
    ],
)
def test_a_study_says_what_it_costs(fields: dict[str, Any], algorithm: str, layout: Any, once: float, each: float) -> None:
    recipe = small({"fields": fields, "layout": layout}, search={"algorithm": algorithm, "baselines": ["uniform", "dnis"]})
    found = estimate(recipe, 30)
    assert (found.once, found.each, found.baselines) == (once, pytest.approx(each), 3)
    assert found.total == pytest.approx(once + 30 * each + 3)
    assert f"30 trials cost at most {found.total:.3g} plain training runs" in str(found)
    assert "if no search takes longer than one" in str(found)
