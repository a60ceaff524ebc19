"""Qualities to search by, where the loss is not what is wanted: how good logits are, higher being better (nis.txt, 3.3.2)."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import SupportsFloat

import torch
from torch import Tensor

from embsearch_plugin.errors import QualityError, SettingsError, did_you_mean

Quality = Callable[[Tensor, Tensor], float | Tensor]  # (logits, labels) of some examples -> a number


def auc(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of pairs of a positive and a negative that are ordered rightly, equal ones counting half.

    NaN where there are no such pairs.

    Raises:
        QualityError: where there is not one logit and one label for each example, or labels are not those of two classes.
    """
    if logits.dim() != 1 or logits.shape != labels.shape:
        raise QualityError(_wrong_shape("auc", "a logit and a label for each example, (B,) both", logits, labels))
    positive = _positive(labels)
    negatives, positives = logits[~positive].float().sort().values, logits[positive].float()
    below, at_most = (torch.searchsorted(negatives, positives, side=side) for side in ("left", "right"))
    return (below + at_most).double().mean() / (2 * negatives.numel())


def one_class(labels: Tensor) -> bool:
    """Return whether labels are all positive, or all negative, so that there is no AUC."""
    positive = _positive(labels)
    return bool(positive.all()) or not bool(positive.any())


def _positive(labels: Tensor) -> Tensor:
    """Return which labels, from 0 to 1, are above one half."""
    odd = labels[~((labels >= 0) & (labels <= 1))]  # NaN is neither
    if odd.numel():
        raise QualityError(
            f"the quality 'auc' needs labels from 0 to 1, positive above one half; got {float(odd.flatten()[0])}.\n  Possible "
            "solutions: 1) quality='mse' for ratings  2) a function of your own, (logits, labels) -> a number  3) look for NaN "
            "in the labels."
        )
    return labels > 0.5


def recall(n: int, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of examples whose positive, the first candidate, is among the n candidates with the highest logits.

    Candidates with the positive's own logit stand before it. Where the candidates are a sample of all items, this is the
    sampled recall.

    Raises:
        QualityError: where logits are not (examples, candidates), or there are no more than n candidates, which all are among
            the n.
    """
    if logits.dim() != 2:
        wanted = "logits (B, 1 + negatives), the positive first"
        raise QualityError(_wrong_shape(f"recall@{n}", wanted, logits, labels))
    if logits.shape[1] <= n:
        raise QualityError(
            f"the quality 'recall@{n}' must have more than {n} candidates, or it is always one; the model returns "
            f"{logits.shape[1]} for each example.\n  Possible solutions: 1) recall@1  2) more negatives."
        )
    before = (logits[:, 1:] >= logits[:, :1]).sum(1)
    return (before < n).double().mean()


def negative_squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return the negative mean squared error.

    Raises:
        QualityError: where predictions and labels differ in shape.
    """
    if predictions.shape != labels.shape:
        raise QualityError(_wrong_shape("mse", "a prediction for each label", predictions, labels))
    return -(predictions - labels).double().square().mean()


def quality_of(quality: str | Quality) -> Quality:
    """Return the quality of a name: ``"auc"``, ``"recall@1"`` (any number) or ``"mse"`` (its negative); or the given function.

    Raises:
        SettingsError: where there is no such name.
    """
    if callable(quality):
        return quality
    top = re.fullmatch(r"recall@([1-9]\d*)", str(quality))
    if top:
        return partial(recall, int(top[1]))
    named: dict[str, Quality] = {"auc": auc, "mse": negative_squared_error}
    if quality not in named:
        known = did_you_mean(str(quality), [*named, "recall@1"])
        raise SettingsError(f"unknown quality {quality!r}.{known} Or a function (logits, labels) -> a number")
    return named[quality]


def number(quality: str | Quality, value: object) -> float:
    """Return what a quality gave as a number.

    Raises:
        QualityError: where it is none.
    """
    if not isinstance(value, SupportsFloat):  # as a text, which float() would read
        raise QualityError(_no_number(quality, _shown(value)))
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QualityError(_no_number(quality, _shown(value))) from error
    if not math.isfinite(found):
        raise QualityError(_no_number(quality, str(found)))
    return found


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r}"


def _no_number(quality: str | Quality, got: str) -> str:
    name = getattr(quality, "__name__", quality)
    return (
        f"the quality {name!r} must be a number; got {got}. The controller is as before.\n  Possible solutions: 1) return one "
        "finite number for the logits and labels of a group of examples  2) look for NaN in the logits."
    )


def _wrong_shape(name: str, wanted: str, logits: Tensor, labels: Tensor) -> str:
    return (
        f"the quality {name!r} needs {wanted}; the model returns logits {tuple(logits.shape)} and labels "
        f"{tuple(labels.shape)}.\n  Possible solutions: 1) another quality: auc for clicks, recall@1 for top-k, mse for "
        "ratings  2) a function of your own, (logits, labels) -> a number  3) objective=, to return others."
    )
