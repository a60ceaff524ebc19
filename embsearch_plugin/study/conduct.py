"""Conducting a study: one process of perhaps several, which asks Optuna for trials until there are enough."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from embsearch_plugin.cells import DENSE, Row
from embsearch_plugin.errors import NonFiniteLoss, RecipeError, RunFolderError, StudyError
from embsearch_plugin.files import locked, write_json, write_text
from embsearch_plugin.machine import begin_to_use
from embsearch_plugin.plain import to_plain
from embsearch_plugin.recipes import Recipe, load_recipe, to_yaml
from embsearch_plugin.report.study import write_study_report
from embsearch_plugin.run_folder import differing
from embsearch_plugin.space import SearchSpace, TableGroup
from embsearch_plugin.study.config import Study, hidden
from embsearch_plugin.study.cost import estimate
from embsearch_plugin.study.drawing import REASON, suggest
from embsearch_plugin.study.parameters import check, study_of
from embsearch_plugin.study.results import STUDY, Findings, described, spent
from embsearch_plugin.study.samplers import pruner_of, sampler_of
from embsearch_plugin.study.storage import alive, explained, name_metrics, retry, retry_lost, storage_of, url_of
from embsearch_plugin.study.trial import STEPS, Objective, objectives_of
from embsearch_plugin.study.workshop import RECIPE, Workshop
from embsearch_plugin.tasks import Metric
from embsearch_plugin.training import Watcher

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
BEGUN_WITH, DATA, JOINED = "recipe", "data", "joined"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conductor:
    """One process that works on a study.

    Several processes join one study by the same recipe, folder and storage. Each goes on until the study has its trials.

    Args:
        recipe: with a section ``study``.
        folder: the run folder.
        watcher: sees every epoch.
        say: is told what the study will cost, each trial's result, and what it cost.
    """

    recipe: Recipe
    folder: Path
    watcher: Watcher
    say: Callable[[str], object] = log.info

    def run(self, trials: int = 0, plain_runs: float | None = None) -> dict[str, Any]:
        """Go on until there are so many trials, write ``study.json`` and ``report.html``, and return what the former holds.

        Args:
            trials: of all processes and days together; failed ones do not count. With 0 there are no more.
            plain_runs: end earlier, once the dense model and the trials have taken as many steps, of weights and of searches,
                as so many plain training runs. Unlike time, that is the same on every machine.

        Raises:
            RecipeError: where something cannot be varied as the study says (lists all problems), or the sampler cannot draw it.
            RunFolderError: where the folder holds something else.
            SpaceError: where a group of the layout is of no table.
            StudyError: where the storage cannot be used, the study was begun with another recipe or other data, or no trial
                has succeeded.
        """
        check(self.recipe)
        begin_to_use(self.recipe.train.device)
        workshop = Workshop(self.recipe.data.load(), self.folder)
        self._check_groups(workshop)
        with explained(self._url):
            study = self._opened(workshop)
            if trials:
                self.say(str(estimate(self.recipe, trials)))
            dense = workshop.dense(replace(self.recipe, study=None), self.watcher)
            if dense["status"] != "done":
                raise NonFiniteLoss(f"the dense model diverged, so there is nothing to compare with. {dense['reason']}")
            self._work(study, Objective(self.recipe, workshop, self.watcher), dense, trials, plain_runs)
            return self._finish(Findings(study, self.recipe, workshop, dense, self.watcher))

    # Beginning, or joining.

    def _check_groups(self, workshop: Workshop) -> None:
        groups = self._study.layout.groups.values() if self._study.layout else ()
        SearchSpace(groups=tuple(map(TableGroup, groups))).check(workshop.tables(self.recipe))

    @property
    def _study(self) -> Study:
        return study_of(self.recipe)

    @property
    def _url(self) -> str:
        return url_of(self._study.storage, self.folder)

    def _opened(self, workshop: Workshop) -> optuna.Study:
        objectives = objectives_of(self.recipe, workshop.data.schema.task)
        directions = [StudyDirection.MAXIMIZE if each.sign > 0 else StudyDirection.MINIMIZE for each in objectives]
        sampler, pruner = sampler_of(self._study), pruner_of(self._study)
        self._check_sampler(directions)
        with locked(self.folder), explained(self._url, ImportError):  # of a driver; later it is that of a user's model
            self._claim_folder()
            study = optuna.create_study(
                storage=storage_of(self._url),
                study_name=self._study.name or self.folder.resolve().name,
                sampler=sampler,
                pruner=pruner,
                directions=directions,
                load_if_exists=True,
            )
            self._claim_study(study, directions, {BEGUN_WITH: _compared(self.recipe), DATA: workshop.fingerprint})
            name_metrics(study, [objective.name for objective in objectives])
            self._join(study)
        return study

    def _check_sampler(self, directions: list[StudyDirection]) -> None:
        """Draw once, in memory: a sampler may take one objective only, or have been given other parameters than the study's."""
        study = optuna.create_study(sampler=sampler_of(self._study), directions=directions)
        try:
            with suppress(optuna.TrialPruned):
                suggest(study.ask(), self.recipe)
        except ValueError as error:
            name = self._study.sampler["name"]
            raise RecipeError(f"{name} cannot draw what this study varies: {error} @ recipe.study.sampler") from error

    def _claim_folder(self) -> None:
        written = self.folder / RECIPE
        if (self.folder / "cells").exists():
            raise RunFolderError(f"{self.folder} holds a run, whose report is kept.\n  Possible solution: another --out.")
        if not written.exists():
            if any(self.folder.iterdir()):
                raise RunFolderError(
                    f"{self.folder} is not empty and holds no study; nothing in it was touched.\n"
                    "  Possible solution: another --out."
                )
            write_text(written, to_yaml(self.recipe))
        elif difference := differing(_compared(load_recipe(written)), _compared(self.recipe)):
            raise RunFolderError(
                f"{self.folder} holds a run or a study of another recipe or other overrides; there and here: {difference}.\n"
                "  Possible solution: give the same recipe and overrides, or another --out."
            )

    def _claim_study(self, study: optuna.Study, directions: list[StudyDirection], begun: dict[str, str]) -> None:
        where = f"the study {study.study_name!r} in {hidden(self._url)}"
        foreign = study.get_trials(deepcopy=False) or study.directions != directions  # with none, one made by hand will do
        if foreign and BEGUN_WITH not in study.user_attrs:
            raise StudyError(
                f"{where} was not begun by embsearch: it has trials, or other directions than "
                f"{', '.join(each.name.lower() for each in directions)}.\n  Possible solution: another study.name."
            )
        for key, value in begun.items():
            there = study.user_attrs.get(key, value)
            if there != value:
                what = differing(there, value) if key == BEGUN_WITH else "the data is not what it was"
                raise StudyError(
                    f"{where} was begun with another space or other settings, so its trials do not compare; there and here: "
                    f"{what}.\n  Possible solutions: 1) the same recipe, overrides and data  2) another study.name or --out."
                )
            study.set_user_attr(key, value)

    def _join(self, study: optuna.Study) -> None:
        """Count this process. A sampler's seed holds for the first: the others would draw the same again."""
        joined = int(study.user_attrs.get(JOINED, 0))
        if joined:
            study.sampler.reseed_rng()
        study.set_user_attr(JOINED, joined + 1)

    # Trials.

    def _work(self, study: optuna.Study, objective: Objective, dense: Row, trials: int, plain_runs: float | None) -> None:
        """Take trials, one by one. Counting them and asking for the next is done by one process of the folder at a time."""
        limit = float("inf")
        if plain_runs is not None:
            limit = (plain_runs - 1) * sum(epoch["steps"] for epoch in dense["stages"][DENSE])
        while True:
            with ExitStack() as claim, ExitStack() as life:
                claim.enter_context(locked(self.folder))
                for number in retry_lost(study, self.folder, own=self._study.storage is None):
                    self.say(f"trial {number} was lost with its process, and is tried again")
                if len(study.get_trials(deepcopy=False, states=COUNTED)) >= trials or spent(study, STEPS) >= limit:
                    return
                self._take(study, objective, claim, life)

    def _take(self, study: optuna.Study, objective: Objective, claim: ExitStack, life: ExitStack) -> None:
        """Take one trial; what is stopped in the middle of it is queued again."""
        taken: list[optuna.Trial] = []

        def evaluate(trial: optuna.Trial) -> tuple[float, ...]:
            taken.append(trial)
            life.enter_context(alive(trial, self.folder))
            claim.close()  # others may ask for trials from now on
            return objective(trial)

        try:
            study.optimize(evaluate, n_trials=1, callbacks=[lambda _, done: self._tell(done, objective.objectives)])
        except (KeyboardInterrupt, OSError):
            with suppress(Exception):  # the storage may be what failed; then the trial is found lost the next time
                retry(study, study.get_trials(deepcopy=False)[taken[0].number])
            raise

    def _tell(self, trial: FrozenTrial, objectives: list[Metric]) -> None:
        done = trial.state == TrialState.COMPLETE
        what = described(trial.values, objectives) if done else f"pruned: {trial.user_attrs.get(REASON)}"
        self.say(f"trial {trial.number}  {what}  {dict(trial.params)}")

    # The end.

    def _finish(self, findings: Findings) -> dict[str, Any]:
        trials = findings.trials()
        if findings.chosen(trials) is None:
            raise StudyError(f"no trial has succeeded yet. {_reasons(trials)}")
        content = findings.collect()
        write_json(self.folder / STUDY, content)
        write_study_report(self.folder)
        return content


def _compared(recipe: Recipe) -> str:
    """Return what must be the same for trials to compare: not where the data and the study are, nor how it samples."""
    content = {name: part for name, part in to_plain(recipe).items() if name != "data"}
    if recipe.study is not None:
        content["study"] = {name: content["study"][name] for name in ("fields", "layout", "objectives")}
    return yaml.safe_dump(content, sort_keys=False)


def _reasons(trials: list[dict[str, Any]]) -> str:
    if not trials:
        return "There was none.\n  Possible solution: --trials N."
    unknown = {"running": "by another process"}
    found = Counter(f"{t['state']}: {t['reason'] or unknown.get(t['state'], 'stopped, or by an error')}" for t in trials)
    listed = "; ".join(f"{count} x {reason}" for reason, count in found.most_common(5))
    return f"Of {len(trials)}: {listed}"
