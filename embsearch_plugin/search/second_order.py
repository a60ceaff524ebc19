"""The loss after one virtual weight step, differentiable with respect to the gates (dnis.txt, Eq. 6 and 7)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from embsearch_plugin.errors import SessionError
from embsearch_plugin.search.objective import Objective, Outcome, outcome_of
from embsearch_plugin.search.tables import SearchedTables
from embsearch_plugin.supernet.virtual import VirtualRows

CHECKPOINTED = (
    "second-order gradients cannot go through activation checkpoints, or other hooks on saved tensors.\n"
    "  Possible solutions: 1) first order (xi=0)  2) a model without checkpoints."
)


def after_weight_step(
    model: nn.Module,
    objective: Objective,
    tables: SearchedTables,
    gates: Sequence[Tensor],
    train_batch: Any,
    batch: Any,
    rate: float,
) -> Outcome:
    """Evaluate ``batch`` with the weights that a step of SGD on ``train_batch`` would give.

    The step is part of the graph, so the gradient of the loss holds both terms of Eq. 7. Only rows that the training batch
    reads are held. The weights themselves do not change.

    Raises:
        SessionError: where tables are fused or sharded: their rows are not plain parameters; where the model has activation
            checkpoints.
    """
    if not all(supernet.is_plain for supernet in tables.supernets):
        raise SessionError(
            "second-order gradients need tables that are plain parameters; these are fused or sharded.\n"
            "  Possible solutions: 1) first order (xi=0)  2) train without fused= on one device."
        )
    rows = VirtualRows()
    weights = _other_weights(model, tables)
    with tables.searching(gates, rows), _no_recomputing():
        train = outcome_of(objective, model, train_batch)
        leaves = [*weights.values(), *rows.leaves]
        found = torch.autograd.grad(train.loss, leaves, create_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        moved = {f"model.{name}": w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=False)}
        rows.move(gradients[len(weights) :], rate)
        # An objective may call any part of the model, so it is run inside of what has the other weights.
        outcome: Outcome = functional_call(_Run(objective, model), moved, (batch,))
        return outcome


def _other_weights(model: nn.Module, tables: SearchedTables) -> dict[str, nn.Parameter]:
    inside = {id(p) for supernet in tables.supernets for p in supernet.inner.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


class _Run(nn.Module):
    """An objective on a model, as a module."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: Any) -> Outcome:
        return outcome_of(self.objective, self.model, batch)


@contextmanager
def _no_recomputing() -> Iterator[None]:
    """Refuse activation checkpoints: the gradient would run parts of the model again, with the weights as they are by then.

    Raises:
        SessionError: where the model has some.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED):
            yield
    except RuntimeError as error:
        if CHECKPOINTED in str(error):
            raise SessionError(CHECKPOINTED) from error
        raise
