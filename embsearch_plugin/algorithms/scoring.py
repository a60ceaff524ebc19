"""Scoring alternatives on the shared weights: what the validation loss is when one table's gates are exchanged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embsearch_plugin import distributed

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


def validation_losses(
    session: "Session", reference: Sequence[Tensor], alternatives: Sequence[tuple[int, Tensor]], n_batches: int
) -> list[float]:
    """Return the loss of each alternative in evaluation mode: the mean over validation examples of all processes.

    Args:
        session: its validation loader's first ``n_batches`` batches are looked at; nothing of it changes.
        reference: the gates of all tables, per table (S, C).
        alternatives: a table's number, and the gates (S, C) that take the place of its reference.
        n_batches: how many batches; each alternative costs a forward on each of them.
    """
    batches = session.validation_batches(n_batches)
    with _evaluating(session.model):
        return _over_processes([_loss(session, _exchanged(reference, *one), batches) for one in alternatives])


def _exchanged(reference: Sequence[Tensor], table: int, gates: Tensor) -> list[Tensor]:
    return [gates if number == table else other for number, other in enumerate(reference)]


def _loss(session: "Session", gates: Sequence[Tensor], batches: Sequence[Any]) -> float:
    outcomes = [session.evaluate(batch, gates) for batch in batches]
    total = sum(float(outcome.loss.detach()) * len(outcome.labels) for outcome in outcomes)
    return total / sum(len(outcome.labels) for outcome in outcomes)


def _over_processes(losses: Sequence[float]) -> list[float]:
    """Every process derives the same plan."""
    (mean,) = distributed.mean([torch.tensor(losses, dtype=torch.float64)])
    return [float(loss) for loss in mean]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards back to its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
