"""The pictures of how the models came about: what was recorded at the search steps, and after each epoch."""

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from embsearch_plugin.report.svg import LINES, WIDTH, inline_svg, label, page_style
from embsearch_plugin.tasks import TASKS

Rows = list[dict[str, Any]]
"""What was recorded, a row per search step or epoch."""

Series = tuple[list[float], list[float]]
"""x and y of one line; NaN where nothing is defined."""

Panels = Mapping[str, Mapping[str, Series]]
"""By what was measured, the lines of a panel by name."""

_TITLES = {
    **{metric.key: f"validation {metric.name}" for task in TASKS.values() for metric in task.metrics},
    "loss": "validation loss",
    "train_loss": "training loss",
}
_SETTINGS = {"step", "steps", "epoch", "seconds"}  # what a row is about, not what was measured


def course_figure(course: Rows) -> Markup | None:
    """Draw every number recorded at the search steps, one panel each; None if there is none."""
    panels = {title: {"": line} for title, line in _series(course, "step").items()}
    return draw_panels({"": panels}, [""], "search step", "course")


def curves_figure(models: Mapping[str, Mapping[str, Rows]]) -> Markup | None:
    """Draw every number recorded per epoch, one panel each, in rows of panels by ``models``; None if there is none.

    A model is given by its budget, and its epochs by stage; stages take the line colours in turn, as in the legend.
    """
    return draw_panels(
        {budget: _by_measure(stages) for budget, stages in models.items()}, stage_names(models), "epoch", "curves"
    )


def stage_names(models: Mapping[str, Mapping[str, Rows]]) -> list[str]:
    """Return the stages of all models, in the order of their colours."""
    return list(dict.fromkeys(stage for stages in models.values() for stage in stages))


def _by_measure(stages: Mapping[str, Rows]) -> Panels:
    panels: dict[str, dict[str, Series]] = {}
    for stage, rows in stages.items():
        for title, line in _series(rows, "epoch").items():
            panels.setdefault(title, {})[stage] = line
    return panels


def _series(rows: list[dict[str, Any]], x: str) -> dict[str, Series]:
    """Return the series of numbers in ``rows`` over ``x``, without those that are nowhere defined."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _SETTINGS)
    places = [_number(row.get(x)) for row in rows]
    lines = {name: (places, [_number(row.get(name)) for row in rows]) for name in names}
    return {name: line for name, line in lines.items() if any(map(math.isfinite, line[1]))}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def draw_panels(models: Mapping[str, Panels], lines: list[str], x_label: str, name: str) -> Markup | None:
    """Draw small multiples, each model's on rows of their own, with one scale for what is measured alike."""
    titles = _ranked({title for panels in models.values() for title in panels})
    if not titles:
        return None
    colours, scales = dict(zip(lines, cycle(LINES), strict=False)), dict[str, Axes]()
    columns = min(len(titles), 4)
    rows = math.ceil(len(titles) / columns)
    with page_style():
        figure = Figure(figsize=(WIDTH, 2.1 * rows * len(models) + 0.3), layout="constrained")
        for above, (model, panels) in enumerate(models.items()):
            for place, title in enumerate(titles, above * rows * columns + 1):
                if title in panels:
                    axes = figure.add_subplot(rows * len(models), columns, place, xlabel=x_label, sharey=scales.get(title))
                    scales.setdefault(title, axes)
                    _draw_panel(axes, _title(title, model), panels[title], colours)
        for title, axes in scales.items():
            _fit_scale(axes, [line for panels in models.values() for line in panels.get(title, {}).values()])
        return inline_svg(figure, name, f"Curves by {x_label}: {', '.join(titles)}")


def _fit_scale(axes: Axes, lines: list[Series]) -> None:
    """Fit the scale to what follows the start: beside an untrained model (epoch 0) all trained ones look alike."""
    values = [y for line in lines for x, y in zip(*line, strict=True) if x > 0 and math.isfinite(y)]
    if values and min(values) < max(values):
        margin = 0.05 * (max(values) - min(values))
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _ranked(titles: set[str]) -> list[str]:
    """Return the validation metrics first, then what else was recorded."""
    known = list(_TITLES)
    return sorted(titles, key=lambda title: (known.index(title) if title in known else len(known), title))


def _title(title: str, model: str) -> str:
    return label(_TITLES.get(title, title.replace("_", " ")), 40) + (f", {label(model, 18)}" if model else "")


def _draw_panel(axes: Axes, title: str, lines: Mapping[str, Series], colours: Mapping[str, str]) -> None:
    axes.set_title(title)
    for name, (x, y) in lines.items():
        axes.plot(x, y, color=colours[name], lw=1.5, marker="o" if len(x) <= 40 else None, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.ticklabel_format(useOffset=False)
    if max(axes.get_ylim()) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter())
