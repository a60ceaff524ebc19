"""What a model is asked: a loss to train by, and the metrics that models are compared by.

Data sets name their task (``schema.task``); training, runs and reports know no other place. A new task is one ``Task`` here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

Score = dict[str, float | None]
"""Metrics by key; None where one is undefined, as the AUC of a single class is."""


@dataclass(frozen=True)
class Metric:
    """A figure that models are compared by: its key in records, its name, and 1 if more is better, else -1."""

    key: str
    name: str
    sign: int

    def of(self, score: Mapping[str, float | None] | None) -> float | None:
        """Return the figure in ``score``."""
        return None if score is None else score.get(self.key)


@dataclass(frozen=True)
class Task:
    """What a model is asked.

    Args:
        name: as recipes and records spell it.
        metrics: what models are compared by: the first of them that is defined for all decides.
        loss: the one of ``metrics`` that early stopping and the choice of trials go by; less is better.
        objective: the loss that is trained, a scalar, of logits and labels.
        measure: all metrics, of the logits and labels of a whole split.
    """

    name: str
    metrics: tuple[Metric, ...]
    loss: Metric
    objective: Callable[[Tensor, Tensor], Tensor] = field(repr=False)  # an address, which no fingerprint must have
    measure: Callable[[Tensor, Tensor], Score] = field(repr=False)


AUC = Metric("auc", "AUC", 1)
LOG_LOSS = Metric("log_loss", "log loss", -1)
MSE = Metric("mse", "MSE", -1)
MAE = Metric("mae", "MAE", -1)
# The first sees all of the ten places, so it differs less by chance than Recall@1. At 1, all three are the same.
RANKING = (
    Metric("ndcg_10", "NDCG@10", 1),
    Metric("recall_1", "Recall@1", 1),
    Metric("recall_5", "Recall@5", 1),
    Metric("recall_10", "Recall@10", 1),
    Metric("mrr_5", "MRR@5", 1),
    Metric("mrr_10", "MRR@10", 1),
    Metric("ndcg_5", "NDCG@5", 1),
)


def _clicks(logits: Tensor, labels: Tensor) -> Score:
    both = bool((labels == 0).any() and (labels == 1).any()) and bool(logits.isfinite().all())
    auc = float(binary_auroc(logits.double().sigmoid(), labels.long())) if both else None  # float32 ties large logits
    return {"auc": auc, "log_loss": float(F.binary_cross_entropy_with_logits(logits, labels))}


def _ratings(predicted: Tensor, labels: Tensor) -> Score:
    return {"mse": float(F.mse_loss(predicted, labels)), "mae": float(F.l1_loss(predicted, labels))}


def ranks(logits: Tensor) -> Tensor:
    """Return the rank of each example's positive, which is its first candidate: (B, C) to int64 (B,), from 1.

    A candidate with the positive's own logit, or with NaN, ranks before it: a model that answers the same for all is not good.
    """
    return 1 + (~(logits[:, 1:] < logits[:, :1])).sum(1)


def recall(rank: Tensor, k: int) -> Tensor:
    """Return 1 where the positive is among the first k, else 0. Its mean over 64 examples is the reward of nis.txt, A.2.2."""
    return (rank <= k).float()


def reciprocal_rank(rank: Tensor, k: int) -> Tensor:
    """Return one over the rank where the positive is among the first k, else 0."""
    return recall(rank, k) / rank


def discounted_gain(rank: Tensor, k: int) -> Tensor:
    """Return the NDCG at k where one candidate is relevant: 1 / log2(1 + rank), or 0 beyond k."""
    return recall(rank, k) / torch.log2(1.0 + rank)


def _rankings(logits: Tensor, labels: Tensor) -> Score:
    measures, rank = {"recall": recall, "mrr": reciprocal_rank, "ndcg": discounted_gain}, ranks(logits)
    names = [(metric.key, *metric.key.split("_")) for metric in RANKING]
    score: Score = {key: float(measures[name](rank, int(k)).mean()) for key, name, k in names}
    return score | {"log_loss": float(F.binary_cross_entropy_with_logits(logits, labels))}


CLICK = Task("click", (AUC, LOG_LOSS), LOG_LOSS, F.binary_cross_entropy_with_logits, _clicks)
"""Is it clicked? Logits and labels (B,), labels 0 or 1."""

RATING = Task("rating", (MSE, MAE), MSE, F.mse_loss, _ratings)
"""How many stars? The model's output (B,) is the rating itself (dnis.txt, 3.1)."""

TOP_K = Task("top-k", (*RANKING, LOG_LOSS), LOG_LOSS, F.binary_cross_entropy_with_logits, _rankings)
"""Which of some candidates is chosen? Logits and labels (B, 1 + N), the positive first; a removed one has the lowest logit.

The loss is binary cross-entropy over all pairs of an example and a candidate. nis.txt, 4.1.2, says cross-entropy, and not of
what. But to the paper a candidate is an example, which an accidental hit removes (A.2.3); one loss serves KKBox's labelled
pairs too; and the NCF model it takes up is trained so. All figures depend on N: validation (4) and test (99) do not compare,
and of validation's five candidates the positive is always among the first ten.
"""


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each example (B,).

    Logits (B,) and labels 0 or 1: the squared error of the probability (esapn.txt, Eq. 3). Logits (B, C) and labels
    0 .. C - 1: the cross-entropy (Eq. 4).
    """
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels.long(), reduction="none")
    return (logits.sigmoid() - labels.float()).square()


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether each example's likeliest label is its own, bool (B,). Logits and labels as for the losses."""
    return logits.argmax(1) == labels.long() if logits.dim() == 2 else (logits > 0) == (labels > 0.5)


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return example_losses(logits, labels).mean()


def _accuracy_and(loss: str) -> Callable[[Tensor, Tensor], Score]:
    return lambda logits, labels: {
        "accuracy": float(is_right(logits, labels).float().mean()),
        loss: float(_mean_loss(logits, labels)),
    }


ACCURACY = Metric("accuracy", "accuracy", 1)

PREFERENCE = Task("preference", (ACCURACY, MSE), MSE, _mean_loss, _accuracy_and(MSE.key))
"""Does she like it? Logits and labels (B,), labels 0 or 1; the loss is the squared error (esapn.txt, 3.4)."""

STARS = Task("stars", (ACCURACY, LOG_LOSS), LOG_LOSS, _mean_loss, _accuracy_and(LOG_LOSS.key))
"""Which of five classes of stars? Logits (B, 5) and labels 0 to 4; the loss is cross-entropy (esapn.txt, 3.4)."""

TASKS = {task.name: task for task in (CLICK, RATING, TOP_K)}
