"""The HTML page: complete, self-contained, the same for the same input, and never half written."""

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from report_runs import REASON, cells_of, full_run, make_infeasible

from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.report.headline import headline
from embsearch_plugin.report.numbers import TIMES
from embsearch_plugin.report.page import write_report
from embsearch_plugin.report.text import results_markdown

Data = dict[str, Any]
MakePlan = Callable[[int], Data]
RunFolder = Callable[[Data, Data], Path]
Report = Callable[[Data, Data], str]
PLAN = "cells/seed-0/trial-1/dnis/10%/plan.json"
Attributes = list[tuple[str, str | None]]


class Page(HTMLParser):
    """The elements of a page; fails where one is closed that is not open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Attributes) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Attributes) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture
def metrics() -> Data:
    return full_run("10%", "5%")  # two budgets are as good as four, and are drawn in half the time


@pytest.fixture
def folder(run_folder: RunFolder, metrics: Data, make_plan: MakePlan) -> Path:
    return run_folder(metrics, make_plan(1))


@pytest.fixture
def report(run_folder: RunFolder) -> Report:
    def write(metrics: Data, plan: Data) -> str:
        return write_report(run_folder(metrics, plan)).read_text(encoding="utf-8")

    return write


@pytest.mark.parametrize("tables", [0, 1, 2, 120])
def test_page_is_well_formed_and_complete(report: Report, metrics: Data, make_plan: MakePlan, tables: int) -> None:
    page = Page(report(metrics, make_plan(tables)))
    assert not page.open
    assert len(page.attributes("id")) == len(set(page.attributes("id")))
    assert headline(metrics) in page.text
    for number in range(tables):
        # For each of two budgets once in the picture, once in the table of the plan.
        assert len(re.findall(rf"\bt_cat_{number}\b", page.text)) == 4


def test_page_of_the_smallest_run(report: Report, small: Data, make_plan: MakePlan) -> None:
    page = Page(report(small, make_plan(1)))
    assert not page.open
    assert page.text.count("t_cat_0") == 2
    assert "Nothing was tuned" in page.text
    assert len([tag for tag, _ in page.elements if tag == "details"]) == 1  # the recipe; a single plan is not folded away


def test_page_shows_what_the_table_of_the_terminal_shows(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    html = re.sub("</?strong>", "**", report(metrics, make_plan(1)))
    for line in results_markdown(metrics).splitlines()[2:9]:
        fields = "</t[hd]><td[^>]*>".join(re.escape(field) for field in line.strip("| ").split(" | "))
        assert re.search(f'<th scope="row">{fields}</td></tr>', html)


def test_infeasible_models_are_explained(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    html = report(metrics, make_plan(1))
    assert f'title="{REASON}">infeasible' in html
    assert f"<li>uniform at 5%: infeasible, {REASON}</li>" in html


def test_an_infeasible_search_has_no_plan(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    make_infeasible(metrics, "dnis", "5%")
    text = Page(report(metrics, make_plan(1))).text
    assert "At 5%, dnis is infeasible: there is no plan." in text
    assert text.count("t_cat_0") == 2


def test_every_trial_is_shown_and_the_chosen_one_marked(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    html = report(metrics, make_plan(1))
    row = re.search('<th scope="row">dnis at 10%</th>(.*)</tr>', html)
    assert row
    assert re.findall("<td.*?>(0.*?)</td>", row[1].replace("<strong>0.5200</strong>", "0.5200!")) == ["0.5300", "0.5200!"]


def test_the_first_seed_s_chosen_plan_is_shown(report: Report, metrics: Data, make_plan: MakePlan, tmp_path: Path) -> None:
    report(metrics, make_plan(1))
    chosen = cells_of(metrics, "dnis", "10%")[0]
    (tmp_path / chosen["folder"] / "plan.json").write_text(json.dumps(make_plan(2)))
    assert chosen["folder"] == "cells/seed-0/trial-1/dnis/10%"
    assert Page(write_report(tmp_path).read_text(encoding="utf-8")).text.count("t_cat_1") == 2


def test_stages_of_two_models_by_one_name_are_told_apart(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    metrics["algorithm"] = "magnitude"
    text = Page(report(metrics, make_plan(1))).text
    assert "dense (magnitude)" in text
    for cell in metrics["cells"]:
        if cell["method"] == "magnitude":
            cell["stages"]["dense"] = cells_of(metrics, "dense", None)[0]["stages"]["dense"]
    assert "dense (magnitude)" not in Page(report(metrics, make_plan(1))).text


def test_page_needs_nothing_else(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    html = report(metrics, make_plan(3))
    page = Page(html)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s)]*", html)) == namespaces
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not page.attributes("src")
    ids = {f"#{name}" for name in page.attributes("id")}
    references = {*page.attributes("href"), *page.attributes("xlink:href"), *re.findall(r"url\((.*?)\)", html)}
    assert references <= ids


def test_pictures_are_described_and_take_the_page_s_colours(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    html = report(metrics, make_plan(3))
    pictures = [attributes for tag, attributes in Page(html).elements if tag == "svg"]
    assert [picture["role"] for picture in pictures] == ["img"] * 5  # the comparison, two plans, course and curves
    assert all(picture["aria-label"] for picture in pictures)
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", html)), set(re.findall(r"(--[\w-]+): #", html))
    assert used - {"--key"} <= defined
    assert not re.search(r"(fill|stroke): #", html)


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_text(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    hostile = "<script>alert('1')</script> $\\frac{ \x00 \u8868 ]]> #000009 & \""
    make_infeasible(metrics, "magnitude", "5%", reason=hostile)
    for cell in metrics["cells"]:
        cell["trial"] = {hostile: hostile} | cell["trial"]
        cell["stages"] = {f"{stage} {hostile}": rows for stage, rows in cell["stages"].items()}
        cell["budget"] = hostile if cell["budget"] == "10%" else cell["budget"]
        cell["method"] = hostile if cell["method"] == "dnis" else cell["method"]
    metrics["budgets"][0]["text"] = metrics["algorithm"] = metrics["machine"]["platform"] = hostile
    metrics["recipe"][hostile] = metrics["rows"][hostile] = hostile
    metrics["course"][0][hostile] = 1.0
    plan = make_plan(2)
    plan["tables"][0] |= {"name": hostile, "collection": hostile, "features": [hostile]}
    page = Page(report(metrics, plan))
    assert not page.open
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count("<script>") >= 20


def test_nothing_defined_and_nothing_recorded(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    nothing = {"auc": None, "log_loss": None}
    for cell in metrics["cells"]:
        cell.update(dict.fromkeys(("epochs", "seconds")), stages={})
        cell.update({split: nothing for split in ("validation", "test") if cell[split]})
    metrics["course"] = []
    text = Page(report(metrics, make_plan(1))).text
    assert "cannot be compared" in text
    assert "No search steps were recorded." in text
    assert "No epochs were recorded." in text
    assert not re.search(r"\b(None|nan|null)\b", text)


def test_a_run_of_nothing(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    page = Page(report(metrics | {"cells": [], "budgets": []}, make_plan(1)))
    assert not page.open
    assert "There is no dense model to compare with." in page.text


def test_a_fine_grained_table_shows_mean_dims(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    plan = make_plan(1)
    plan["tables"][0] |= {"kind": "fine", "blocks": [{"rows": 5, "dim": 7.423}, {"rows": 15, "dim": 0.25}]}
    text = Page(report(metrics, plan)).text
    assert f"5\N{NO-BREAK SPACE}{TIMES}\N{NO-BREAK SPACE}7.4" in text
    assert "(means)" in text


def test_same_input_gives_the_same_bytes(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.edgecolor": "red"}):
        assert write_report(folder).read_bytes() == first
        assert mpl.rcParams["font.size"] == 30


def test_a_crash_while_writing_leaves_the_former_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "report.html"
    path.write_text("the former report")

    def crash(*_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        write_report(folder)
    assert path.read_text() == "the former report"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "cells", "report.html"}


@pytest.mark.parametrize("name", ["metrics.json", PLAN])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RunFolderError, match=rf"cannot read .*{name}.*embsearch run"):
        write_report(folder)


def test_all_plans_that_cannot_be_read_are_named(folder: Path, metrics: Data) -> None:
    missing, broken = (folder / cells_of(metrics, "dnis", budget)[0]["folder"] / "plan.json" for budget in ("10%", "5%"))
    missing.unlink()
    broken.write_text("{}")
    with pytest.raises(RunFolderError, match=rf"(?s)cannot read {missing}.*{broken} does not say.*plan.version"):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metrics.json", b"{", "is not valid JSON: .*line 1 column 2"),
        ("metrics.json", b"\xff", "is not valid JSON"),
        ("metrics.json", b"{}", "required field missing @ metrics.recipe"),
        ("metrics.json", b"[]", "expected str @ metrics.algorithm"),
        (PLAN, b'{"format": "embsearch-plan", "version": 2}', r"2 not in literal .*@ plan.version"),
    ],
)
def test_a_malformed_file_is_named_with_its_problems(folder: Path, name: str, content: bytes, problem: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=rf"(?s){name}.*{problem}.*Run the recipe again"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"budget": "7%"}, r"budget '7%' is not one of the run's @ metrics.cells\[\d+\]"),
        ({"bytes": None}, r"a cell that is done has bytes and validation figures @ metrics.cells\[\d+\]"),
        ({"test": None}, r"a cell that is chosen is done and has test figures @ metrics.cells\[\d+\]"),
        ({"status": "infeasible"}, r"a cell that is chosen is done"),
        ({"trial": {"l2": 0.001}}, "the chosen cells of dnis at 10% have different trials"),
        ({"seed": 1}, "a seed of dnis at 10% is chosen twice"),
    ],
)
def test_metrics_that_contradict_themselves_are_refused(folder: Path, metrics: Data, change: Data, problem: str) -> None:
    cells_of(metrics, "dnis", "10%")[0].update(change)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(RunFolderError, match=f"metrics.json does not say what a report needs: .*{problem}"):
        write_report(folder)


def test_all_contradictions_are_listed(folder: Path, metrics: Data) -> None:
    for cell in cells_of(metrics, "dnis", "10%"):
        cell["test"] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(RunFolderError, match=r"(has test figures @ metrics.cells.*){3}"):
        write_report(folder)
