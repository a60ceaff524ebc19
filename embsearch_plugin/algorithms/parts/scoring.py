"""Scoring candidates on the shared weights: the validation loss where one table's gates are exchanged for others."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embsearch_plugin import distributed
from embsearch_plugin.errors import AttachError, NonFiniteLoss
from embsearch_plugin.search.objective import evaluating
from embsearch_plugin.search.validation import NO_EXAMPLES
from embsearch_plugin.supernet.searchable import TooSmallBatch

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


def losses(
    session: "Session", reference: Sequence[Tensor], alternatives: Sequence[tuple[int, Tensor]], batches: int
) -> list[float]:
    """Return the validation loss of each alternative: one forward pass per batch for each, which leaves no trace.

    The model is in evaluation mode meanwhile: dropout would blur what is compared, and batch norm's statistics are those of
    the shared weights.

    Args:
        session: attached, so that it has validation batches.
        reference: the gates of all tables, per table (S, C).
        alternatives: a table's number, and the gates (S, C) that take the place of the reference there.
        batches: how many of the loader's first batches are used, at most.

    Raises:
        SessionError, AttachError: where there is no batch, or none has examples.
        NonFiniteLoss: where a loss is no number.
    """
    totals, examples = torch.zeros(len(alternatives), dtype=torch.float64), 0
    for batch in session.validation_batches(batches):
        with evaluating(session.model), suppress(TooSmallBatch):  # one without examples says nothing
            each, size = _losses_on(session, batch, reference, alternatives)
            totals, examples = totals + each * size, examples + size
    if not examples:
        raise AttachError(NO_EXAMPLES)
    found: list[float] = distributed.mean([(totals / examples).to(reference[0].device)])[0].tolist()
    if not all(map(math.isfinite, found)):
        raise NonFiniteLoss("candidates are scored by validation losses, and some are no numbers. Look for NaN in the data.")
    return found


def _losses_on(
    session: "Session", batch: Any, reference: Sequence[Tensor], alternatives: Sequence[tuple[int, Tensor]]
) -> tuple[Tensor, int]:
    """Return the loss of each alternative on a batch, and its number of examples."""
    found, examples = [], 0
    for table, gates in alternatives:
        outcome = session.probe.evaluate(batch, [*reference[:table], gates, *reference[table + 1 :]])
        found.append(outcome.loss.detach().double().cpu())
        examples = len(outcome.logits)
    return torch.stack(found), examples
