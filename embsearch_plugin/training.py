"""Training one model to convergence, in a way that can be killed and resumed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedTensor

from embsearch_plugin.data.dataset import Batches
from embsearch_plugin.errors import NonFiniteLoss, SessionError
from embsearch_plugin.evaluation import device_of, evaluate
from embsearch_plugin.files import read_state, write_state
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.machine import clock
from embsearch_plugin.randomness import shared_generators
from embsearch_plugin.recipes import Train
from embsearch_plugin.search.objective import move
from embsearch_plugin.search.session import Session
from embsearch_plugin.tasks import CLICK, Task

Epoch = dict[str, float | None]


class Watcher:
    """Sees a run as it goes on. This one looks away; the command line's draws progress bars."""

    def stage(self, name: str, steps: int | None, task: Task) -> None:
        """A stage begins; an epoch of it has so many steps, where that is known, and the metrics of the task."""

    def step(self) -> None:
        """A weight step was taken."""

    def epoch(self, name: str, row: Epoch) -> None:
        """An epoch ended with these metrics."""


@dataclass
class Stage:
    """One model on its way to convergence.

    Args:
        name: what is done: ``search``, say.
        model: a train task.
        optimizer: the loop's optimizer.
        session: the search that runs along, if any.
        observers: what else has a state to keep in the checkpoint, by name.
        steps: an epoch is so many batches; by default all there are.
        title: what it is called where people look; by default its name.
        task: what the model is asked.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    train: Batches
    validation: Batches
    options: Train
    checkpoint: Path
    session: Session | None = None
    observers: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    task: Task = CLICK
    steps: int | None = None
    history: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.title = self.title or self.name

    @property
    def first_ready(self) -> int:
        """The first epoch that counts: a search must have taken a step before a plan can come of it."""
        if self.session is None:
            return 0
        least = self.session.config.least_search_steps
        return next((i for i, row in enumerate(self.history) if (row["search_steps"] or 0) >= least), len(self.history))

    @property
    def best(self) -> int:
        """The epoch, from 0, with the best validation loss among those that count."""
        losses = [math.inf if (loss := self.task.loss.of(row)) is None else loss for row in self.history]
        return min(range(self.first_ready, len(losses)), key=losses.__getitem__, default=-1)

    @property
    def converged(self) -> bool:
        """Whether the validation loss has stopped improving."""
        return self.best >= 0 and self._trained - self.best > self.options.patience

    @property
    def over(self) -> bool:
        """Whether it has converged, or the epochs are used up."""
        return self.converged or self._trained >= self.options.epochs

    @property
    def _trained(self) -> int:
        return len(self.history) - 1  # the first row is the model as it came


def converge(stage: Stage, watcher: Watcher) -> list[Epoch]:
    """Train until the validation loss stops improving; leave the best epoch's weights in the model.

    The model as it came counts too (epoch 0): if training does not improve it, it stays as it was. After each epoch
    everything is written to the stage's checkpoint, so that a killed run goes on at the next epoch.

    Returns:
        A row per epoch: seconds (by :func:`embsearch_plugin.machine.clock`), steps (of weights and of the search), train
        loss, and the validation metrics.

    Raises:
        NonFiniteLoss: where the training or the validation loss is NaN or infinite.
    """
    steps = len(stage.train) if isinstance(stage.train, Sized) else None
    watcher.stage(stage.title, stage.steps or steps, stage.task)
    if stage.checkpoint.exists():
        _resume(stage)
    else:
        _close_epoch(stage, watcher, {"epoch": 0, "seconds": 0.0, "steps": 0, "train_loss": None})
    while not stage.over:
        started, searched = clock(), _search_steps(stage)
        loss, steps = train_epoch(stage, watcher.step)
        seconds, steps = clock() - started, steps + _search_steps(stage) - searched
        row: Epoch = {"epoch": len(stage.history), "seconds": seconds, "steps": steps, "train_loss": loss}
        _close_epoch(stage, watcher, row)
    if stage.best < 0:
        raise SessionError(
            f"{stage.title} ended before its first plan could be derived: {stage.options.epochs} epochs are "
            f"{stage.session.step_count if stage.session else 0} weight steps.\n  Possible solutions: 1) more train.epochs  "
            "2) a smaller train.batch_size  3) a smaller warm_up or every of the algorithm."
        )
    _restore(stage, best_path(stage.checkpoint))
    return stage.history


def _search_steps(stage: Stage) -> int:
    return 0 if stage.session is None else stage.session.search_steps


def train_epoch(stage: Stage, stepped: Callable[[], None] = lambda: None) -> tuple[float, int]:
    """Take one pass over the training split; return the mean training loss, and how many weight steps it took."""
    stage.model.train()
    total, steps, device = 0.0, 0, device_of(stage.model)
    with decayed(stage.model, stage.options.l2) as forward:
        for batch in islice(stage.train, stage.steps):
            stage.optimizer.zero_grad()
            loss, _ = forward(move(batch, device))
            loss.backward()
            if stage.options.clip_norm is not None:
                nn.utils.clip_grad_norm_(stage.model.parameters(), stage.options.clip_norm)
            stage.optimizer.step()
            total, steps = total + float(loss.detach()), steps + 1
            if not math.isfinite(total):
                raise NonFiniteLoss(
                    f"the training loss must be a number; got {float(loss.detach())} in step {steps} of epoch "
                    f"{len(stage.history)} of {stage.title}.\n  Possible solutions: 1) a lower train.lr  2) look for NaN in "
                    "the data."
                )
            stepped()
    return total / max(steps, 1), steps


@contextmanager
def decayed(model: nn.Module, l2: float) -> Iterator[Callable[[Any], Any]]:
    """Yield the model's forward with a decay of the effective rows that it looks up: ``l2 * sum of their squares / B``.

    Its gradient is added where collections put rows out, gates and projections applied. As a term of the loss it would pass
    over all that was looked up several times more. Other forwards, those of a search step, have no decay.
    """
    inside = False

    def add(module: nn.Module, inputs: object, output: KeyedTensor) -> None:
        values = output.values()
        if inside and values.requires_grad:
            kept = values.detach()  # the hook must not hold its own tensor
            values.register_hook(lambda gradient: torch.add(gradient, kept, alpha=2 * l2 / max(len(kept), 1)))

    def forward(batch: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return model(batch)
        finally:
            inside = False

    handles = [collection.register_forward_hook(add) for collection in outermost_collections(model) if l2]
    try:
        yield forward
    finally:
        for handle in handles:
            handle.remove()


def outermost_collections(module: nn.Module) -> Iterable[nn.Module]:
    """Yield the embedding collections of a model, not those inside them."""
    for child in module.children():
        if isinstance(child, EmbeddingBagCollectionInterface):
            yield child
        else:
            yield from outermost_collections(child)


def _close_epoch(stage: Stage, watcher: Watcher, row: Epoch) -> None:
    row |= evaluate(stage.model, stage.validation, stage.task)
    loss = stage.task.loss.of(row)
    if not math.isfinite(loss or 0.0):
        raise NonFiniteLoss(
            f"the validation loss must be a number; got {loss} after epoch {row['epoch']} of {stage.title}.\n"
            "  Possible solutions: 1) a lower train.lr  2) look for NaN in the validation data."
        )
    stage.history.append(row)
    if stage.session is not None:
        row["search_steps"] = stage.session.search_steps
        stage.session.validated({name: value for name, value in row.items() if value is not None})
    if stage.best == len(stage.history) - 1:
        write_state(best_path(stage.checkpoint), _state(stage))
    write_state(stage.checkpoint, _state(stage))
    watcher.epoch(stage.title, row)


def best_path(checkpoint: Path) -> Path:
    """Return where the state of a stage's best epoch is, given where its last one's is."""
    return checkpoint.with_name(f"{checkpoint.stem}-best.safetensors")


def _state(stage: Stage) -> dict[str, Any]:
    return {
        "model": stage.model.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "kernels": [bags.kernel_state() for bags in _fused(stage)],
        "session": None if stage.session is None else stage.session.state_dict(),
        "observers": {name: observer.state_dict() for name, observer in stage.observers.items()},
        "history": stage.history,
        "epoch": stage.train.epoch,
        "random": [generator.get_state() for generator in shared_generators()],
    }


def _restore(stage: Stage, path: Path) -> dict[str, Any]:
    """Put model, optimizer and search back to what they were when ``path`` was written; return the rest of it."""
    state: dict[str, Any] = read_state(path)
    if stage.session is not None:
        stage.session.load_state_dict(state["session"])
    stage.model.load_state_dict(state["model"])
    stage.optimizer.load_state_dict(state["optimizer"])
    for bags, kernels in zip(_fused(stage), state["kernels"], strict=True):
        bags.load_kernel_state(kernels)
    return state


def _resume(stage: Stage) -> None:
    """Go on from the checkpoint."""
    state = _restore(stage, stage.checkpoint)
    for name, observer in stage.observers.items():
        observer.load_state_dict(state["observers"][name])
    stage.history[:] = state["history"]
    stage.train.epoch = state["epoch"]
    for generator, random in zip(shared_generators(), state["random"], strict=True):
        generator.set_state(random)


def _fused(stage: Stage) -> list[FusedEmbeddingBags]:
    """Return the fused collections whose state nobody else keeps; a session keeps that of its own."""
    if stage.session is not None:
        return []
    return [module for module in stage.model.modules() if isinstance(module, FusedEmbeddingBags)]
