"""The loss after one virtual weight step, differentiable with respect to the gates (dnis.txt, Eq. 6 and 7)."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from embsearch_plugin.errors import SessionError
from embsearch_plugin.search.objective import Objective, Outcome, outcome_of
from embsearch_plugin.search.tables import SearchedTables
from embsearch_plugin.supernet.virtual import VirtualRows


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
        SessionError: where tables are fused or sharded: their rows are not plain parameters.
    """
    if not all(supernet.is_plain for supernet in tables.supernets):
        raise SessionError(
            "second-order gradients need tables that are plain parameters; these are fused or sharded.\n"
            "  Possible solutions: 1) first order (xi=0)  2) train without fused= on one device."
        )
    rows = VirtualRows()
    weights = _other_weights(model, tables)
    with tables.searching(gates, rows):
        train = outcome_of(objective, model, train_batch)
        leaves = [*weights.values(), *rows.leaves]
        found = torch.autograd.grad(train.loss, leaves, create_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        moved = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=False)}
        rows.move(gradients[len(weights) :], rate)
        return outcome_of(objective, cast(nn.Module, _Moved(model, moved)), batch)


def _other_weights(model: nn.Module, tables: SearchedTables) -> dict[str, nn.Parameter]:
    inside = {id(p) for supernet in tables.supernets for p in supernet.inner.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


class _Moved:
    """A model as it would be with other weights."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._model, self._weights = model, dict(weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, self._weights, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
