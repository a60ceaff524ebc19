"""The pictures of a report. Each is an inline SVG, or None if nothing was recorded to draw."""

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from embsearch_plugin.budget import human_bytes
from embsearch_plugin.report.inputs import Table
from embsearch_plugin.report.svg import DROPPED, INK, KEPT, LINES, MUTED, TRACK, inline_svg, label, page_style
from embsearch_plugin.report.text import dim_text, percent

WIDTH = 11.0  # inches, as all lengths here; the page scales the picture to its own width
BAR = 0.24  # height of a table's bar, with the space around it

Series = tuple[list[float], list[float]]
"""x and y of one line; NaN where nothing is defined."""

_TITLES = {
    "auc": "validation AUC",
    "log_loss": "validation log loss",
    "loss": "validation loss",
    "train_loss": "training loss",
}
_SETTINGS = {"step", "epoch", "seconds"}  # what a row is about, not what was measured


def dims_figure(tables: list[Table]) -> Markup | None:
    """Draw each table as a bar: rows from left to right in plan order, filled as high as the columns they keep."""
    if not tables:
        return None
    columns = 1 if len(tables) <= 24 else 2
    places = math.ceil(len(tables) / columns)
    with page_style():
        figure = Figure(figsize=(WIDTH, BAR * places + 0.3))
        for column in range(columns):
            axes = _bar_axes(figure, column, columns, places)
            _draw_tables(axes, tables[column * places : (column + 1) * places])
        return inline_svg(figure, "dims", f"Columns kept per row block of {len(tables)} tables, largest table first")


def course_figure(course: list[dict[str, Any]]) -> Markup | None:
    """Draw every number recorded at the search steps, one panel each."""
    lines = _series(course, "step")
    return _panels({title: {"": line} for title, line in lines.items()}, [""], "search step", "course")


def curves_figure(stages: Mapping[str, list[dict[str, Any]]]) -> Markup | None:
    """Draw every number recorded per epoch, one panel each; stages take the line colours in turn, as in the legend."""
    panels: dict[str, dict[str, Series]] = {}
    for stage, rows in stages.items():
        for title, line in _series(rows, "epoch").items():
            panels.setdefault(title, {})[stage] = line
    return _panels(panels, list(stages), "epoch", "curves")


def _bar_axes(figure: Figure, column: int, columns: int, places: int) -> Axes:
    """Return the axes of one column of bars, with room for names at the left and bytes at the right."""
    width, height = figure.get_size_inches()
    left, right, bottom = 1.35, 1.05, 0.25
    inner = width / columns - left - right
    box = ((column * width / columns + left) / width, bottom / height, inner / width, BAR * places / height)
    axes = figure.add_axes(box, xlim=(0, 1), ylim=(0.5 - places, 0.5))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100% of rows"])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return axes


def _draw_tables(axes: Axes, tables: list[Table]) -> None:
    names = [label(table.name, 18) for table in tables]
    axes.set_yticks([-place for place in range(len(tables))], names, color=INK, parse_math=False)
    for place, table in enumerate(tables):
        axes.add_patch(Rectangle((0, -place - 0.4), 1, 0.8, facecolor=TRACK))
        _draw_blocks(axes, -place, table)
        share = percent(table.size_bytes, table.original_bytes)
        size = f"{human_bytes(table.original_bytes)} \N{RIGHTWARDS ARROW} {share}"
        axes.text(1.01, -place, size, color=MUTED, fontsize=7, va="center")


def _draw_blocks(axes: Axes, place: float, table: Table) -> None:
    left, width = 0.0, axes.get_window_extent().width
    for block in table.blocks:
        share, text = block.rows / table.rows, dim_text(block.dim)
        height, colour = (0.8 * block.dim / table.dim, KEPT) if block.dim else (0.8, DROPPED)
        # The thin edge keeps a block visible that is narrower than a pixel.
        axes.add_patch(Rectangle((left, place - 0.4), share, height, facecolor=colour, edgecolor=colour, lw=0.4))
        if share * width > 8 * len(text):
            axes.text(left + share / 2, place, text, fontsize=7, ha="center", va="center")
        left += share


def _series(rows: list[dict[str, Any]], x: str) -> dict[str, Series]:
    """Return the series of numbers in ``rows`` over ``x``, without those that are nowhere defined."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _SETTINGS)
    places = [_number(row.get(x)) for row in rows]
    lines = {name: (places, [_number(row.get(name)) for row in rows]) for name in names}
    return {name: line for name, line in lines.items() if any(map(math.isfinite, line[1]))}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _panels(panels: Mapping[str, Mapping[str, Series]], lines: list[str], x_label: str, name: str) -> Markup | None:
    """Draw small multiples, at most four in a row: the validation metrics first, then what else was recorded."""
    if not panels:
        return None
    colours = dict(zip(lines, cycle(LINES), strict=False))
    ranked = sorted(panels, key=lambda title: list(_TITLES).index(title) if title in _TITLES else len(_TITLES))
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    with page_style():
        figure = Figure(figsize=(WIDTH, 2.1 * rows + 0.3), layout="constrained")
        for number, title in enumerate(ranked, 1):
            axes = figure.add_subplot(rows, columns, number)
            _draw_panel(axes, title, panels[title], colours)
            axes.set_xlabel(x_label)
        return inline_svg(figure, name, f"Curves by {x_label}: {', '.join(ranked)}")


def _draw_panel(axes: Axes, title: str, lines: Mapping[str, Series], colours: Mapping[str, str]) -> None:
    axes.set_title(label(_TITLES.get(title, title.replace("_", " ")), 40), parse_math=False)
    for name, (x, y) in lines.items():
        axes.plot(x, y, color=colours[name], lw=1.5, marker="o" if len(x) <= 40 else None, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.ticklabel_format(useOffset=False)
    if max(axes.get_ylim()) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter())
