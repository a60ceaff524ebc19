"""What a model returns for a batch, and running it without leaving a trace."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from embsearch_plugin.errors import ObjectiveError

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
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], tuple) and len(returned[1]) == 3:
        returned = (returned[0], *returned[1][1:])
    if not isinstance(returned, tuple) or len(returned) != 3 or not all(isinstance(t, Tensor) for t in returned):
        raise ObjectiveError(_advice(model, _shape_of(returned)))
    loss, logits, labels = returned
    if loss.numel() != 1:
        raise ObjectiveError(_advice(model, f"a loss of shape {tuple(loss.shape)}, not one number"))
    return Outcome(loss.reshape(()), logits, labels)


def _advice(model: nn.Module, got: str) -> str:
    return (
        f"{type(model).__name__} must return `loss, (loss, logits, labels)` for a batch, TorchRec's convention; got {got}.\n"
        "  Possible solutions: 1) prepare the train task around the model (as DLRMTrain)  2) give objective=, a function "
        "(model, batch) -> (loss, logits, labels), to searchable or prepare."
    )


def _shape_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(_shape_of(item) for item in value)}" if value else "an empty tuple"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextmanager
def untouched(model: nn.Module, exclude: Iterable[nn.Module], seed: int) -> Iterator[None]:
    """Restore buffers (batch norm) and every random state afterwards; inside, torch's random numbers come from ``seed``.

    Args:
        model: whose buffers are restored.
        exclude: modules whose buffers cannot change inside and may be large (the tables).
        seed: of the numbers drawn inside.
    """
    skipped = {id(module) for root in exclude for module in root.modules()}
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if id(module) not in skipped
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with private_random(seed):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer.copy_(value)


@contextmanager
def private_random(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside; restore every random state (torch, NumPy, Python) afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def move(batch: Any, device: torch.device) -> Any:
    """Move a batch to ``device``: anything with ``to``, and tuples, lists and dicts of such."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(item, device) for item in batch))
    if isinstance(batch, Mapping):
        return {key: move(item, device) for key, item in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return type(batch)(move(item, device) for item in batch)  # type: ignore[call-arg]
    return batch


class Autocast(NamedTuple):
    """The autocast that a training forward ran under, to be repeated by a search step."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device: str) -> "Autocast":
        """Read the autocast that is on now."""
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> torch.autocast:
        """Return it as a context."""
        return torch.autocast(self.device, self.dtype, self.enabled)
