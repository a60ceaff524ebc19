"""The picture of a plan: what each table keeps."""

import math

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.report.inputs import Table
from embsearch_plugin.report.numbers import dim_text, percent
from embsearch_plugin.report.svg import DROPPED, INK, KEPT, MUTED, TRACK, WIDTH, inline_svg, label, page_style

BAR = 0.24  # height of a table's bar, with the space around it


def dims_figure(tables: list[Table], name: str = "dims") -> Markup | None:
    """Draw each table as a bar: rows from left to right in plan order, filled as high as the columns they keep.

    Return the picture, its ids beginning with ``name``, or None if there are no tables.
    """
    if not tables:
        return None
    columns = 1 if len(tables) <= 24 else 2
    places = math.ceil(len(tables) / columns)
    with page_style():
        figure = Figure(figsize=(WIDTH, BAR * places + 0.3))
        for column in range(columns):
            axes = _bar_axes(figure, column, columns, places)
            _draw_tables(axes, tables[column * places : (column + 1) * places])
        return inline_svg(figure, name, f"Columns kept per row block of {len(tables)} tables, largest table first")


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
    axes.set_yticks([-place for place in range(len(tables))], names, color=INK)
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
