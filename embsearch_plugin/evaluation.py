"""How good a model is on a split, by the metrics of its task."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from embsearch_plugin.errors import DataError
from embsearch_plugin.search.objective import move
from embsearch_plugin.tasks import CLICK, Score, Task


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any], task: Task = CLICK) -> Score:
    """Return the metrics of a train task over all batches; for clicks ``auc`` and ``log_loss``.

    Raises:
        DataError: there are no batches.
    """
    training, device = model.training, device_of(model)
    model.eval()
    try:
        answers = [model(move(batch, device))[1][1:] for batch in batches]
    finally:
        model.train(training)
    if not answers:
        raise DataError("a split must hold examples to be evaluated on; this one holds none. Try: more data.")
    logits = torch.cat([logits.float().cpu() for logits, _ in answers])
    labels = torch.cat([labels.float().cpu() for _, labels in answers])
    return task.measure(logits, labels)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are, and its batches must be; one without any is on the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
