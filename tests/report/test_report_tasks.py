"""Reports of other tasks than clicks: the same sentences and tables, by the task's own metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.report.headline import headline
from embsearch_plugin.report.page import write_report
from embsearch_plugin.report.text import results_markdown, results_table
from embsearch_plugin.tasks import RATING, TASKS, TOP_K, Task

Data = dict[str, Any]


def as_task(metrics: Data, task: Task) -> Data:
    """Let AUC be the task's first metric (turned round where less is better), and give it the others."""
    others = {metric.key: 0.25 for metric in task.metrics}
    for cell in metrics["cells"]:
        scores = [cell["validation"], cell["test"], *(row for rows in cell["stages"].values() for row in rows)]
        for score in scores:
            if score is not None:
                auc = score.pop("auc")
                score.update(others | {task.metrics[0].key: auc if task.metrics[0].sign > 0 else 1 - auc})
    return metrics | {"task": task.name}


def test_less_may_be_better(metrics: Data) -> None:
    assert "At 10%, uniform wins with test MSE 0.1868 ± 0.0004, 0.0016 ahead of magnitude" in headline(as_task(metrics, RATING))


def test_all_metrics_of_the_task_have_columns_and_the_first_two_fit_a_terminal(small: Data) -> None:
    ranked = as_task(small, TOP_K)
    names = " | ".join(f"test {metric.name}" for metric in TOP_K.metrics)
    assert f"| method | budget | {names} | val NDCG@10 | embedding bytes |" in results_markdown(ranked)
    assert [column.header for column in results_table(ranked).columns][2:4] == ["test\nNDCG@10", "test\nRecall@1"]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_page_names_the_task_s_loss_and_metrics(
    task: Task, metrics: Data, run_folder: Callable[[Data, Data], Path], make_plan: Callable[[int], Data]
) -> None:
    page = write_report(run_folder(as_task(metrics, task), make_plan(1))).read_text(encoding="utf-8")
    assert f"Validation {task.loss.name} of the first seed." in page
    assert all(f"validation {metric.name}" in page for metric in task.metrics)


def test_figures_of_another_task_and_unknown_tasks_are_refused(small: Data) -> None:
    with pytest.raises(RunFolderError, match=r"a rating model has figures for mse, mae @ metrics.cells\[0\].validation"):
        headline(small | {"task": "rating"})
    with pytest.raises(RunFolderError, match=r"@ metrics.task"):
        headline(small | {"task": "ratings"})
