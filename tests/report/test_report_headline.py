"""The first lines of a report: they must name who wins, whoever it is, and must not see a lead where there is none."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import ORIGINAL, cells_of, full_run, make_infeasible, set_test

from embsearch_plugin.report.headline import headline, sentences
from embsearch_plugin.report.inputs import checked
from embsearch_plugin.report.rows import result_rows
from embsearch_plugin.report.text import results_markdown

Data = dict[str, Any]


def at(metrics: Data, budget: str) -> str:
    (sentence,) = [sentence for sentence in sentences(checked(metrics)) if sentence.startswith(f"At {budget}, ")]
    return sentence.removeprefix(f"At {budget}, ")


def test_the_whole_of_it(metrics: Data) -> None:
    assert headline(metrics) == (
        "At 50%, no clear winner: uniform has test AUC 0.8193 ± 0.0003, and dnis (0.8190 ± 0.0004) is within the spread. "
        "At 25%, dnis wins with test AUC 0.8195 ± 0.0003, 0.0010 ahead of uniform (0.8185 ± 0.0002). "
        "At 10%, uniform wins with test AUC 0.8132 ± 0.0004, 0.0016 ahead of magnitude (0.8116 ± 0.0005) "
        "and 0.0056 ahead of dnis (0.8076 ± 0.0005). "
        "At 5%, magnitude wins with test AUC 0.7993 ± 0.0007, 0.0116 ahead of dnis (0.7877 ± 0.0010); uniform is infeasible. "
        "The dense model, the reference, has test AUC 0.8206 ± 0.0003 at 1.6 MiB. "
        "± is the standard deviation over 3 seeds."
    )


def test_the_smallest_run(small: Data) -> None:
    assert headline(small) == (
        "At 10%, only dnis has a result, test AUC 0.8076. The dense model, the reference, has test AUC 0.8206 at 1.6 MiB. "
        "One seed: how far seeds differ is not known."
    )


def test_what_was_not_chosen_counts_for_nothing(metrics: Data) -> None:
    before = headline(metrics)
    for cell in metrics["cells"]:
        if not cell["chosen"]:
            cell |= {"test": {"auc": 0.99, "log_loss": 0.01}, "bytes": 1}
    assert headline(metrics) == before


@pytest.mark.parametrize(("lead", "clear"), [(0.0004, False), (0.0005, False), (0.0006, True)])
def test_a_lead_counts_if_it_is_larger_than_the_larger_spread(metrics: Data, lead: float, clear: bool) -> None:
    set_test(metrics, "dnis", "10%", [0.82 + lead - 0.0001, 0.82 + lead, 0.82 + lead + 0.0001])
    set_test(metrics, "uniform", "10%", [0.8195, 0.82, 0.8205])
    line = at(metrics, "10%")
    assert line.startswith("dnis wins with") if clear else line.startswith("no clear winner: dnis has")
    assert (f"{lead:.4f} ahead of uniform (0.8200 ± 0.0005)" in line) is clear
    assert ("uniform (0.8200 ± 0.0005) is within the spread" in line) is not clear


def test_all_that_are_within_the_spread_are_named_and_so_is_the_recipe_s_algorithm(metrics: Data) -> None:
    set_test(metrics, "uniform", "10%", [0.8199, 0.82, 0.8201])
    set_test(metrics, "magnitude", "10%", [0.8180, 0.8195, 0.8210])
    set_test(metrics, "dnis", "10%", [0.7999, 0.8, 0.8001])
    assert at(metrics, "10%") == (
        "no clear winner: uniform has test AUC 0.8200 ± 0.0001, and magnitude (0.8195 ± 0.0015) is within the spread; "
        "uniform is 0.0200 ahead of dnis (0.8000 ± 0.0001)."
    )
    set_test(metrics, "dnis", "10%", [0.8190, 0.82, 0.8210])
    assert at(metrics, "10%") == (
        "no clear winner: dnis has test AUC 0.8200 ± 0.0010, and uniform (0.8200 ± 0.0001) and magnitude (0.8195 ± 0.0015) "
        "are within the spread."
    )


def test_figures_that_are_printed_alike_are_alike(small: Data) -> None:
    rival = small["cells"][1] | {"method": "uniform", "test": {"auc": 0.80764, "log_loss": 0.4}}
    small["cells"].append(rival)
    assert at(small, "10%") == "no clear winner: dnis has test AUC 0.8076, and uniform (0.8076) is equal."


def test_one_seed_shows_who_is_ahead_but_no_winner(small: Data) -> None:
    small["cells"].append(small["cells"][1] | {"method": "uniform", "test": {"auc": 0.8077, "log_loss": 0.6}})
    assert at(small, "10%") == "uniform is ahead with test AUC 0.8077, 0.0001 ahead of dnis (0.8076)."
    assert headline(small).endswith(" One seed: how far seeds differ is not known.")


def test_without_auc_the_lower_log_loss_wins(metrics: Data) -> None:
    for cell in metrics["cells"]:
        if cell["chosen"]:
            cell["test"]["auc"] = None
    assert at(metrics, "10%").startswith("uniform wins with test log loss 0.4868 ± 0.0004, 0.0016 ahead of magnitude (0.4884")
    assert "The dense model, the reference, has test log loss 0.4794 ± 0.0003 at" in headline(metrics)


def test_one_undefined_seed_leaves_no_mean_to_compare(metrics: Data) -> None:
    set_test(metrics, "uniform", "10%", [0.9, 0.9, None], log_loss=float("nan"))
    assert at(metrics, "10%") == "dnis, uniform and magnitude cannot be compared: no test metric is defined for all."


def test_infeasible_methods(metrics: Data) -> None:
    make_infeasible(metrics, "dnis", "5%")
    assert (
        at(metrics, "5%") == "only magnitude has a result, test AUC 0.7993 ± 0.0007; dnis is infeasible; uniform is infeasible."
    )
    make_infeasible(metrics, "magnitude", "5%")
    assert at(metrics, "5%") == "every method is infeasible."


def test_a_method_that_was_not_tested_is_not_called_infeasible(metrics: Data) -> None:
    for method in ("dnis", "magnitude"):
        for cell in cells_of(metrics, method, "5%"):
            cell |= {"chosen": False, "test": None}
    assert at(metrics, "5%") == "dnis is not tested, uniform is infeasible and magnitude is not tested."


def test_a_plan_over_its_budget_is_said_so(metrics: Data) -> None:
    cells_of(metrics, "uniform", "10%")[1]["bytes"] = metrics["budgets"][2]["bytes"] + 2048
    assert at(metrics, "10%").endswith("dnis (0.8076 ± 0.0005). But uniform is 2.0 KiB over the budget.")
    cells_of(metrics, "dnis", "10%")[0]["bytes"] = metrics["budgets"][2]["bytes"] + 1024
    assert at(metrics, "10%").endswith(" But dnis is 1.0 KiB over and uniform is 2.0 KiB over the budget.")
    metrics["budgets"][2]["bytes"] = None
    assert "over the budget" not in headline(metrics)


def test_means_over_different_seeds_are_not_compared(metrics: Data) -> None:
    for cell in cells_of(metrics, "uniform", "10%")[1:]:
        metrics["cells"].remove(cell)
    said = at(metrics, "10%")
    assert said.startswith("nobody wins, since not all have the same seeds: test AUC of ")
    assert "uniform 0.8132 (seeds 0)" in said
    assert not any(
        figure.best for row in result_rows(checked(metrics)) if row.budget == "10%" for figure in row.figures.values()
    )
    assert headline(metrics).endswith("± is the standard deviation over 1 to 3 seeds.")


def test_a_model_that_another_algorithm_made_is_called_so(metrics: Data) -> None:
    for cell in cells_of(metrics, "dnis", "25%"):
        cell["allocation"] = "uniform, dim=2"
    assert at(metrics, "25%").startswith("dnis (uniform, dim=2) wins with test AUC 0.8195")
    for cell in cells_of(metrics, "dnis", "25%"):
        cell["allocation"] = "draw=2"
    assert at(metrics, "25%").startswith("dnis wins with test AUC 0.8195")


def test_without_a_dense_model(metrics: Data) -> None:
    metrics["cells"] = [cell for cell in metrics["cells"] if cell["method"] != "dense"]
    assert "There is no dense model to compare with." in headline(metrics)


def test_a_budget_without_cells(metrics: Data) -> None:
    metrics["budgets"].append({"text": "1%", "bytes": ORIGINAL // 100})
    assert at(metrics, "1%") == "nothing was run."


@given(st.lists(st.lists(st.floats(0.5, 0.9), min_size=3, max_size=3), min_size=3, max_size=3))
def test_the_headline_s_best_is_the_table_s_best(aucs: list[list[float]]) -> None:
    metrics = full_run()
    for method, values in zip(("dnis", "uniform", "magnitude"), aucs, strict=True):
        set_test(metrics, method, "10%", values)
    line = at(metrics, "10%").removeprefix("no clear winner: ")
    (best,) = [m for m in ("dnis", "uniform", "magnitude") if line.startswith(f"{m} ")]
    row = next(row for row in results_markdown(metrics).splitlines() if row.startswith(f"| {best} | 10% | **"))
    assert f"test AUC {row.split('**')[1]}" in line


def test_the_order_of_methods_decides_nothing(metrics: Data) -> None:
    shuffled = metrics | {"cells": random.Random(0).sample(metrics["cells"], len(metrics["cells"]))}
    assert headline(shuffled) == headline(metrics)
