"""Probe: what a search asks of the model, without leaving a trace in it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from embsearch_plugin import distributed
from embsearch_plugin.autocast import Autocast
from embsearch_plugin.errors import NonFiniteLoss, ObjectiveError
from embsearch_plugin.search.objective import Objective, Outcome, evaluating, move, outcome_of, untouched
from embsearch_plugin.search.second_order import after_weight_step
from embsearch_plugin.search.tables import SearchedTables


class Probe:
    """Runs the searched model on the search's behalf.

    Weights, buffers, gates and random states are afterwards what they were.

    Args:
        model: the model.
        tables: its tables.
        objective: what is run.
        seed: of the random numbers that the model draws (dropout): other ones in each search step.
        search_steps: returns how many search steps were taken.
        train_batch: returns the training batch of a virtual weight step, for second-order gradients.

    Attributes:
        running: whether a forward of the probe's is under way.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: SearchedTables,
        objective: Objective,
        seed: int,
        *,
        search_steps: Callable[[], int],
        train_batch: Callable[[], Any],
    ) -> None:
        self._model, self._tables, self._objective, self._seed = model, tables, objective, seed
        self._search_steps, self._train_batch = search_steps, train_batch
        self.running = False

    def evaluate(self, batch: Any, gates: Sequence[Tensor], group: int = 1) -> Outcome:
        """Run the objective with ``gates`` in place of the current ones, as for ``session.use_gates``."""
        with self._untouched(), self._tables.searching(gates, group=group):
            return outcome_of(self._objective, self._model, batch)

    def groups_in(self, batch: Any, size: int) -> int:
        """Return what :meth:`groups_of` says of a batch; takes a forward pass."""
        return self.groups_of(self.evaluate(batch, self._tables.gates), size)

    def groups_of(self, outcome: Outcome, size: int) -> int:
        """Return how many groups of ``size`` examples the batch had that was evaluated last, over processes the mean.

        It is one where examples share looked-up bags (negatives of the whole batch, say): then all have the same gates.
        """
        examples = len(outcome.logits)
        alone = all(supernet.bags == examples for supernet in self._tables.supernets)
        groups = torch.tensor(math.ceil(examples / size) if alone else 1, dtype=torch.float64, device=self._tables.device)
        return math.ceil(float(distributed.mean([groups])[0]))

    def row_gradients(self, batch: Any) -> tuple[list[Tensor], int]:
        """Return rows whose outer products add up to the sum of g g^T over the batch's lookups, and the number of examples.

        g is the gradient of an example's loss with respect to a looked-up row; the loss is taken to be a mean over
        examples, and a bag to be one example's (of one that several share, it is their sum). Rows are per table float32
        (n, D): one for each bag that is not empty, since all its ids have the gradient of the bag's output, times their
        weights, and divided by their number where a table is averaged. The model runs in evaluation mode, since batch norm
        makes examples depend on each other. Those of this process, numbers or not: see :meth:`require_finite`.
        """
        with evaluating(self._model), self._untouched(), self._tables.capturing() as captured:
            outcome = outcome_of(self._objective, self._model, batch)
            outputs = list(captured)  # checkpointed parts of the model run again for the gradient, and add to the list
            gradients = self._gradients(outcome.loss, [output.values for output in outputs])
        examples = len(outcome.logits)
        return [rows * examples for rows in self._tables.rows_of(outputs, gradients)], examples

    def gate_gradients(
        self, batch: Any, gates: Sequence[Tensor], leaves: Sequence[Tensor], xi: float = 0.0
    ) -> tuple[float, list[Tensor]]:
        """Differentiate the loss on ``batch`` with respect to ``leaves``, of which ``gates`` are made.

        With ``xi`` above zero, the loss is the one after a virtual weight step of that rate on a training batch (second
        order; dnis.txt, Eq. 7). Loss and gradients are averaged over processes, so that all of them decide alike.

        Raises:
            NonFiniteLoss: where the loss is NaN or infinite.
        """
        # The gates stay in place until the gradient is there: checkpointed parts of the model run again for it.
        with self._untouched(), self._tables.searching(gates):
            outcome = self._after_weight_step(batch, gates, xi) if xi else outcome_of(self._objective, self._model, batch)
            gradients = self._gradients(outcome.loss, leaves)
        loss, *gradients = distributed.mean([outcome.loss.detach().float(), *gradients])
        self.require_finite(gradients, loss)  # where one process has no number none has, and all say so
        return float(loss), gradients

    def require_finite(self, gradients: Sequence[Tensor], loss: Tensor | None = None) -> None:
        """Raise a NonFiniteLoss unless a loss and its gradients are numbers."""
        if loss is not None and not math.isfinite(float(loss)):
            raise NonFiniteLoss(self._not_finite("loss", float(loss)))
        if not bool(torch.cat([gradient.flatten() for gradient in gradients]).isfinite().all()):
            raise NonFiniteLoss(self._not_finite("gradient", math.nan))

    def look_up(self, batch: Any) -> None:
        """Run a batch for its lookups alone."""
        with evaluating(self._model), self._untouched():  # batch norm refuses a single example while it trains
            outcome_of(self._objective, self._model, move(batch, self._tables.device))

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """A forward of ours: under the loop's autocast, and buffers and random states are restored afterwards."""
        self.running = True
        autocast = self._tables.supernets[0].autocast or Autocast.now(self._tables.device.type)
        seed = self._seed * 1_000_003 + self._search_steps()
        try:
            tables = [supernet.inner for supernet in self._tables.supernets]
            with untouched(self._model, tables, seed), autocast.again(), torch.enable_grad():
                yield
        finally:
            self.running = False

    def _after_weight_step(self, batch: Any, gates: Sequence[Tensor], xi: float) -> Outcome:
        return after_weight_step(self._model, self._objective, self._tables, gates, self._train_batch(), batch, xi)

    def _gradients(self, loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(leaves), allow_unused=True) if loss.requires_grad else ()
        if all(gradient is None for gradient in found):
            raise ObjectiveError(
                "the loss must depend on the tables' gates, and it does not.\n  Possible solutions: 1) do not detach it, nor "
                "compute it under no_grad or inference_mode  2) checkpoint with use_reentrant=False  3) an objective that "
                "runs the tables."
            )
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"the validation {what} must be a number; got {value} after {self._search_steps()} search steps. Gates and weights "
            "are as before.\n  Possible solutions: 1) a lower learning rate  2) look for NaN in the validation batches."
        )
