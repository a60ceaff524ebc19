"""What the pictures draw, and what they leave out."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from embsearch_plugin.report.figures import course_figure, curves_figure, dims_figure
from embsearch_plugin.report.inputs import Block, Plan, Table, structure

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
    titles = [text for text in texts(curves_figure(metrics["stages"])) if "loss" in text or "AUC" in text]
    assert titles == ["validation AUC", "validation log loss", "training loss"]


def test_a_stage_without_numbers_leaves_the_others_their_colours() -> None:
    stages = {"dense": [{"epoch": 1, "auc": None}], "search": [{"epoch": 1, "auc": 0.5}, {"epoch": 2, "auc": 0.6}]}
    assert not paths(curves_figure(stages), "line-1")
    assert paths(curves_figure(stages), "line-2")


def test_nothing_to_draw() -> None:
    assert (dims_figure([]), course_figure([]), curves_figure({"dense": []})) == (None, None, None)
