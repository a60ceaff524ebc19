"""The cells of a matrix of runs: one allocation of a method at one budget, from one seed, with one trial's settings.

What several cells need is trained once and kept beside them: the dense model, and a search that serves every budget.

    dense/                          the model as it is, trained to convergence
    METHOD/                         the searched model's checkpoints and course, where one search serves every budget
    METHOD/BUDGET/                  the compact model, trained on or anew: plan.json, model.safetensors, cell.json
    METHOD/ALLOCATION/...           the same for each allocation, where a method tries several
    ALGORITHM/SETTINGS/             an allocation that is the same at every budget, and for all methods that try it

A cell that is finished has a ``cell.json``, and is never trained again. One that was stopped goes on at its last epoch. Where
several processes want one cell, or one search, the first trains it and the others wait.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.data.dataset import Batches, Dataset, Split
from embsearch_plugin.decorator import prepare
from embsearch_plugin.errors import BudgetError, NonFiniteLoss
from embsearch_plugin.evaluation import evaluate
from embsearch_plugin.files import locked, read_json, read_state, write_json, write_state
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.machine import clock
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.recipes import OPTIMIZERS, Fused, Recipe, Train, settings
from embsearch_plugin.saving import PLAN, WEIGHTS, apply, load, save
from embsearch_plugin.search.session import Session
from embsearch_plugin.tasks import Score
from embsearch_plugin.training import Epoch, Stage, Watcher, best_path, converge

CELL, CHECKPOINTS, COURSE, DENSE, TEST = "cell.json", "checkpoints", "course.json", "dense", "test.json"
REPORTED_POINTS = 400
Row = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """How a stage of training went: a row per epoch, and whether it ended because the epochs were used up."""

    history: list[Epoch]
    capped: bool


Stages = dict[str, Trained]


@dataclass(frozen=True)
class Place:
    """What a cell is of.

    Args:
        method: the method's name.
        budget: as the recipe writes it; None for the dense model.
        allocation: what tells this allocation from the others that the method tries; empty where it tries one.
        config: the algorithm that makes the allocation; None for the dense model.
    """

    method: str
    budget: str | None = None
    allocation: str = ""
    config: SearchConfig | None = field(default=None, compare=False)  # another package's may be one that cannot be hashed

    def __str__(self) -> str:
        return " ".join(filter(None, [self.method, self.allocation, self.budget]))


DENSE_MODEL = Place(DENSE)


@dataclass(frozen=True)
class Cells:
    """The cells of one seed and one trial.

    Args:
        recipe: what is run.
        data: its data, loaded.
        seed: of weights, batches and searches.
        trial: the training settings that are tried, by name.
        number: the trial's.
        root: the run folder.
        watcher: sees every epoch.
        frequencies: how often each row occurs in the training split, by table.
    """

    recipe: Recipe
    data: Dataset
    seed: int
    trial: Mapping[str, Any]
    number: int
    root: Path
    watcher: Watcher
    frequencies: Callable[[], Mapping[str, Tensor]]

    def get(self, place: Place) -> Row:
        """Return a cell; train it, if that was not done.

        Raises:
            RunFolderError: where its record is damaged.
        """
        folder = self._folder_of(place)
        with locked(folder):
            if not (folder / CELL).exists():
                (folder / TEST).unlink(missing_ok=True)  # of a model that is gone
                write_json(folder / CELL, self._dense() if place.config is None else self._compact(place, place.config))
        if place.config is not None:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # no other cell needs them
        row: Row = read_json(folder / CELL)
        return row | self._named(place)  # an allocation that several methods and budgets share is recorded once

    def test(self, row: Row) -> Score:
        """Return how good a finished cell's model is on the test split; None for what is no number. Nothing else reads that."""
        folder = self.root / row["folder"]
        if not (folder / TEST).exists():
            score = self._evaluate(self.model(row), "test")
            write_json(folder / TEST, {name: v if v is not None and isfinite(v) else None for name, v in score.items()})
        return read_json(folder / TEST)

    def model(self, row: Row) -> nn.Module:
        """Return a finished cell's model."""
        folder, model = self.root / row["folder"], self._build()
        if folder == self.folder / DENSE:
            model.load_state_dict(read_state(folder / WEIGHTS))
            return model
        return load(folder, model)

    def course(self, place: Place) -> list[dict[str, float]]:
        """Return the recorded steps of a finished search; none where the model did not train meanwhile."""
        path = self._search_folder(place) / COURSE
        return read_json(path) if path.exists() else []

    # One cell.

    def _dense(self) -> Row:
        try:
            return self._train_dense()
        except NonFiniteLoss as error:
            return self._missing(DENSE_MODEL, "diverged", error)

    def _train_dense(self) -> Row:
        model = self._build()
        collections = find_collections(model)
        size = sum(table.size_bytes for found in collections for table in found.tables)
        if self._train.fused:
            for found in collections:
                found.replace_in(model, FusedEmbeddingBags(found.module, fused_params(self._train.fused)))
        stage = self._stage(DENSE, model, self._optimizer(model), self.folder / DENSE)
        converge(stage, self.watcher)
        write_state(self.folder / DENSE / WEIGHTS, model.state_dict())
        return self._row(DENSE_MODEL, model, size, _course_of(stage))

    def _compact(self, place: Place, config: SearchConfig) -> Row:
        course: Stages = {}
        if config.starts_from == "dense":
            dense = self.get(DENSE_MODEL)
            if dense["status"] != "done":
                return self._missing(place, dense["status"], f"the dense model it starts from: {dense['reason']}")
            course = {DENSE: Trained(dense["stages"][DENSE], DENSE in dense["capped"])}
        try:
            return self._train_compact(place, config, course)
        except BudgetError as error:
            return self._missing(place, "infeasible", error)
        except NonFiniteLoss as error:
            return self._missing(place, "diverged", error)

    def _train_compact(self, place: Place, config: SearchConfig, course: Stages) -> Row:
        """Search, rewrite and train on, or train from scratch; ``course`` is the training that the search starts from."""
        folder, model = self._folder_of(place), self._build()
        optimizer = self._optimizer(model)
        session = self._session(model, optimizer, config, place.budget or "")
        course |= self._search(session, model, optimizer, place)
        started = clock()
        if not (folder / PLAN).exists():  # a run that is resumed goes on with the plan it had
            session.derive(strict=self.recipe.search.strict).save(folder / PLAN)
        if (twin := self._twin(place, config)) is not None:
            shutil.copyfile(twin / WEIGHTS, folder / WEIGHTS)
            row: Row = read_json(twin / CELL)
            return row
        plan = SizePlan.load(folder / PLAN)
        name = "fine-tune" if course else "train"
        if config.retrains:
            name, model = "retrain", self._fresh(plan)
            optimizer = self._optimizer(model)
        else:
            session.compact(plan)
        rewriting = clock() - started
        limits = _limits(config, course, self._train)
        stage = self._stage(name, model, optimizer, folder, str(place), **limits)
        converge(stage, self.watcher)
        save(model, plan, folder)
        return self._row(place, model, plan.size_bytes, course | _course_of(stage), rewriting)

    def _twin(self, place: Place, config: SearchConfig) -> Path | None:
        """Return the finished cell of another budget that has this cell's plan, where its model would be this one's to the bit.

        It is where one search, or one dense model, serves all budgets.
        """
        if config.searches_within_budget:
            return None
        mine = (self._folder_of(place) / PLAN).read_bytes()
        others = (self._folder_of(replace(place, budget=budget)) for budget in self.recipe.search.budgets)
        trained = (other for other in others if (other / CELL).exists() and (other / WEIGHTS).exists())  # not one that diverged
        return next((other for other in trained if (other / PLAN).read_bytes() == mine), None)

    def _session(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: SearchConfig, budget: str) -> Session:
        """Prepare the model, with the trained dense weights where the method starts from them."""
        once = config.starts_from == "dense" or not config.trains  # the ids that a training would count were not seen
        session = prepare(
            model,
            algorithm=config,
            budget=budget,
            space=self.recipe.search.space,
            frequencies=self.frequencies() if once else None,
            fused=fused_params(self._train.fused) if self._train.fused else None,
            seed=self.seed,
        )
        if config.starts_from == "dense":
            state = self._dense_state()
            session.load_state_dict({**session.state_dict(), "kernels": state["kernels"]})
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        session.attach(optimizer, self._validation(config, seed=self.seed))
        return session

    def _validation(self, config: SearchConfig, seed: int | None = None) -> Batches:
        """Return the validation split as a search is given it."""
        data = self.data.apart() if config.examples_apart else self.data
        return data.batches("validation", config.search_batch or self._train.batch_size, seed=seed)

    def _dense_state(self) -> dict[str, Any]:
        """Return the trained dense model with its optimizer; train it anew where a finished run has cleared that away."""
        path = best_path(self._checkpoint(self.folder / DENSE, DENSE))
        with locked(self.folder / DENSE):
            if not path.exists():
                self._train_dense()
        state: dict[str, Any] = read_state(path)
        return state

    def _search(self, session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> Stages:
        """Search until the plan can be derived; train meanwhile, if the method does."""
        config = session.config
        if not config.trains:
            session.step(next(iter(self._validation(config))))
            return {}
        folder, title = self._search_folder(place), str(place if config.searches_within_budget else replace(place, budget=None))
        course = Course()
        session.register(course)
        stage = self._stage("search", model, optimizer, folder, title, session=session, observers={"course": course})
        with nullcontext() if config.searches_within_budget else locked(folder):
            converge(stage, self.watcher)
            if not (folder / COURSE).exists():
                write_json(folder / COURSE, course.rows)
        return _course_of(stage)

    # What they are made of.

    @property
    def folder(self) -> Path:
        """Where the cells of this seed and this trial are."""
        return self.root / "cells" / f"seed-{self.seed}" / f"trial-{self.number}"

    def _folder_of(self, place: Place) -> Path:
        if place.allocation and place.config is not None and place.config.same_at_every_budget:
            return self.folder / slug(place.config.name) / slug(", ".join(settings(place.config)))
        return self.folder / slug(place.method) / slug(place.allocation) / slug(place.budget or "")

    def _search_folder(self, place: Place) -> Path:
        within = place.config is not None and place.config.searches_within_budget
        return self._folder_of(place if within else replace(place, budget=None))

    @property
    def _train(self) -> Train:
        return replace(self.recipe.train, **self.trial)

    def _build(self) -> nn.Module:
        """Build the recipe's model; equal seeds give equal models."""
        torch.manual_seed(self.seed)
        return self.recipe.model.build(self.data.schema).to(self._train.device)

    def _fresh(self, plan: SizePlan) -> nn.Module:
        """Build the recipe's model as the plan wants it, nothing of it trained."""
        model = apply(self._build(), plan)
        if self._train.fused:
            for module in list(model.modules()):
                if isinstance(module, CompactEmbeddingBagCollection) and module.chunks is not None:
                    module.fuse(fused_params(self._train.fused))
        return model

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the loop's optimizer; fused tables are not its concern, and it leaves them alone."""
        make = OPTIMIZERS[self._train.optimizer]
        return make(model.parameters(), lr=self._train.lr, fused=True)  # in one pass, which takes a quarter of the time

    def _stage(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        title: str = "",
        options: Train | None = None,
        **more: Any,
    ) -> Stage:
        where = [f"seed {self.seed}"] * (len(self.recipe.seeds) > 1) + [f"{k}={v:g}" for k, v in self.trial.items()]
        return Stage(
            name,
            model,
            optimizer,
            self.data.batches("train", self._train.batch_size, seed=self.seed),
            self.data.batches("validation", self._train.batch_size),
            options or self._train,
            self._checkpoint(folder, name),
            title=" ".join(filter(None, [title, name, *where])),
            task=self.data.schema.task,
            **more,
        )

    def _checkpoint(self, folder: Path, stage: str) -> Path:
        return folder / CHECKPOINTS / f"{stage}.safetensors"

    def _evaluate(self, model: nn.Module, split: Split) -> Score:
        return evaluate(model, self.data.batches(split, self._train.batch_size), self.data.schema.task)

    # Records.

    def _row(self, place: Place, model: nn.Module, size: int, course: Stages, rewriting: float = 0.0) -> Row:
        """Say what a model cost, its training and its rewriting, and how good it is on the validation split."""
        epochs = [row for trained in course.values() for row in trained.history[1:]]
        return self._named(place) | {
            "status": "done",
            "reason": None,
            "bytes": size,
            "params": sum(p.numel() for p in model.parameters()),
            "epochs": len(epochs),
            "seconds": sum(row["seconds"] or 0.0 for row in epochs) + rewriting,
            "validation": self._evaluate(model, "validation"),
            "stages": {name: trained.history for name, trained in course.items()},
            "capped": [name for name, trained in course.items() if trained.capped],
        }

    def _missing(self, place: Place, status: str, reason: object) -> Row:
        """Say why there is no model: no plan fits, or the training diverged."""
        nothing = dict.fromkeys(("bytes", "params", "epochs", "seconds", "validation"))
        return self._named(place) | {
            "status": status,
            "reason": str(reason),
            **nothing,
            "stages": {},
            "capped": [],
        }

    def _named(self, place: Place) -> Row:
        return {
            "method": place.method,
            "budget": place.budget,
            "allocation": place.allocation,
            "seed": self.seed,
            "trial": dict(self.trial),
            "folder": str(self._folder_of(place).relative_to(self.root)),
        }


def _limits(config: SearchConfig, course: Stages, train: Train) -> dict[str, Any]:
    """Return what limits the training of a rewritten model after ``course``: its epochs, and the steps of an epoch."""
    limit = config.fine_tuning_epochs(len(course[DENSE].history) - 1) if DENSE in course else None
    if limit is None:
        return {"options": train}
    options = replace(train, epochs=min(max(int(limit), 1), train.epochs))
    if limit >= 1:
        return {"options": options}
    steps = course[DENSE].history[-1]["steps"] or 0  # how long the batches are is not always known before
    return {"options": options, "steps": max(ceil(limit * steps), 1)}


def _course_of(stage: Stage) -> Stages:
    return {stage.name: Trained(stage.history, not stage.converged)}


def slug(name: str) -> str:
    """Return a method's name, or a budget, as a folder's name."""
    return re.sub(r"[^\w=.%-]+", "-", name).strip("-")


def fused_params(fused: Fused) -> dict[str, Any]:
    """Return TorchRec's ``fused_params`` for a recipe's."""
    return {"optimizer": EmbOptimType[fused.optimizer], "learning_rate": fused.learning_rate}


@dataclass
class Course:
    """The course of a search, for the report: metrics averaged over steps, thinned out as it grows."""

    rows: list[dict[str, float]] = field(default_factory=list)
    every: int = 1
    _sum: dict[str, float] = field(default_factory=dict)
    _seen: int = 0

    @hookimpl
    def embsearch_after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a search step."""
        for name, value in metrics.items():
            self._sum[name] = self._sum.get(name, 0.0) + value
        self._seen += 1
        if self._seen == self.every:
            self.rows.append({"step": step, **{name: value / self.every for name, value in self._sum.items()}})
            self._sum, self._seen = {}, 0
        if len(self.rows) >= 2 * REPORTED_POINTS:
            self.rows, self.every = (
                [_mean(a, b) for a, b in zip(self.rows[::2], self.rows[1::2], strict=True)],
                2 * self.every,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        vars(self).update(state)


def _mean(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: second[name] if name == "step" else (first[name] + second[name]) / 2 for name in first}
