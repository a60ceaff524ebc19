"""The picture of the results: quality by size, a line for each method."""

from itertools import cycle

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.report.inputs import Metrics
from embsearch_plugin.report.results import Result, common_metric, dense, results
from embsearch_plugin.report.svg import INK, LINES, WIDTH, inline_svg, label, page_style
from embsearch_plugin.tasks import Metric

MARKERS = "osD^vP"  # with the colours, so that lines differ in print and to the colour-blind too


def comparison_figure(metrics: Metrics) -> Markup | None:
    """Draw the test metric over bytes: means over seeds with their spreads; the dense model's as a band behind them."""
    found = [result for result in results(metrics) if result.chosen]
    metric, reference = common_metric(found, metrics.task), dense(found)
    lines = _lines(found)
    if metric is None or not lines:
        return None
    with page_style():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="bytes of the embedding tables", ylabel=f"test {metric.name}")
        if reference:
            _draw_reference(axes, reference, metric)
        for (method, points), colour, marker in zip(lines.items(), cycle(LINES), cycle(MARKERS), strict=False):
            _draw_line(axes, method, points, metric, (colour, marker))
        _mark_sizes(axes, found)
        axes.ticklabel_format(axis="y", useOffset=False)
        figure.legend(loc="outside right upper", frameon=False)
        return inline_svg(figure, "comparison", _description(metric, lines, reference))


def _lines(found: list[Result]) -> dict[str, list[Result]]:
    """Return the results of each method by rising size. What has no bytes has no place on a logarithmic axis."""
    lines: dict[str, list[Result]] = {}
    for result in sorted((result for result in found if result.budget and result.size), key=lambda result: result.size or 0):
        lines.setdefault(result.method, []).append(result)
    order = dict.fromkeys(result.method for result in found)
    return {method: lines[method] for method in order if method in lines}


def _draw_reference(axes: Axes, reference: Result, metric: Metric) -> None:
    estimate = reference.test(metric)
    if estimate is None:
        return
    axes.axhline(estimate.mean, color=INK, lw=1, ls="--", label=label(reference.method, 24))
    if estimate.spread:
        axes.axhspan(estimate.mean - estimate.spread, estimate.mean + estimate.spread, facecolor=INK, alpha=0.1, lw=0)


def _draw_line(axes: Axes, method: str, points: list[Result], metric: Metric, look: tuple[str, str]) -> None:
    known = [(result.size or 0, estimate) for result in points if (estimate := result.test(metric))]
    sizes, estimates = zip(*known, strict=True)
    means, spreads = [estimate.mean for estimate in estimates], [estimate.spread or 0 for estimate in estimates]
    (colour, marker), name = look, label(method, 24)
    axes.errorbar(sizes, means, spreads, color=colour, marker=marker, markersize=4, lw=1.5, elinewidth=1, capsize=3, label=name)


def _mark_sizes(axes: Axes, found: list[Result]) -> None:
    """Mark the budgets on the axis; one that is not in bytes stands where its largest model does."""
    sizes: dict[str, float] = {}
    for result in found:
        text = label(result.budget.text if result.budget else result.method, 18)
        limit = result.budget.bytes if result.budget else None
        sizes[text] = limit or max(sizes.get(text, 0), result.size or 0)
    marks = {text: size for text, size in sizes.items() if size}
    axes.set_xticks(list(marks.values()), [f"{text}\n{human_bytes(size)}" for text, size in marks.items()])
    axes.set_xticks([], minor=True)


def _description(metric: Metric, lines: dict[str, list[Result]], reference: Result | None) -> str:
    figures = [
        f"{method}: " + ", ".join(f"{result.test(metric)} at {human_bytes(result.size or 0)}" for result in points)
        for method, points in lines.items()
    ]
    if reference:
        figures.append(f"{reference.method}, a horizontal line: {reference.test(metric)}")
    return f"Test {metric.name} by bytes of the embedding tables. {'. '.join(figures)}."
