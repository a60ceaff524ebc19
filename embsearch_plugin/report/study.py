"""The report of a study as an HTML page and as Markdown: its front beside the baselines, what mattered, and every trial."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.files import write_text
from embsearch_plugin.report.markdown import markdown_table, plain
from embsearch_plugin.report.page import template
from embsearch_plugin.report.study_figures import front_figure, history_figure, importance_figure, parallel_figure
from embsearch_plugin.tasks import TASKS

Content = dict[str, Any]
"""What ``study.json`` holds."""


def write_study_report(folder: Path) -> Path:
    """Write ``report.html`` from the ``study.json`` of a run folder, and return its path.

    Raises:
        RunFolderError: where that is missing or damaged.
    """
    write_text(folder / "report.html", _shown(folder, render))
    return folder / "report.html"


def study_markdown(folder: Path) -> str:
    """Return what the ``study.json`` of a run folder says as Markdown: what is suggested, the cost, and every trial.

    Raises:
        RunFolderError: where that is missing or damaged.
    """
    return _shown(folder, _markdown)


def _shown(folder: Path, show: Callable[[Content], str]) -> str:
    try:
        return show(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(
            f"{folder / 'study.json'} is missing or does not say what a report needs ({type(error).__name__}: {error}).\n"
            "  Possible solution: embsearch study with the same recipe and --out."
        ) from error


def _markdown(content: Content) -> str:
    last = "parameters, or why there is no result"
    names = ["trial", "state", *(objective["name"] for objective in content["objectives"]), last]
    rows = []
    for row in _rows(content):
        figures = [f"**{plain(figure)}**" if row["front"] else plain(figure) for figure in row["figures"]]
        rows.append([plain(str(row["name"])), row["state"], *figures, plain(row["text"])])
    return "\n\n".join([*sentences(content), cost(content), markdown_table(names, rows, {"trial", "state", last})])


def render(content: Content) -> str:
    """Return the page as HTML."""
    several = len(content["objectives"]) > 1
    figures = [
        ("history", "History", "Each trial's validation figure, and the best so far.", history_figure(content)),
        (
            "importances",
            "What mattered",
            "How much the parameters that all trials have say of which trials are the best tenth (PED-ANOVA), per objective.",
            importance_figure(content),
        ),
        (
            "parallel",
            "Parallel coordinates",
            "A line is a complete trial. A parameter that was not asked for leaves a gap. Dark: on the front; with one "
            "objective the best.",
            parallel_figure(content),
        ),
    ]
    if several:
        text = (
            "Complete trials, the front as a line, the suggested trial as a star. The baselines have the recipe's own "
            "settings, which nothing tuned."
        )
        figures.insert(0, ("front", "Pareto front", text, front_figure(content)))
    return template("study.html").render(
        title=f"Study of {content['recipe']['data']['name']} and {content['recipe']['model']['name']}",
        sentences=sentences(content),
        cost=cost(content),
        figures=figures,
        objectives=[objective["name"] for objective in content["objectives"]],
        rows=_rows(content),
        recipe=yaml.safe_dump(content["recipe"], sort_keys=False, allow_unicode=True),
        versions=content["versions"],
        machine=content["machine"],
    )


def sentences(content: Content) -> list[str]:
    """Say which trial is suggested and how it was found, what it reaches on test, and how many trials there were."""
    trials, chosen = content["trials"], content["chosen"]
    row = next(trial for trial in trials if trial["number"] == chosen)
    names = [objective["name"] for objective in content["objectives"]]
    found = ", ".join(f"{name} {figure}" for name, figure in zip(names, _figures(row["values"], content), strict=True))
    test = content["test"]
    states = {state: sum(trial["state"] == state for trial in trials) for state in ("complete", "pruned", "fail", "running")}
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    said = [f"Trial {chosen} is suggested: validation {found}.", f"It is {content['how']}."]
    if "chosen" in test:
        metric = TASKS[content["task"]].metrics[0]
        figures = [_number(metric.of(test[name])) for name in ("chosen", "dense")]
        said.append(f"On test it has {metric.name} {figures[0]}; the dense model has {figures[1]}.")
    return [*said, f"{len(trials)} trials: {counted}."]


def cost(content: Content) -> str:
    """Say what the study cost."""
    spent = content["cost"]
    total = 1 + spent["trials"] + spent["baselines"]
    return (
        f"It cost {total:.3g} plain training runs: one for the dense model, {spent['trials']:.3g} for all trials and "
        f"{spent['baselines']:.3g} for the baselines. One takes {spent['seconds_of_one']:.3g} s here."
    )


def _rows(content: Content) -> list[dict[str, Any]]:
    return [*(_row(trial, content) for trial in content["trials"]), *_references(content)]


def _row(trial: dict[str, Any], content: Content) -> dict[str, Any]:
    parameters = ", ".join(f"{name} {_number(value)}" for name, value in trial["params"].items())
    text = f"{parameters}. {trial['reason']}" if trial["reason"] else parameters
    return {
        "name": trial["number"],
        "state": trial["state"],
        "figures": _figures(trial["values"], content),
        "text": text,
        "front": trial["front"],
    }


def _references(content: Content) -> list[dict[str, Any]]:
    return [
        {
            "name": reference["name"],
            "state": "reference",
            "figures": _figures(reference["values"], content),
            "text": reference["reason"] or _settings_of(reference),
            "front": False,
        }
        for reference in content["references"]
    ]


def _settings_of(reference: dict[str, Any]) -> str:
    """Say what was trained: of a method that tries several allocations in a run, one alone."""
    several = reference.get("allocations", 1)
    return "the recipe's own settings" + (f"; of the {several} allocations that a run tries, one" if several > 1 else "")


def _figures(values: list[float] | None, content: Content) -> list[str]:
    if values is None:
        return ["-"] * len(content["objectives"])
    keys = [objective["key"] for objective in content["objectives"]]
    return [human_bytes(int(v)) if key == "bytes" else _number(v) for key, v in zip(keys, values, strict=True)]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
