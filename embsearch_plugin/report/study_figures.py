"""The pictures of a study."""

import math
from itertools import accumulate, cycle
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.report.comparison import MARKERS
from embsearch_plugin.report.svg import INK, LINES, MUTED, WIDTH, inline_svg, label, page_style

Content = dict[str, Any]
SHOWN = 12  # parameters beside each other


def front_figure(content: Content) -> Markup | None:
    """Draw the metric over each other objective: all complete trials, the front, the baselines, the suggested trial."""
    done = _complete(content)
    metric, *others = _metric_first(content)
    if not done or not others:
        return None
    with page_style():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        for place, other in enumerate(others, 1):
            axes = figure.add_subplot(
                1, len(others), place, xlabel=_name(content, other), ylabel=f"validation {_name(content, metric)}"
            )
            _draw_front(axes, content, other, metric)
            _scale_sizes(axes, content, other)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False)
        return inline_svg(figure, "front", f"{len(done)} trials by their objectives, and the baselines.")


def _draw_front(axes: Axes, content: Content, x: int, y: int) -> None:
    def places(found: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        ordered = sorted((entry["values"] for entry in found if entry["values"]), key=lambda values: values[x])
        return [values[x] for values in ordered], [values[y] for values in ordered]

    done, best = _complete(content), [trial for trial in _complete(content) if trial["front"]]
    axes.scatter(*places(done), s=14, color=MUTED, alpha=0.6, label="trial")
    line = "-" if len(content["objectives"]) == 2 else ""  # of three objectives, two do not make a line
    axes.plot(*places(best), color=LINES[0], lw=1.5, ls=line, marker="o", markersize=4, label="front")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for reference in content["references"]:
        by_name.setdefault(reference["name"].partition(" at ")[0], []).append(reference)
    for (name, found), colour, marker in zip(by_name.items(), cycle((INK, *LINES[1:])), cycle(MARKERS[1:]), strict=False):
        axes.scatter(*places(found), s=28, color=colour, marker=marker, label=label(name, 24))
    axes.scatter(
        *places([t for t in best if t["number"] == content["chosen"]]), s=140, color=LINES[0], marker="*", label="suggested"
    )
    axes.ticklabel_format(axis="y", useOffset=False)


def _scale_sizes(axes: Axes, content: Content, place: int) -> None:
    """Scale an axis of bytes or microseconds by magnitude, where there is one."""
    values = [trial["values"][place] for trial in _complete(content)]
    if min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    in_bytes = content["objectives"][place]["key"] == "bytes"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_bytes(int(x)) if in_bytes else f"{x:g}"))


def history_figure(content: Content) -> Markup | None:
    """Draw the metric by trial, and the best so far."""
    done, metric = _complete(content), _metric_first(content)[0]
    if not done:
        return None
    numbers, values = [trial["number"] for trial in done], [trial["values"][metric] for trial in done]
    best = list(accumulate(values, max if content["objectives"][metric]["sign"] > 0 else min))
    with page_style():
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.add_subplot(xlabel="trial", ylabel=f"validation {_name(content, metric)}")
        axes.scatter(numbers, values, s=14, color=MUTED)
        axes.step(numbers, best, where="post", color=LINES[0], lw=1.5)
        axes.ticklabel_format(useOffset=False)
        return inline_svg(
            figure, "history", f"{len(done)} complete trials; the best {_name(content, metric)} is {best[-1]:.5g}."
        )


def importance_figure(content: Content) -> Markup | None:
    """Draw the importances of parameters, a panel for each objective."""
    found = content["importances"]
    if not found:
        return None
    with page_style():
        rows = max(len(shares) for shares in found.values())
        figure = Figure(figsize=(WIDTH, 0.8 + 0.25 * min(rows, SHOWN)), layout="constrained")
        for place, (objective, shares) in enumerate(found.items(), 1):
            axes = figure.add_subplot(1, len(found), place, xlabel=f"importance for {objective}", xlim=(0, 1))
            shown = list(shares.items())[:SHOWN][::-1]
            axes.barh([label(name, 28) for name, _ in shown], [share for _, share in shown], color=LINES[0], height=0.6)
            axes.grid(axis="y", visible=False)
        described = "; ".join(
            f"{name}: {', '.join(f'{p} {s:.2f}' for p, s in shares.items())}" for name, shares in found.items()
        )
        return inline_svg(figure, "importances", described)


def parallel_figure(content: Content) -> Markup | None:
    """Draw each complete trial as a line through its parameters and its values."""
    done = _complete(content)
    names = list(dict.fromkeys(name for trial in done for name in trial["params"]))[:SHOWN]
    if not done or not names:
        return None
    axis_names = [*names, *(objective["name"] for objective in content["objectives"])]
    lines = [[*(_drawn(trial["params"], name) for name in names), *trial["values"]] for trial in done]
    scales = [_Scale([line[place] for line in lines]) for place in range(len(axis_names))]
    with page_style():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot(ylim=(-0.12, 1.12))
        for trial, line in sorted(zip(done, lines, strict=True), key=lambda pair: pair[0]["front"]):
            heights = [scale.of(value) for scale, value in zip(scales, line, strict=True)]
            if trial["front"]:
                axes.plot(range(len(line)), heights, color=LINES[0], lw=1.6, zorder=3)
            else:
                axes.plot(range(len(line)), heights, color=MUTED, lw=0.7, alpha=0.5)
        axes.set_xticks(range(len(axis_names)), [label(name, 22) for name in axis_names], rotation=20, ha="right")
        axes.set_yticks([])
        for place, scale in enumerate(scales):
            for text, height in scale.marks:
                below = height == 0
                place_of_text = (place, height - 0.03 if below else height)
                axes.annotate(text, place_of_text, ha="center", va="top" if below else "bottom", fontsize=7, color=MUTED)
        return inline_svg(figure, "parallel", f"{len(done)} trials by {', '.join(axis_names)}.")


def _drawn(params: dict[str, Any], name: str) -> Any:
    """Return what was drawn; a choice of null as that word, and None where nothing was asked for."""
    return "null" if name in params and params[name] is None else params.get(name)


class _Scale:
    """Places the values of one axis between 0 and 1: numbers by size, or by magnitude where they span more than that of ten."""

    def __init__(self, values: list[Any]) -> None:
        known = [value for value in values if value is not None]
        self._numbers = all(isinstance(value, int | float) for value in known)
        ordered = sorted(set(known), key=(lambda value: value) if self._numbers else str)
        self._logarithmic = self._numbers and ordered[0] > 0 and ordered[-1] > 10 * ordered[0]
        self._places = {value: number for number, value in enumerate(ordered)}
        self._ends = (self._raw(ordered[0]), self._raw(ordered[-1]))
        shown = (ordered[0], ordered[-1]) if self._numbers else ordered
        self.marks = [(label(f"{v:.3g}" if isinstance(v, float) else str(v), 14), self.of(v)) for v in shown]

    def of(self, value: Any) -> float:
        """Return where a value is; NaN where there is none, which leaves a gap."""
        if value is None:
            return math.nan
        low, high = self._ends
        return (self._raw(value) - low) / (high - low) if high > low else 0.5

    def _raw(self, value: Any) -> float:
        if not self._numbers:
            return float(self._places[value])
        return math.log(value) if self._logarithmic else float(value)


def _complete(content: Content) -> list[dict[str, Any]]:
    return [trial for trial in content["trials"] if trial["values"]]


def _metric_first(content: Content) -> list[int]:
    """Return the places of the objectives, that of the metric first."""
    keys = [objective["key"] for objective in content["objectives"]]
    return sorted(range(len(keys)), key=lambda place: keys[place] in ("bytes", "latency"))


def _name(content: Content, place: int) -> str:
    return str(content["objectives"][place]["name"])
