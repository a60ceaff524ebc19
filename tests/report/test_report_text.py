"""The table of results, in a terminal and as Markdown."""

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import REASON, cells_of, set_test
from rich.console import Console

from embsearch_plugin.cli import main
from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.report.headline import headline
from embsearch_plugin.report.numbers import TIMES, UNDEFINED, dim_text, percent
from embsearch_plugin.report.text import results_markdown, results_table

Data = dict[str, Any]


def terminal(metrics: Data) -> str:
    """Return what an ordinary terminal shows."""
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(results_table(metrics))
    return re.sub(r"\x1b\[([\d;]*)m", lambda code: "*" if code[1] == "1" else "", capture.get())


def fields(metrics: Data, method: str, budget: str) -> list[str]:
    """Return what Markdown shows of a method at a budget."""
    (line,) = [line for line in results_markdown(metrics).splitlines() if line.startswith(f"| {method} | {budget} |")]
    return line.strip("| ").split(" | ")[2:]


def test_terminal_shows_every_method_at_every_budget_on_one_line_each(metrics: Data) -> None:
    shown = terminal(metrics)
    assert max(map(len, shown.replace("*", "").splitlines())) <= 80
    rows = [line for line in shown.splitlines() if re.match("(dense|dnis|uniform|magnitude) +[^a]", line)]
    assert [row.split()[0] for row in rows] == ["dense", *["dnis", "uniform", "magnitude"] * 4]
    assert rows[3].split() == ["magnitude", "50%", *f"0.8180 ± 0.0006 0.4820 ± 0.0006 844.2 KiB 50.0% 1.50{TIMES} 3".split()]
    assert rows[11].split() == ["uniform", "5%", "infeasible", *[UNDEFINED] * 5]
    assert f"uniform at 5%: infeasible, {REASON}" in " ".join(shown.split())


def test_the_best_of_each_budget_is_bold(metrics: Data) -> None:
    shown = [line for line in results_markdown(metrics).splitlines() if "**" in line]
    best = [line.split(" | ")[:4] for line in shown]
    assert best == [
        ["| uniform", "50%", "**0.8193 ± 0.0003**", "**0.4807 ± 0.0003**"],
        ["| dnis", "25%", "**0.8195 ± 0.0003**", "**0.4805 ± 0.0003**"],
        ["| uniform", "10%", "**0.8132 ± 0.0004**", "**0.4868 ± 0.0004**"],
        ["| magnitude", "5%", "**0.7993 ± 0.0007**", "**0.5007 ± 0.0007**"],
    ]
    assert terminal(metrics).count("*0.") == 8


def test_the_best_auc_and_the_best_log_loss_may_be_two_methods(metrics: Data) -> None:
    set_test(metrics, "magnitude", "10%", [0.7, 0.7, 0.7], log_loss=0.3)
    assert fields(metrics, "magnitude", "10%")[:2] == ["0.7000 ± 0.0000", "**0.3000 ± 0.0000**"]
    assert fields(metrics, "uniform", "10%")[:2] == ["**0.8132 ± 0.0004**", "0.4868 ± 0.0004"]


def test_markdown_has_all_columns(metrics: Data) -> None:
    lines = results_markdown(metrics).splitlines()
    assert lines[0] == (
        "| method | budget | test AUC | test log loss | val AUC | embedding bytes | of dense | time / dense "
        "| training runs | seeds | trial | trials run |"
    )
    dense = f"{UNDEFINED} | 0.8206 ± 0.0003 | 0.4794 ± 0.0003 | 0.8216 | 1.6 MiB | 100.0% | 1.00{TIMES} | 2 | 3 | l2=0.003 | 2"
    assert lines[2] == f"| dense | {dense} |"
    assert len({line.count("|") for line in lines[:15]}) == 1
    assert lines[15:] == ["", f"* uniform at 5%: infeasible, {REASON}"]


def test_a_run_without_trials_has_no_columns_for_them(small: Data) -> None:
    assert results_markdown(small).splitlines() == [
        "| method | budget | test AUC | test log loss | val AUC | embedding bytes | of dense | time / dense | training runs "
        "| seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| dense | {UNDEFINED} | 0.8206 | 0.4794 | 0.8216 | 1.6 MiB | 100.0% | 1.00{TIMES} | 1 | 1 |",
        f"| dnis | 10% | 0.8076 | 0.4924 | 0.8086 | 168.9 KiB | 10.0% | 4.40{TIMES} | 1 | 1 |",
    ]


def test_only_chosen_cells_are_the_result(metrics: Data) -> None:
    before = fields(metrics, "dnis", "10%")
    for cell in cells_of(metrics, "dnis", "10%", chosen=False):
        if not cell["chosen"]:
            cell |= {
                "bytes": 1,
                "seconds": 1e9,
                "validation": {"auc": 0.99, "log_loss": 0.0},
                "test": {"auc": 0.99, "log_loss": 0},
            }
    assert fields(metrics, "dnis", "10%") == before


def test_losing_allocations_cost_time_and_are_counted(metrics: Data) -> None:
    for cell in cells_of(metrics, "dnis", "10%", chosen=False):
        cell["allocation"] = "draw=1"
    first = cells_of(metrics, "dnis", "10%")[0]
    lost = {"allocation": "draw=0", "chosen": False, "test": None, "seconds": 50.5}
    metrics["cells"] += [first | lost, first | lost | {"allocation": "draw=2", "status": "diverged", "seconds": None}]
    assert fields(metrics, "dnis", "10%")[5:9] == [
        f"4.87{TIMES}",
        "4",
        "3",
        "draw=1",
    ]  # 440 to 442 s, and 50.5; dense 100 to 102
    assert fields(metrics, "uniform", "10%")[5:9] == [f"1.20{TIMES}", "2", "3", UNDEFINED]
    first["allocation"] = "draw=0"
    with pytest.raises(RunFolderError, match="the chosen cells of dnis at 10% have different allocations"):
        results_markdown(metrics)


def test_seeds_that_failed_are_counted_and_explained(metrics: Data) -> None:
    cell = cells_of(metrics, "dnis", "10%")[2]
    cell |= {"status": "diverged", "reason": "the loss\n  is NaN", "chosen": False, "test": None, "bytes": None}
    assert fields(metrics, "dnis", "10%")[0] == "0.8074 ± 0.0004"
    assert fields(metrics, "dnis", "10%")[7] == "2/3"
    assert "dnis at 10%, 1 of its 4 models: diverged, the loss is NaN" in results_markdown(metrics)


def test_what_is_undefined_is_a_dash(metrics: Data) -> None:
    nothing = {"auc": None, "log_loss": float("nan")}
    cells_of(metrics, "dnis", "10%")[1] |= {"seconds": None, "validation": nothing, "test": nothing}
    dash = UNDEFINED
    assert fields(metrics, "dnis", "10%")[:8] == [dash, dash, dash, "168.8 KiB", "10.0%", dash, "2", "3"]


def test_names_are_printed_as_they_are(metrics: Data) -> None:
    for cell in cells_of(metrics, "dnis", "10%", chosen=False):
        cell["method"] = "[red]*x|y"
    assert "\\[red\\]\\*x\\|y" in results_markdown(metrics)
    assert "[red]" in terminal(metrics)


def test_incomplete_metrics_are_refused(metrics: Data) -> None:
    del metrics["cells"][1]["test"]
    for entry_point in (results_table, results_markdown, headline):
        with pytest.raises(RunFolderError, match=r"required field missing @ metrics.cells\[1\].test"):
            entry_point(metrics)


def test_the_command_prints_headline_and_markdown_and_writes_nothing(
    metrics: Data, run_folder: Callable[[Data, Data], Path]
) -> None:
    folder = run_folder(metrics, {})
    result = CliRunner().invoke(main, ["report", str(folder), "--markdown"])
    assert result.output == f"{headline(metrics)}\n\n{results_markdown(metrics)}\n"
    assert not (folder / "report.html").exists()


def test_numbers_for_people() -> None:
    assert (percent(1, 8), percent(1, 0)) == ("12.5%", UNDEFINED)
    assert [dim_text(dim) for dim in (0, 16, 7.423, 0.034, 1024)] == ["0", "16", "7.4", "0.03", "1024"]
