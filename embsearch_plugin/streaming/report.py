"""What came of a stream: who predicted best, with how many bytes, in what time; by frequency, and over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.files import read_json, write_text
from embsearch_plugin.report.curves import Panels, draw_panels
from embsearch_plugin.report.markdown import markdown_table, plain
from embsearch_plugin.report.numbers import Estimate, percent, ratio

Metrics = Mapping[str, Any]
FEATURES = ("user", "item")
SIZE_FREQUENCIES, SCORE_FREQUENCIES = 50, 99  # the paper's Fig. 5 and 4
COLUMNS = (
    "method", "accuracy, last", "loss, last", "accuracy, all", "loss, all",
    "numbers", "of first", "bytes held", "time / first", "seeds",
)  # fmt: skip


def headline(metrics: Metrics) -> str:
    """Say which method predicts the last transactions best, whoever it is, and whether the lead is more than the spread."""
    found = {method: _estimate(metrics, method, "last", "accuracy") for method in methods(metrics)}
    ranked = sorted(found, key=lambda method: -found[method].mean)
    best, text = ranked[0], ", ".join(f"{method} {found[method]}" for method in ranked)
    count = int(_cells(metrics, best)[0]["last"]["transactions"])
    equal = [m for m in ranked[1:] if found[best].mean - found[m].mean <= max(found[best].spread or 0, found[m].spread or 0)]
    if len(ranked) == 1:
        verdict = f"{best} was run alone"
    elif not equal:
        verdict = f"{best} is best"
    else:
        verdict = f"nobody wins: {best} leads, but not {', '.join(equal)} by more than the spread"
    one = " One seed says little." if len(_cells(metrics, best)) == 1 else ""
    return f"Accuracy over the last {count:,} of {metrics['transactions']:,} transactions: {text}; {verdict}.{one}"


def methods(metrics: Metrics) -> list[str]:
    """Return the methods, the one that ratios are to first."""
    return list(dict.fromkeys(cell["method"] for cell in metrics["cells"]))


def rows(metrics: Metrics) -> list[dict[str, str]]:
    """Return a row of figures per method."""
    first = _cells(metrics, methods(metrics)[0])
    return [_row(metrics, method, _numbers(first), fmean(cell["seconds"] for cell in first)) for method in methods(metrics)]


def _row(metrics: Metrics, method: str, numbers: float, seconds: float) -> dict[str, str]:
    cells, loss = _cells(metrics, method), metrics["loss"]
    figures = [
        method + (" (cap reached)" if any(cell["stopped"] for cell in cells) else ""),
        str(_estimate(metrics, method, "last", "accuracy")),
        str(_estimate(metrics, method, "last", loss)),
        str(_estimate(metrics, method, "whole", "accuracy")),
        str(_estimate(metrics, method, "whole", loss)),
        f"{_numbers(cells):,.0f}",
        percent(_numbers(cells), numbers),
        human_bytes(round(fmean(cell["held_bytes"] for cell in cells))),
        ratio(fmean(cell["seconds"] for cell in cells), seconds),
        str(len(cells)),
    ]
    return dict(zip(COLUMNS, figures, strict=True))


def size_rows(metrics: Metrics) -> list[dict[str, str]]:
    """Return, for each method and table, how many ids have rows of each width at the end: the paper's Table 2."""
    found = []
    for method in methods(metrics):
        cell = _cells(metrics, method)[0]
        for table in cell["tables"]:
            widths = ", ".join(f"{width}: {count:,}" for width, count in table["rows"].items())
            found.append(
                {"method": method, "table": table["name"], "ids": f"{table['ids']:,}", "rows by width": widths,
                 "numbers": f"{table['weights']:,}"}
            )  # fmt: skip
    return found


def markdown(metrics: Metrics) -> str:
    """Return both tables as Markdown."""
    words = {"method", "table", "rows by width"}
    tables = [rows(metrics), size_rows(metrics)]
    return "\n\n".join(
        markdown_table(list(table[0]), [[plain(text) for text in row.values()] for row in table], words) for table in tables
    )


def terminal_table(metrics: Metrics) -> Table:
    """Return the results as a table for a terminal."""
    shown = Table(box=box.SIMPLE, show_edge=False, padding=0)
    for name in COLUMNS:
        shown.add_column(name.replace(", ", "\n").replace(" / ", "\n/ "), justify="left" if name == "method" else "right")
    for row in rows(metrics):
        shown.add_row(*row.values())
    return shown


def write_stream_report(folder: Path) -> Path:
    """Write ``report.html`` from the ``metrics.json`` of a stream's run folder, and return its path."""
    metrics, path = read_json(folder / "metrics.json"), folder / "report.html"
    environment = Environment(
        loader=PackageLoader("embsearch_plugin", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    figures = {
        "Over time": _figure(metrics, _over_time(metrics), "transactions", "time"),
        "By frequency": _figure(metrics, _by_frequency(metrics), "frequency", "frequency"),
    }
    page = environment.get_template("stream.html").render(
        headline=headline(metrics),
        tables={"Results": rows(metrics), "Sizes at the end, first seed": size_rows(metrics)},
        figures=figures,
        methods=methods(metrics),
        recipe=yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True),
        metrics=metrics,
    )
    write_text(path, page)
    return path


def _figure(metrics: Metrics, panels: Panels, x_label: str, name: str) -> Markup | None:
    return draw_panels({"": panels}, methods(metrics), x_label, name)


def _over_time(metrics: Metrics) -> Panels:
    """Return the first seed's curves over the stream."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for method in methods(metrics):
        points = _cells(metrics, method)[0]["points"]
        x = [float(point["transactions"]) for point in points]
        for title, key in (("accuracy", "accuracy"), ("loss", "loss"), ("bytes held", "held_bytes")):
            panels.setdefault(title, {})[method] = x, [point[key] for point in points]
        for number, feature in enumerate(FEATURES):
            sizes = [point["weights"][number] / max(sum(point["rows"][number].values()), 1) for point in points]
            panels.setdefault(f"mean width, {feature}", {})[method] = x, sizes
    return panels


def _by_frequency(metrics: Metrics) -> Panels:
    """Return means over seeds for transactions of users, and of items, that came for the n-th time."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for method in methods(metrics):
        sums = [cell["by_frequency"] for cell in _cells(metrics, method)]
        for number, feature in enumerate(FEATURES):
            for title, column, most in (
                ("accuracy", 1, SCORE_FREQUENCIES), ("loss", 2, SCORE_FREQUENCIES), ("mean width", 3, SIZE_FREQUENCIES),
            ):  # fmt: skip
                x = [n for n in range(1, most + 1) if all(each[number][n][0] for each in sums)]
                y = [fmean(each[number][n][column] / each[number][n][0] for each in sums) for n in x]
                panels.setdefault(f"{title}, {feature}", {})[method] = [float(n) for n in x], y
    return panels


def _cells(metrics: Metrics, method: str) -> list[Mapping[str, Any]]:
    return [cell for cell in metrics["cells"] if cell["method"] == method]


def _estimate(metrics: Metrics, method: str, part: str, figure: str) -> Estimate:
    return Estimate.over([cell[part][figure] for cell in _cells(metrics, method)])


def _numbers(cells: Sequence[Mapping[str, Any]]) -> float:
    """Return how many numbers the rows hold at the end, the paper's total dim; the mean over seeds."""
    return fmean(sum(table["weights"] for table in cell["tables"]) for cell in cells)
