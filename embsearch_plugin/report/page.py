"""The HTML page of one run: one file that needs no other, for a browser, a printer or an archive."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.files import write_text
from embsearch_plugin.report.comparison import comparison_figure
from embsearch_plugin.report.curves import Rows, course_figure, curves_figure, stage_names
from embsearch_plugin.report.dims import dims_figure
from embsearch_plugin.report.headline import sentences
from embsearch_plugin.report.inputs import Cell, Metrics, Plan, read
from embsearch_plugin.report.numbers import dim_text, percent
from embsearch_plugin.report.results import Result, dense, results
from embsearch_plugin.report.rows import columns, footnotes, result_rows
from embsearch_plugin.report.trials import trial_columns, trial_rows


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the ``metrics.json`` and the plans of a run folder, and return its path.

    The same input gives the same bytes. A former report stays until the new one is complete.

    Raises:
        RunFolderError: where files are missing or do not say what a report needs; names them all.
    """
    metrics = read(folder / "metrics.json", Metrics)
    path = folder / "report.html"
    write_text(path, render(metrics, _plans(folder, searched(metrics))))
    return path


def searched(metrics: Metrics) -> list[Result]:
    """Return what the recipe's own algorithm reached, by budget. The page shows its first seed's plans and curves."""
    return [result for result in results(metrics) if result.method == metrics.algorithm and result.budget]


def render(metrics: Metrics, plans: Mapping[str, Plan]) -> str:
    """Return the page as HTML; ``plans`` are those of the recipe's algorithm, by the text of the budget."""
    models = _curves(metrics)
    return template("report.html").render(
        sentences=sentences(metrics),
        metrics=metrics,
        columns=columns(metrics),
        rows=result_rows(metrics),
        footnotes=footnotes(metrics),
        comparison=comparison_figure(metrics),
        trial_columns=trial_columns(metrics),
        trial_rows=trial_rows(metrics),
        plans=plans,
        dims={text: dims_figure(plan.largest_first(), f"dims-{place}") for place, (text, plan) in enumerate(plans.items())},
        missing={result.budget.text: result.missing for result in searched(metrics) if result.budget and result.missing},
        course=course_figure(metrics.course),
        stages=stage_names(models),
        curves=curves_figure(models),
        recipe=yaml.safe_dump(metrics.recipe, sort_keys=False, allow_unicode=True),
    )


def _plans(folder: Path, found: Iterable[Result]) -> dict[str, Plan]:
    """Read the plan of each result's first seed, by the text of its budget."""
    plans, problems = dict[str, Plan](), list[str]()
    for result in found:
        if result.budget and result.chosen:
            try:
                plans[result.budget.text] = read(folder / result.chosen[0].folder / "plan.json", Plan)
            except RunFolderError as error:
                problems.append(str(error))
    if problems:
        raise RunFolderError("\n".join(problems))
    return plans


def _curves(metrics: Metrics) -> dict[str, dict[str, Rows]]:
    """Return the epochs of the first seed's models: by budget, the dense model's stages and those of the searched one."""
    reference = dense(results(metrics))
    stages = reference.chosen[0].stages if reference else {}
    found = {r.budget.text: stages | _renamed(r.chosen[0], stages) for r in searched(metrics) if r.budget and r.chosen}
    return found or {"": stages}


def _renamed(cell: Cell, taken: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return a cell's stages; one that has the name of another model's gets the method's name too."""
    return {
        f"{name} ({cell.method})" if name in taken and taken[name] != rows else name: rows for name, rows in cell.stages.items()
    }


def template(name: str) -> Template:
    """Return a template of this package, with the filters and the functions that pages use."""
    environment = Environment(
        loader=PackageLoader("embsearch_plugin", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "dim": dim_text}
    environment.globals |= {"percent": percent}
    return environment.get_template(name)
