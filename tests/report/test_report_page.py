"""The HTML page: complete, self-contained, the same for the same input, and never half written."""

import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.report.page import write_report
from embsearch_plugin.report.text import TIMES

Data = dict[str, Any]
MakePlan = Callable[[int], Data]
RunFolder = Callable[[Data, Data], Path]
Report = Callable[[Data, Data], str]
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
    assert "dense is better by 0.0022 at 10.0 times the bytes." in page.text
    for number in range(tables):
        # Once in the picture, once in the table of the plan.
        assert len(re.findall(rf"\bt_cat_{number}\b", page.text)) == 2


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
    assert [picture["role"] for picture in pictures] == ["img"] * 3
    assert all(picture["aria-label"] for picture in pictures)
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", html)), set(re.findall(r"(--[\w-]+): #", html))
    assert used - {"--key"} <= defined
    assert not re.search(r"(fill|stroke): #", html)


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_text(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    hostile = "<script>alert('1')</script> $\\frac{ \x00 \u8868 ]]> #000009 & \""
    metrics["models"].append(metrics["models"][0] | {"name": hostile})
    metrics["stages"][hostile] = metrics["stages"].pop("search")
    metrics["search"]["algorithm"] = metrics["budget"]["text"] = metrics["machine"]["platform"] = hostile
    metrics["recipe"][hostile] = hostile
    metrics["search"]["course"][0][hostile] = 1.0
    plan = make_plan(2)
    plan["tables"][0] |= {"name": hostile, "collection": hostile, "features": [hostile]}
    page = Page(report(metrics, plan))
    assert not page.open
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count("<script>") >= 9


def test_nothing_defined_and_nothing_recorded(report: Report, metrics: Data, make_plan: MakePlan) -> None:
    nothing = {"auc": None, "log_loss": None}
    for model in metrics["models"]:
        model |= {"epochs": None, "seconds": None, "test": nothing, "validation": nothing}
    metrics["stages"] = {"dense": [{"epoch": 1, "seconds": None, "train_loss": None, **nothing}], "search": []}
    metrics["search"]["course"] = []
    text = Page(report(metrics, make_plan(1))).text
    assert "cannot be compared" in text
    assert "No search steps were recorded." in text
    assert "No epochs were recorded." in text
    assert not re.search(r"\b(None|nan|null)\b", text)


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
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "plan.json", "report.html"}


@pytest.mark.parametrize("name", ["metrics.json", "plan.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RunFolderError, match=rf"cannot read .*{name}.*embsearch run"):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metrics.json", b"{", "is not valid JSON: .*line 1 column 2"),
        ("metrics.json", b"\xff", "is not valid JSON"),
        ("metrics.json", b"{}", "required field missing @ metrics.recipe"),
        ("metrics.json", b"[]", "expected Budget @ metrics.budget"),
        ("plan.json", b'{"format": "embsearch-plan", "version": 2}', r"2 not in literal .*@ plan.version"),
    ],
)
def test_a_malformed_file_is_named_with_its_problems(folder: Path, name: str, content: bytes, problem: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=rf"(?s){name}.*{problem}.*Run the recipe again"):
        write_report(folder)
    assert not (folder / "report.html").exists()
