"""Metrics of every task against slow, obvious references."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall

from embsearch_plugin.tasks import CLICK, RATING, TASKS, TOP_K, Task, ranks


def examples(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    logits = torch.randn(shape)
    return logits, (torch.rand(shape) < logits.sigmoid()).float()


def candidates(n: int = 60, others: int = 20) -> tuple[Tensor, Tensor]:
    """Logits of a positive and of others, all different, and labels."""
    logits = torch.randperm(n * (1 + others)).float().view(n, -1) / 100
    return logits + 3.005 * (torch.arange(1 + others) == 0), (torch.arange(1 + others) == 0).float().expand(n, -1)


def test_clicks() -> None:
    logits, labels = examples((200,))
    positive, negative = logits[labels == 1], logits[labels == 0]
    won = [float(p > n) + 0.5 * float(p == n) for p in positive for n in negative]
    loss = [-math.log(1 / (1 + math.exp(-z)) if y else 1 - 1 / (1 + math.exp(-z))) for z, y in zip(logits, labels, strict=True)]
    expected = {"auc": sum(won) / len(won), "log_loss": sum(loss) / len(loss)}
    assert CLICK.measure(logits, labels) == pytest.approx(expected, abs=1e-5)
    assert CLICK.measure(logits, torch.ones(200))["auc"] is None


def test_the_auc_of_clicks_does_not_change_when_all_logits_are_moved() -> None:
    logits, labels = examples((2000,))
    expected = CLICK.measure(logits, labels)["auc"]
    assert CLICK.measure(logits + 18, labels)["auc"] == pytest.approx(expected, abs=1e-4)
    logits[3] = math.nan
    assert CLICK.measure(logits, labels)["auc"] is None


def test_ratings() -> None:
    predicted, stars = torch.rand(50) * 5, torch.randint(1, 6, (50,)).float()
    errors = [float(p - s) for p, s in zip(predicted, stars, strict=True)]
    expected = {"mse": sum(e**2 for e in errors) / 50, "mae": sum(map(abs, errors)) / 50}
    assert RATING.measure(predicted, stars) == pytest.approx(expected, abs=1e-5)


def test_rankings() -> None:
    """By sorting each example's candidates; Recall and NDCG by torchmetrics too."""
    logits, labels = candidates()
    found, n = TOP_K.measure(logits, labels), len(logits)
    places = [sorted(row, reverse=True).index(row[0]) + 1 for row in logits.tolist()]
    for k in (1, 5, 10):
        library = {"recall": retrieval_recall, "ndcg": retrieval_normalized_dcg}
        for name, function in library.items():
            each = [function(row, of_row.long(), top_k=k) for row, of_row in zip(logits, labels, strict=True)]
            if k > 1 or name == "recall":
                assert found[f"{name}_{k}"] == pytest.approx(float(sum(each)) / n, abs=1e-5)
        if k > 1:
            assert found[f"mrr_{k}"] == pytest.approx(sum(1 / place for place in places if place <= k) / n, abs=1e-5)


def test_a_rank_is_one_more_than_the_candidates_that_are_not_worse() -> None:
    logits = torch.randint(0, 4, (100, 8)).float()
    assert ranks(logits).tolist() == [1 + sum(other >= row[0] for other in row[1:]) for row in logits.tolist()]


@pytest.mark.parametrize("logit", [0.0, math.nan, torch.finfo(torch.float32).min])
def test_a_model_that_answers_the_same_for_all_ranks_nothing_high(logit: float) -> None:
    assert ranks(torch.full((3, 8), logit)).tolist() == [8, 8, 8]


def test_a_removed_candidate_changes_neither_rank_nor_loss() -> None:
    logits, labels = candidates()
    removed = logits.clone()
    removed[:, 5] = torch.finfo(removed.dtype).min
    kept = [c for c in range(logits.shape[1]) if c != 5]
    assert torch.equal(ranks(removed), ranks(logits[:, kept]))
    each = TOP_K.objective(removed, labels) * removed.numel()
    assert float(each) == pytest.approx(float(TOP_K.objective(logits[:, kept], labels[:, kept]) * 60 * len(kept)), rel=1e-5)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_measures_what_it_names_and_a_better_answer_is_better(task: Task) -> None:
    torch.manual_seed(0)
    _, labels = candidates() if task is TOP_K else examples((300,))
    worse = labels + torch.randn(labels.shape)
    better = labels + 0.5 * (worse - labels)
    bad, good = task.measure(worse, labels), task.measure(better, labels)
    assert set(bad) == set(good) == {metric.key for metric in task.metrics}
    assert "0x" not in repr(task)  # it is part of what runs are resumed by
    assert task.loss in task.metrics and task.loss.sign == -1
    assert all(metric.sign * (good[metric.key] - bad[metric.key]) > 0 for metric in task.metrics)
    assert float(task.objective(worse, labels)) == pytest.approx(bad[task.loss.key], rel=1e-5)
