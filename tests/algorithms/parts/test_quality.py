"""Qualities against slow references: one pair, one example at a time."""

import pytest
import torch

from embsearch_plugin.algorithms.parts.quality import auc, negative_squared_error, number, one_class, quality_of, recall
from embsearch_plugin.errors import QualityError


@pytest.mark.parametrize("n", [2, 5, 64])
@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randint(-3, 4, (n,)).float(), torch.randint(0, 2, (n,)).float()
    labels[:2] = torch.tensor([0.0, 1.0])
    pairs = [(float(p), float(q)) for p in logits[labels == 1] for q in logits[labels == 0]]
    expected = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p, q in pairs) / len(pairs)
    assert float(auc(logits, labels)) == pytest.approx(expected)
    assert float(auc(logits.bfloat16(), labels.int())) == pytest.approx(expected)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_there_is_no_auc_of_one_class(label: float) -> None:
    labels = torch.full((4,), label)
    assert one_class(labels)
    assert auc(torch.randn(4), labels).isnan()
    assert not one_class(torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("n", [1, 3])
def test_recall_looks_for_the_positive_among_the_first(n: int) -> None:
    torch.manual_seed(n)
    logits = torch.randint(-3, 4, (64, 5)).float()
    hits = [sum(float(other) >= float(row[0]) for other in row[1:]) < n for row in logits]
    assert float(recall(n, logits, torch.zeros(64))) == pytest.approx(sum(hits) / 64)
    assert float(quality_of(f"recall@{n}")(logits, torch.zeros(64))) == pytest.approx(sum(hits) / 64)


def test_the_squared_error_is_negative() -> None:
    assert float(negative_squared_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))) == -2.0


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(QualityError, match=r"'auc' needs .* logits \(4, 2\) and labels \(4,\)"):
        auc(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(QualityError, match=r"'recall@3' needs"):
        recall(3, torch.zeros(4), torch.zeros(4))
    with pytest.raises(QualityError, match="'mse' needs"):
        negative_squared_error(torch.zeros(4), torch.zeros(4, 1))


@pytest.mark.parametrize("name", ["recall@0", "recall", "acu", "recall@1.5", 3])
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="unknown quality"):
        quality_of(name)  # type: ignore[arg-type]


def test_numbers_are_numbers() -> None:
    assert number("auc", torch.tensor(0.5)) == number("auc", 0.5) == 0.5
    assert number("auc", 0.1) == 0.1
    for value in (None, "x", "0.5", float("inf"), torch.zeros(2)):
        with pytest.raises(QualityError, match="must be a number"):
            number("auc", value)
