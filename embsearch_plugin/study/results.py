"""What a study has found so far, as plain data: the content of ``study.json``, which reports are made of."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from embsearch_plugin.cells import DENSE, Row
from embsearch_plugin.costs import human_bytes
from embsearch_plugin.machine import machine, versions
from embsearch_plugin.recipes import Recipe, recorded
from embsearch_plugin.run import allocations_of
from embsearch_plugin.study.drawing import REASON
from embsearch_plugin.study.front import front, knee
from embsearch_plugin.study.trial import CELL, SECONDS, objectives_of, worth
from embsearch_plugin.study.workshop import Workshop, with_method
from embsearch_plugin.tasks import Metric
from embsearch_plugin.training import Watcher

STUDY = "study.json"
KNEE = (
    "the knee of the front: the trial nearest to having the best of every objective, each scaled from its best to its worst on "
    "the front, bytes and latency by their logarithm"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """A study, and what is needed to tell of it.

    Args:
        study: Optuna's.
        recipe: with its study.
        workshop: where its models are.
        dense: the dense model's cell.
        watcher: sees the training of the baselines.
    """

    study: optuna.Study
    recipe: Recipe
    workshop: Workshop
    dense: Row
    watcher: Watcher

    def collect(self) -> dict[str, Any]:
        """Return everything; train the baselines, if that was not done."""
        trials, references = self.trials(), self._references()
        chosen = self.chosen(trials)
        return {
            "recipe": recorded(self.recipe),
            "versions": versions(),
            "machine": machine(),
            "objectives": [{"key": o.key, "name": o.name, "sign": o.sign} for o in self.objectives],
            "task": self.workshop.data.schema.task.name,
            "trials": trials,
            "references": references,
            "chosen": chosen,
            "how": KNEE if len(self.objectives) > 1 else f"the best validation {self.objectives[0].name}",
            "test": self._tests(trials, chosen),
            "importances": self._importances(),
            "cost": self._cost(references),
        }

    @property
    def objectives(self) -> list[Metric]:
        """What is wanted."""
        return objectives_of(self.recipe, self.workshop.data.schema.task)

    def trials(self) -> list[dict[str, Any]]:
        """Return every trial, and whether it is on the front; with one objective that is the best."""
        signs, found = [o.sign for o in self.objectives], self.study.get_trials(deepcopy=False)
        done = [trial for trial in found if trial.state == TrialState.COMPLETE]
        best = {done[place].number for place in front([trial.values for trial in done], signs)}
        return [_plain(trial) | {"front": trial.number in best} for trial in found if trial.state != TrialState.WAITING]

    def chosen(self, trials: list[dict[str, Any]]) -> int | None:
        """Return the number of the suggested trial: the knee of the front, or the best; None where none is complete."""
        best = [trial for trial in trials if trial["front"]]
        if not best:
            return None
        return int(best[knee([trial["values"] for trial in best], [o.sign for o in self.objectives])]["number"])

    def _references(self) -> list[dict[str, Any]]:
        """Return the dense model and the baselines, with the recipe's own settings.

        Of a method that tries several allocations, as a grid does, one is trained: as in a session of one's own.
        """
        found = [self._reference("dense", with_method(self.recipe, self.recipe.search.algorithm, "100%"), self.dense)]
        for config in self.recipe.search.baselines:
            for budget in self.recipe.search.budgets:
                recipe = with_method(self.recipe, config, budget)
                row = self.workshop.make(recipe, recipe.seeds[0], self.watcher)
                tried = allocations_of(config, self.workshop.tables(recipe), budget, recipe.search.space)
                found.append(self._reference(f"{config.name} at {budget}", recipe, row) | {"allocations": len(tried)})
        return found

    def _reference(self, name: str, recipe: Recipe, row: Row) -> dict[str, Any]:
        done = row["status"] == "done"
        values = [worth(objective, recipe, [row], self.workshop) for objective in self.objectives] if done else None
        own = [epoch for stage, epochs in row["stages"].items() if stage != DENSE or name == DENSE for epoch in epochs]
        seconds = sum(epoch["seconds"] or 0.0 for epoch in own)
        return {"name": name, "values": values, "reason": row["reason"], "seconds": seconds}

    def _tests(self, trials: list[dict[str, Any]], chosen: int | None) -> dict[str, Any]:
        """Return the test metrics of the dense model and of the chosen trial; no other model reads that split."""
        cells = self.workshop.cells(self.recipe, self.recipe.seeds[0], Watcher())
        found: dict[str, Any] = {"dense": cells.test(self.dense)}
        cell = next((trial["cell"] for trial in trials if trial["number"] == chosen), None)
        if cell is not None and (self.workshop.folder / cell).exists():
            found["chosen"] = self.workshop.test(cell)
        return found

    def _importances(self) -> dict[str, dict[str, float]]:
        """Return how much each parameter that all complete trials have says of each objective (PED-ANOVA), summing to one."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) <= 2 or not set.intersection(*(set(trial.params) for trial in done)):
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {
                objective.name: get_param_importances(
                    self.study, evaluator=PedAnovaImportanceEvaluator(), target=_Badness(place, objective.sign)
                )
                for place, objective in enumerate(self.objectives)
            }

    def _cost(self, references: list[dict[str, Any]]) -> dict[str, float]:
        """Return what was trained, in plain training runs, and the seconds of one."""
        plain = float(self.dense["seconds"]) or 1.0
        baselines = sum(reference["seconds"] for reference in references[1:])
        return {"seconds_of_one": plain, "trials": spent(self.study) / plain, "baselines": baselines / plain}


@dataclass(frozen=True)
class _Badness:
    """How bad a trial is in one objective: PED-ANOVA asks which parameters make it low."""

    place: int
    sign: int

    def __call__(self, trial: FrozenTrial) -> float:
        return float(-self.sign * trial.values[self.place])


def spent(study: optuna.Study, attribute: str = SECONDS) -> float:
    """Return the seconds of training that the trials took, of failed ones too; or the steps."""
    return sum(float(trial.user_attrs.get(attribute, 0.0)) for trial in study.get_trials(deepcopy=False))


def _plain(trial: FrozenTrial) -> dict[str, Any]:
    done = trial.state == TrialState.COMPLETE
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": list(trial.values) if done else None,
        "params": dict(trial.params),
        "reason": trial.user_attrs.get(REASON),
        "seconds": trial.user_attrs.get(SECONDS, 0.0),
        "cell": trial.user_attrs.get(CELL),
    }


def described(values: list[float], objectives: list[Metric]) -> str:
    """Return values with the names of their objectives."""
    parts = [
        human_bytes(int(value)) if objective.key == "bytes" else f"{objective.name} {value:.4g}"
        for value, objective in zip(values, objectives, strict=True)
    ]
    return ", ".join(parts)
