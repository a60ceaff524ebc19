"""The reference loop that a recipe runs: train dense, search, rewrite, train on, evaluate, report.

    dense        the model as it is, trained to convergence: what the compact one is compared with
    search       the same model from the same seed, searched while it trains
    fine-tune    the compact model, trained on; the one-shot model stays where that does not help

The test split is read once, at the end, by each of the two models that are compared.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn

from embsearch_plugin.budget import Budget
from embsearch_plugin.data.dataset import Dataset
from embsearch_plugin.decorator import prepare
from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.evaluation import evaluate
from embsearch_plugin.files import write_json, write_text
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import find_collections, manager
from embsearch_plugin.recipes import Fused, Recipe, to_plain, to_yaml
from embsearch_plugin.report.page import write_report
from embsearch_plugin.saving import save
from embsearch_plugin.training import Epoch, Stage, Watcher, converge

REPORTED_POINTS = 400


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


@dataclass
class Run:
    """One run of a recipe in one folder."""

    recipe: Recipe
    folder: Path
    data: Dataset
    watcher: Watcher

    def build(self) -> nn.Module:
        """Build the recipe's model; equal seeds give equal models."""
        torch.manual_seed(self.recipe.seed)
        return self.recipe.model.build(self.data.schema)

    def stage(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Stage:
        """Return a stage of training ``model``."""
        train, seed = self.recipe.train, self.recipe.seed
        return Stage(
            name,
            model,
            optimizer,
            self.data.batches("train", train.batch_size, seed=seed),
            self.data.batches("validation", train.batch_size),
            train,
            self.folder / "checkpoints" / f"{name}.safetensors",
            **more,
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the loop's optimizer; fused tables are not its concern, and it leaves them alone."""
        return torch.optim.Adam(model.parameters(), lr=self.recipe.train.lr)


def run(recipe: Recipe, folder: Path, *, resume: bool = False, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a recipe and write its results into ``folder``; return what ``metrics.json`` holds.

    Writes ``recipe.yaml`` (resolved), ``plan.json`` and its sidecar, ``model.safetensors``, ``metrics.json``,
    ``report.html``, and ``checkpoints/``, from which a killed run goes on.

    Raises:
        RunFolderError: where the folder is not empty and ``resume`` is not given, or holds another recipe's run.
    """
    _open_folder(recipe, folder, resume)
    this = Run(recipe, folder, recipe.data.load(), watcher or Watcher())
    dense, dense_history = _train_dense(this)
    plan, compact, course, histories = _search(this)
    save(compact, plan, folder)
    metrics = {
        "recipe": to_plain(recipe),
        "versions": _versions(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform()},
        "budget": _budget(recipe, plan),
        "models": [
            _model_row(this, "dense", dense, plan.original_bytes, {"dense": dense_history}),
            _model_row(this, "compact", compact, plan.size_bytes, histories),
        ],
        "stages": {"dense": dense_history, **histories},
        "search": {"algorithm": recipe.search.algorithm.name, "course": course.rows},
        "rows": {label: text for rows in manager().hook.embsearch_report_rows(plan=plan) for label, text in rows.items()},
    }
    write_json(folder / "metrics.json", metrics)
    write_report(folder)
    return metrics


def _train_dense(this: Run) -> tuple[nn.Module, list[Epoch]]:
    model = this.build()
    if this.recipe.train.fused:
        for found in find_collections(model):
            found.replace_in(model, FusedEmbeddingBags(found.module, fused_params(this.recipe.train.fused)))
    return model, converge(this.stage("dense", model, this.optimizer(model)), this.watcher)


def _search(this: Run) -> tuple[SizePlan, nn.Module, Course, dict[str, list[Epoch]]]:
    """Search, rewrite and fine-tune."""
    model, search, fused = this.build(), this.recipe.search, this.recipe.train.fused
    optimizer, course = this.optimizer(model), Course()
    session = prepare(
        model,
        algorithm=search.algorithm,
        budget=search.budget,
        space=search.space,
        fused=fused_params(fused) if fused else None,
        seed=this.recipe.seed,
    )
    session.register(course)
    session.attach(optimizer, this.data.batches("validation", this.recipe.train.batch_size, seed=this.recipe.seed))
    history = converge(this.stage("search", model, optimizer, session=session, observers={"course": course}), this.watcher)
    plan = session.derive()
    session.compact(plan)
    tuned = converge(this.stage("fine-tune", model, optimizer), this.watcher)
    return plan, model, course, {"search": history, "fine-tune": tuned}


def fused_params(fused: Fused) -> dict[str, Any]:
    """Return TorchRec's ``fused_params`` for a recipe's."""
    return {"optimizer": EmbOptimType[fused.optimizer], "learning_rate": fused.learning_rate}


def _budget(recipe: Recipe, plan: SizePlan) -> dict[str, Any]:
    budget = Budget.of(recipe.search.budget)
    return {"text": str(budget), "bytes": budget.limit(plan.original_bytes)}


def _model_row(this: Run, name: str, model: nn.Module, size: int, histories: Mapping[str, list[Epoch]]) -> dict[str, Any]:
    """Say what a model cost and how good it is. The only place that reads the test split."""
    batch_size = this.recipe.train.batch_size
    epochs = [row for history in histories.values() for row in history[1:]]
    return {
        "name": name,
        "bytes": size,
        "params": sum(p.numel() for p in model.parameters()),
        "epochs": len(epochs),
        "seconds": sum(row["seconds"] or 0.0 for row in epochs),
        "validation": evaluate(model, this.data.batches("validation", batch_size)),
        "test": evaluate(model, this.data.batches("test", batch_size)),
    }


def _open_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    written = folder / "recipe.yaml"
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            raise RunFolderError(
                f"the run folder {folder} exists already and is not empty; nothing in it was touched.\n  Possible solutions: "
                "1) --resume, to go on with a run that was stopped  2) another --out  3) remove the folder."
            )
        if not written.exists() or written.read_text(encoding="utf-8") != to_yaml(recipe):
            raise RunFolderError(
                f"{folder} holds a run of another recipe or other overrides, so it cannot be resumed with this one.\n"
                "  Possible solution: give the same recipe and overrides, or another --out."
            )
    write_text(written, to_yaml(recipe))


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("embsearch-plugin", "torch", "torchrec", "fbgemm-gpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
