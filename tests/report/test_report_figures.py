"""What the pictures draw, and what they leave out."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from report_runs import cells_of, set_test

from embsearch_plugin.report.comparison import comparison_figure
from embsearch_plugin.report.curves import course_figure, curves_figure
from embsearch_plugin.report.dims import dims_figure
from embsearch_plugin.report.inputs import Block, Plan, Table, checked, structure

Data = dict[str, Any]
MakePlan = Callable[[int], Data]

NUMBER = r"(-?[\d.]+)"


def texts(svg: str | None) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg or "")


def paths(svg: str | None, colour: str) -> list[list[tuple[float, float]]]:
    """Return the corners of the paths of that colour, in drawing order."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*var\(--{colour}\)', svg or "")
    return [[(float(x), float(y)) for x, y in re.findall(rf"[ML] {NUMBER} {NUMBER}", path)] for path in found]


def area(rectangle: list[tuple[float, float]]) -> float:
    xs, ys = zip(*rectangle, strict=True)
    return (max(xs) - min(xs)) * (max(ys) - min(ys))


def test_a_bar_is_filled_by_the_share_of_weights_kept(make_plan: MakePlan) -> None:
    svg = dims_figure(structure(make_plan(1), Plan, "plan").tables)
    whole = area(paths(svg, "track")[0])
    shares = [area(path) / whole for colour in ("kept", "dropped") for path in paths(svg, colour)]
    assert shares == pytest.approx([1 / 20 * 16 / 32, 5 / 20 * 4 / 32, 14 / 20], rel=1e-3)


def test_a_dim_is_written_where_there_is_room() -> None:
    table = Table("ebc", "t", 1000, 32, [Block(1, 32), Block(999, 4)], size_bytes=1, original_bytes=1)
    assert "4" in texts(dims_figure([table]))
    assert "32" not in texts(dims_figure([table]))


def test_tables_stand_largest_first(make_plan: MakePlan) -> None:
    tables = structure(make_plan(3), Plan, "plan").largest_first()
    names = [text for text in texts(dims_figure(tables)) if text.startswith("t_cat")]
    assert names == ["t_cat_2", "t_cat_1", "t_cat_0"]


def test_long_names_keep_both_ends() -> None:
    tables = [Table("ebc", f"embeddings_of_feature_{i}", 1, 4, [Block(1, 4)], size_bytes=1, original_bytes=1) for i in (1, 2)]
    assert {"embeddin\N{HORIZONTAL ELLIPSIS}eature_1", "embeddin\N{HORIZONTAL ELLIPSIS}eature_2"} <= set(
        texts(dims_figure(tables))
    )


def test_every_numeric_series_of_the_course_gets_a_panel() -> None:
    course = [{"step": 1, "alpha_mean": 0.9, "loss": 0.5, "note": "x", "on": True, "dims": [1], "auc": None}]
    titles = [text for text in texts(course_figure(course)) if re.search("[a-z]", text) and text != "search step"]
    assert titles == ["validation loss", "alpha mean"]


def test_an_undefined_value_is_a_gap_not_a_zero() -> None:
    course = [{"step": step, "loss": None if step == 3 else 0.5} for step in (1, 2, 3, 4, 5)]
    line = paths(course_figure(course), "line-1")[0]
    assert len(line) == 4
    assert len({y for _, y in line}) == 1


def test_the_validation_metric_comes_first(metrics: Data) -> None:
    titles = [text for text in texts(curves_figure({"": metrics["cells"][0]["stages"]})) if "loss" in text or "AUC" in text]
    assert titles == ["validation AUC", "validation log loss", "training loss"]


def test_each_budget_has_its_own_panels_and_a_stage_its_colour_in_all() -> None:
    def rows(*losses: float) -> list[Data]:
        return [{"epoch": epoch, "log_loss": loss} for epoch, loss in enumerate(losses, 1)]

    dense, svg = rows(0.7, 0.5), curves_figure({"50%": {"dense": rows(0.7, 0.5), "search": rows(0.7, 0.6)}, "5%": {}})
    assert [text for text in texts(svg) if "loss" in text] == ["validation log loss, 50%"]
    svg = curves_figure({"50%": {"dense": dense, "search": rows(0.7, 0.6)}, "5%": {"dense": dense, "fine-tune": rows(0.55)}})
    assert [text for text in texts(svg) if "loss" in text] == ["validation log loss, 50%", "validation log loss, 5%"]
    first, second = paths(svg, "line-1")[:2]
    assert [x for x, _ in first] == pytest.approx([x for x, _ in second])
    assert first[0][1] != first[1][1]
    assert first[0][1] - first[1][1] == pytest.approx(second[0][1] - second[1][1])  # one scale for both
    assert len(paths(svg, "line-2")) == len(paths(svg, "line-3")) == 1


def test_an_untrained_model_does_not_flatten_the_curves() -> None:
    rows = [{"epoch": epoch, "log_loss": loss} for epoch, loss in enumerate((0.69, 0.53, 0.52))]
    (line,) = paths(curves_figure({"": {"dense": rows}}), "line-1")
    assert line[2][1] - line[1][1] > 100  # points, of a panel of about 120


def test_a_stage_without_numbers_leaves_the_others_their_colours() -> None:
    stages = {"dense": [{"epoch": 1, "auc": None}], "search": [{"epoch": 1, "auc": 0.5}, {"epoch": 2, "auc": 0.6}]}
    assert not paths(curves_figure({"": stages}), "line-1")
    assert paths(curves_figure({"": stages}), "line-2")


def test_comparison_draws_each_method_s_means_and_spreads(metrics: Data) -> None:
    svg = comparison_figure(checked(metrics))
    assert {"dense", "dnis", "uniform", "magnitude", "5%", "50%", "84.4 KiB"} <= set(texts(svg))
    means = [next(path for path in paths(svg, f"line-{n}") if len(path) > 2) for n in (1, 3)]  # a spread has two ends
    assert [len(path) for path in means] == [4, 4]
    assert all(left[0] < right[0] for path in means for left, right in pairwise(path))
    (dnis, magnitude) = means
    assert dnis[0][1] > magnitude[0][1]  # at 5% DNIS is worse: further down
    assert dnis[2][1] < magnitude[2][1]  # at 25% it is better
    height = next(abs(path[0][1] - path[1][1]) for path in paths(svg, "line-1") if len(path) == 2)
    scale = (dnis[0][1] - magnitude[0][1]) / (0.7993 - 0.7877)
    assert height == pytest.approx(2 * 0.0010 * scale, rel=1e-2)


def test_comparison_leaves_out_what_is_infeasible(metrics: Data) -> None:
    uniform = next(path for path in paths(comparison_figure(checked(metrics)), "line-2") if len(path) > 2)
    assert len(uniform) == 3


def test_comparison_tells_its_figures(metrics: Data) -> None:
    svg = comparison_figure(checked(metrics)) or ""
    assert "uniform: 0.8132 ± 0.0004 at 168.8 KiB, 0.8185 ± 0.0002 at 422.1 KiB, 0.8193 ± 0.0003 at 844.2 KiB." in svg
    assert "dense, a horizontal line: 0.8206 ± 0.0003." in svg


def test_comparison_without_auc_is_of_log_loss(metrics: Data) -> None:
    for cell in metrics["cells"]:
        if cell["chosen"]:
            cell["test"]["auc"] = None
    assert "test log loss" in texts(comparison_figure(checked(metrics)))


def test_comparison_of_one_point_and_of_none(small: Data) -> None:
    assert "dnis" in texts(comparison_figure(checked(small)))
    set_test(small, "dnis", "10%", [None], log_loss=None)
    assert comparison_figure(checked(small)) is None
    set_test(small, "dnis", "10%", [0.8])
    cells_of(small, "dnis", "10%")[0]["bytes"] = 0
    assert comparison_figure(checked(small)) is None


def test_nothing_to_draw() -> None:
    assert (dims_figure([]), course_figure([]), curves_figure({"": {"dense": []}})) == (None, None, None)


def test_a_budget_that_is_not_in_bytes_is_marked_where_its_largest_model_is(metrics: Data) -> None:
    metrics["budgets"][2] = {"text": "43000 parameters", "bytes": None}
    for cell in metrics["cells"]:
        cell["budget"] = "43000 parameters" if cell["budget"] == "10%" else cell["budget"]
    assert {"43000 parameters", "168.8 KiB"} <= set(texts(comparison_figure(checked(metrics))))
