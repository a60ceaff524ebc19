"""The cells of a matrix of runs: one method's model at one budget, from one seed, with one trial's settings.

What several cells need is trained once and kept beside them: the dense model, and a search that serves every budget.

    dense/                    the model as it is, trained to convergence
    METHOD/search             the searched model, where one search serves every budget
    METHOD/BUDGET/            the compact model, trained on: plan.json, model.safetensors, cell.json

A cell that is finished has a ``cell.json``, and is never trained again. One that was stopped goes on at its last epoch.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.data.dataset import Dataset
from embsearch_plugin.decorator import prepare
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.evaluation import evaluate
from embsearch_plugin.files import read_state, write_json, write_state
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.recipes import Fused, Recipe, Train
from embsearch_plugin.saving import WEIGHTS, load, save
from embsearch_plugin.search.session import Session
from embsearch_plugin.training import Epoch, Stage, Watcher, best_path, converge

CELL, CHECKPOINTS, COURSE, DENSE = "cell.json", "checkpoints", "course.json", "dense"
REPORTED_POINTS = 400
Row = dict[str, Any]


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

    def dense(self) -> Row:
        """Return the dense model's cell; train it, if that was not done."""
        return self._recorded(self.folder / DENSE, self._dense)

    def compact(self, method: str, budget: str) -> Row:
        """Return the cell of a method's compact model at a budget; search and train it, if that was not done."""
        folder = self._compact_folder(method, budget)
        row = self._recorded(folder, lambda: self._compact(method, budget))
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # no other cell needs them
        return row

    def test(self, row: Row) -> dict[str, float | None]:
        """Return how good a finished cell's model is on the test split. Nothing else reads that split."""
        folder = self.root / row["folder"]
        return self._recorded_in(folder / "test.json", lambda: self._evaluate(self._load(folder), "test"))

    # One cell.

    def _dense(self) -> Row:
        model = self._build()
        if self._train.fused:
            for found in find_collections(model):
                found.replace_in(model, FusedEmbeddingBags(found.module, fused_params(self._train.fused)))
        size = sum(table.size_bytes for found in find_collections(self._build()) for table in found.tables)
        history = converge(self._stage(DENSE, model, self._optimizer(model), self.folder / DENSE), self.watcher)
        write_state(self.folder / DENSE / WEIGHTS, model.state_dict())
        return self._row(DENSE, None, model, size, {DENSE: history})

    def _compact(self, method: str, budget: str) -> Row:
        config, folder = self.recipe.search.methods[method], self._compact_folder(method, budget)
        stages: dict[str, list[Epoch]] = {}
        if config.starts_from == "dense":
            stages[DENSE] = self.dense()["stages"][DENSE]
        model = self._build()
        optimizer = self._optimizer(model)
        try:
            session = self._session(model, optimizer, config, budget)
            stages |= self._search(session, model, optimizer, method, budget)
            plan = session.derive()
        except BudgetError as error:
            return self._infeasible(method, budget, str(error))
        session.compact(plan)
        stage = self._stage("fine-tune" if stages else "train", model, optimizer, folder, f"{method} {budget}")
        stages[stage.name] = converge(stage, self.watcher)
        save(model, plan, folder)
        return self._row(method, budget, model, plan.size_bytes, stages)

    def _session(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: AlgorithmConfig, budget: str) -> Session:
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
            state = read_state(best_path(self._checkpoint(self.folder / DENSE, DENSE)))
            session.load_state_dict({**session.state_dict(), "kernels": state["kernels"]})
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        session.attach(optimizer, self.data.batches("validation", self._train.batch_size, seed=self.seed))
        return session

    def _search(
        self, session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, method: str, budget: str
    ) -> dict[str, list[Epoch]]:
        """Search until the plan can be derived; train meanwhile, if the method does."""
        config = session.config
        if not config.trains:
            session.step(next(iter(self.data.batches("validation", self._train.batch_size))))
            return {}
        folder, title = self.folder / slug(method), method
        if config.searches_within_budget:
            folder, title = self._compact_folder(method, budget), f"{method} {budget}"
        course = Course()
        session.register(course)
        stage = self._stage("search", model, optimizer, folder, title, session=session, observers={"course": course})
        history = converge(stage, self.watcher)
        if not (folder / COURSE).exists():
            write_json(folder / COURSE, course.rows)
        return {"search": history}

    # What they are made of.

    @property
    def folder(self) -> Path:
        """Where the cells of this seed and this trial are."""
        return self.root / "cells" / f"seed-{self.seed}" / f"trial-{self.number}"

    def _compact_folder(self, method: str, budget: str) -> Path:
        return self.folder / slug(method) / slug(budget)

    @property
    def _train(self) -> Train:
        return replace(self.recipe.train, **self.trial)

    def _build(self) -> nn.Module:
        """Build the recipe's model; equal seeds give equal models."""
        torch.manual_seed(self.seed)
        return self.recipe.model.build(self.data.schema)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the loop's optimizer; fused tables are not its concern, and it leaves them alone."""
        return torch.optim.Adam(model.parameters(), lr=self._train.lr)

    def _stage(
        self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, title: str = "", **more: Any
    ) -> Stage:
        where = [f"seed {self.seed}"] * (len(self.recipe.seeds) > 1) + [f"{k}={v:g}" for k, v in self.trial.items()]
        return Stage(
            name,
            model,
            optimizer,
            self.data.batches("train", self._train.batch_size, seed=self.seed),
            self.data.batches("validation", self._train.batch_size),
            self._train,
            self._checkpoint(folder, name),
            title=" ".join(filter(None, [title, name, *where])),
            **more,
        )

    def _checkpoint(self, folder: Path, stage: str) -> Path:
        return folder / CHECKPOINTS / f"{stage}.safetensors"

    def _load(self, folder: Path) -> nn.Module:
        model = self._build()
        if folder == self.folder / DENSE:
            model.load_state_dict(read_state(folder / WEIGHTS))
            return model
        return load(folder, model)

    def _evaluate(self, model: nn.Module, split: Any) -> dict[str, float | None]:
        return evaluate(model, self.data.batches(split, self._train.batch_size))

    # Records.

    def _recorded(self, folder: Path, make: Callable[[], Row]) -> Row:
        return self._recorded_in(folder / CELL, make)

    def _recorded_in(self, path: Path, make: Callable[[], Row]) -> Row:
        if not path.exists():
            write_json(path, make())
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        return row

    def _row(self, method: str, budget: str | None, model: nn.Module, size: int, stages: Mapping[str, list[Epoch]]) -> Row:
        """Say what a model cost and how good it is on the validation split."""
        epochs = [row for history in stages.values() for row in history[1:]]
        return self._named(method, budget) | {
            "status": "done",
            "reason": None,
            "bytes": size,
            "params": sum(p.numel() for p in model.parameters()),
            "epochs": len(epochs),
            "seconds": sum(row["seconds"] or 0.0 for row in epochs),
            "validation": self._evaluate(model, "validation"),
            "stages": dict(stages),
        }

    def _infeasible(self, method: str, budget: str, reason: str) -> Row:
        nothing = dict.fromkeys(("bytes", "params", "epochs", "seconds", "validation"))
        return self._named(method, budget) | {"status": "infeasible", "reason": reason, **nothing, "stages": {}}

    def _named(self, method: str, budget: str | None) -> Row:
        folder = self.folder / DENSE if budget is None else self._compact_folder(method, budget)
        return {
            "method": method,
            "budget": budget,
            "seed": self.seed,
            "trial": dict(self.trial),
            "folder": str(folder.relative_to(self.root)),
        }


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
