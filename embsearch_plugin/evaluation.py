"""How good a model is on a split: AUC and log loss."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import binary_auroc

from embsearch_plugin.errors import DataError


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any]) -> dict[str, float | None]:
    """Return ``auc`` and ``log_loss`` of a train task over all batches; ``auc`` is ``None`` where there is one class only.

    Raises:
        DataError: there are no batches.
    """
    training = model.training
    model.eval()
    try:
        answers = [model(batch)[1][1:] for batch in batches]
    finally:
        model.train(training)
    if not answers:
        raise DataError("a split must hold examples to be evaluated on; this one holds none. Try: more data.")
    logits = torch.cat([logits.float().cpu() for logits, _ in answers])
    labels = torch.cat([labels.float().cpu() for _, labels in answers])
    log_loss = float(F.binary_cross_entropy_with_logits(logits, labels))
    both = bool((labels == 0).any() and (labels == 1).any())
    return {"auc": float(binary_auroc(logits.sigmoid(), labels.long())) if both else None, "log_loss": log_loss}
