"""What a model returns for a batch, and running it without leaving a trace."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embsearch_plugin.errors import ObjectiveError
from embsearch_plugin.randomness import private_random

Objective = Callable[[nn.Module, Any], Any]


class Outcome(NamedTuple):
    """What a model says of a batch: the loss, a scalar with its graph, and the logits and labels (B,)."""

    loss: Tensor
    logits: Tensor
    labels: Tensor


def train_task(model: nn.Module, batch: Any) -> Any:
    """TorchRec's convention: ``loss, (loss, logits, labels) = model(batch)``."""
    return model(batch)


def outcome_of(objective: Objective, model: nn.Module, batch: Any) -> Outcome:
    """Run ``objective`` and check what it returns.

    Raises:
        ObjectiveError: where it is neither ``loss, logits, labels`` nor ``loss, (loss, logits, labels)``.
    """
    try:
        returned = objective(model, batch)
    except TypeError as error:
        if objective is train_task:
            raise ObjectiveError(_advice(model, f"a TypeError: {error}")) from error
        raise
    flat = returned
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], tuple) and len(returned[1]) == 3:
        flat = (returned[0], *returned[1][1:])
    if not isinstance(flat, tuple) or len(flat) != 3 or not all(isinstance(item, Tensor) for item in flat):
        raise ObjectiveError(_advice(model, _shape_of(returned)))
    loss, logits, labels = flat
    if loss.numel() != 1:
        raise ObjectiveError(_advice(model, f"a loss of shape {tuple(loss.shape)}, not one number"))
    return Outcome(loss.reshape(()), logits, labels)


def _advice(model: nn.Module, got: str) -> str:
    return (
        f"{type(model).__name__} must return `loss, (loss, logits, labels)` for a batch, TorchRec's convention; "
        f"got {got}.\n  Possible solutions: 1) prepare the train task around the model (as DLRMTrain)  "
        "2) give objective=, a function (model, batch) -> (loss, logits, labels), to searchable or prepare."
    )


def _shape_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_shape_of(item) for item in value)})"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextmanager
def untouched(model: nn.Module, exclude: Iterable[nn.Module], seed: int) -> Iterator[None]:
    """Restore buffers (batch norm) and every random state afterwards; inside, random numbers come from ``seed``.

    Args:
        model: whose buffers are restored.
        exclude: modules whose buffers cannot change inside and may be large (the tables).
        seed: of the numbers drawn inside.
    """
    skipped = {module for root in exclude for module in root.modules()}
    saved = [
        (module._buffers, [(name, b, None if b is None else b.clone()) for name, b in module._buffers.items()])
        for module in model.modules()
        if module not in skipped
    ]
    try:
        with private_random(seed):
            yield
    finally:
        with torch.no_grad():
            for buffers, before in saved:
                restored = {name: b if b is None or value is None else b.copy_(value) for name, b, value in before}
                buffers.clear()  # a module may have assigned or registered others
                buffers.update(restored)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards back to its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def move(batch: Any, device: torch.device) -> Any:
    """Move a batch to ``device``: anything with ``to``; tuples, lists, dicts and dataclasses of such, type by type."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(item, device) for item in batch)
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)
        moved.update({key: move(item, device) for key, item in batch.items()})
        return moved
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(batch, **{name: move(getattr(batch, name), device) for name in fields})
    return batch
