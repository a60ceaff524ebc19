"""The HTML page of one run: one file that needs no other, for a browser, a printer or an archive."""

from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from embsearch_plugin.budget import human_bytes
from embsearch_plugin.files import write_text
from embsearch_plugin.report.figures import course_figure, curves_figure, dims_figure
from embsearch_plugin.report.headline import headline
from embsearch_plugin.report.inputs import Metrics, Plan, read
from embsearch_plugin.report.text import COLUMNS, dim_text, percent, result_rows


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the ``metrics.json`` and ``plan.json`` of a run folder, and return its path.

    The same input gives the same bytes. A former report stays until the new one is complete.

    Raises:
        RunFolderError: where a file is missing or does not say what a report needs.
    """
    metrics, plan = read(folder / "metrics.json", Metrics), read(folder / "plan.json", Plan)
    path = folder / "report.html"
    write_text(path, render(metrics, plan))
    return path


def render(metrics: Metrics, plan: Plan) -> str:
    """Return the page as HTML."""
    tables = plan.largest_first()
    return _template().render(
        headline=headline(metrics),
        metrics=metrics,
        plan=plan,
        tables=tables,
        columns=COLUMNS,
        rows=result_rows(metrics),
        dims=dims_figure(tables),
        course=course_figure(metrics.search.course),
        curves=curves_figure(metrics.stages),
        recipe=yaml.safe_dump(metrics.recipe, sort_keys=False, allow_unicode=True),
    )


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("embsearch_plugin", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "dim": dim_text}
    environment.globals |= {"percent": percent}
    return environment.get_template("report.html")
