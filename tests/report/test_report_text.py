"""The comparison of the models: one sentence, and one table."""

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.report.headline import headline
from embsearch_plugin.report.inputs import Metrics, structure
from embsearch_plugin.report.text import TIMES, UNDEFINED, dim_text, human_bytes, percent, results_table

Data = dict[str, Any]


def sentence(metrics: Data) -> str:
    return headline(structure(metrics, Metrics, "metrics"))


def terminal(metrics: Data) -> list[list[str]]:
    """Return the cells of the table in an ordinary terminal, a line for each model."""
    console = Console(file=StringIO(), width=80)
    with console.capture() as capture:
        console.print(results_table(metrics))
    _, models = re.split("\n.*─+\n", capture.get())
    return [re.split(r"\s{2,}", line.strip()) for line in models.splitlines()]


@pytest.mark.parametrize(
    ("compact", "verdict"),
    [
        (0.8012, "0.8012, the dense model 0.8034: dense is better by 0.0022 at 10.0 times the bytes."),
        (0.8044, "0.8044, the dense model 0.8034: compact is better by 0.0010 at 10.0% of the bytes."),
        (0.80341, "0.8034, the dense model 0.8034: no difference, at 10.0% of the bytes."),
    ],
)
def test_headline_says_who_wins(metrics: Data, compact: float, verdict: str) -> None:
    metrics["models"][1]["test"] = {"auc": compact, "log_loss": 0.5}
    assert sentence(metrics) == f"At a budget of 10% (1.2 MiB) the compact model has test AUC {verdict}"


@pytest.mark.parametrize(("loss", "winner"), [(0.49, "compact"), (0.51, "dense")])
def test_headline_without_auc_compares_log_loss_where_less_is_better(metrics: Data, loss: float, winner: str) -> None:
    metrics["models"][1]["test"] = {"auc": None, "log_loss": loss}
    assert f"has test log loss {loss:.4f}, the dense model 0.5000: {winner} is better by 0.0100" in sentence(metrics)


def test_headline_without_any_metric_names_no_winner(metrics: Data) -> None:
    metrics["models"][1]["test"] = {"auc": None, "log_loss": None}
    assert "cannot be compared" in sentence(metrics)
    assert "better" not in sentence(metrics)


def test_headline_without_a_dense_model(metrics: Data) -> None:
    del metrics["models"][0]
    assert sentence(metrics) == "At a budget of 10% (1.2 MiB) there is no pair of a compact and a dense model to compare."


def test_headline_admits_that_the_budget_was_exceeded(metrics: Data) -> None:
    metrics["budget"]["bytes"] -= 2048
    assert "the compact model, 2.0 KiB over it, has" in sentence(metrics)


def test_headline_of_a_budget_in_parameters(metrics: Data) -> None:
    metrics["budget"] = {"text": "390,000 parameters", "bytes": None}
    assert sentence(metrics).startswith("At a budget of 390,000 parameters the compact model has")


def test_headline_of_a_compact_model_of_no_bytes(metrics: Data) -> None:
    metrics["models"][1]["bytes"] = 0
    assert "dense is better by 0.0022 at 12.0 MiB against none." in sentence(metrics)


def test_table_compares_with_the_dense_model(metrics: Data) -> None:
    dense, compact = terminal(metrics)
    assert dense == ["dense", "0.8034", "0.5000", "0.8034", "12.0 MiB", "100.0%", "40.0", f"1.00{TIMES}", "3"]
    assert compact == ["compact", "0.8012", "0.5000", "0.8012", "1.2 MiB", "10.0%", "80.0", f"2.00{TIMES}", "3"]


def test_table_shows_what_is_undefined_as_a_dash(metrics: Data) -> None:
    metrics["models"][1] |= {"seconds": None, "epochs": None, "test": {"auc": None, "log_loss": float("nan")}}
    dash = UNDEFINED
    assert terminal(metrics)[1] == ["compact", dash, dash, "0.8012", "1.2 MiB", "10.0%", dash, dash, dash]


def test_table_prints_a_name_as_it_is(metrics: Data) -> None:
    metrics["models"][1]["name"] = "[red]x"
    assert terminal(metrics)[1][0] == "[red]x"


def test_table_of_incomplete_metrics_names_what_is_missing(metrics: Data) -> None:
    del metrics["models"][1]["test"]
    with pytest.raises(RunFolderError, match=r"required field missing @ metrics.models\[1\].test"):
        results_table(metrics)


def test_numbers_for_people() -> None:
    assert (human_bytes(512), human_bytes(3 * 2**20)) == ("512 B", "3.0 MiB")
    assert (percent(1, 8), percent(1, 0)) == ("12.5%", UNDEFINED)
    assert [dim_text(dim) for dim in (0, 16, 7.423, 0.034, 1024)] == ["0", "16", "7.4", "0.03", "1024"]
