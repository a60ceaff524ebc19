"""Numbers as people read them, and the table that compares the models.

The terminal and the HTML page show the same rows, made by :func:`result_rows`, so the two cannot disagree.
"""

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from embsearch_plugin.budget import human_bytes
from embsearch_plugin.report.inputs import Metrics, Model, Number, structure

__all__ = [
    "COLUMNS",
    "TIMES",
    "UNDEFINED",
    "Cell",
    "dim_text",
    "human_bytes",
    "percent",
    "result_rows",
    "results_table",
]

UNDEFINED = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"

COLUMNS = (
    "model",
    "test AUC",
    "test log loss",
    "val AUC",
    "embedding bytes",
    "of dense",
    "seconds",
    "time / dense",
    "epochs",
)


@dataclass(frozen=True)
class Cell:
    """A rounded figure to read and, where rounding hides something, the exact one."""

    text: str
    exact: str = ""


def percent(part: float, whole: float) -> str:
    """Return ``part`` of ``whole`` as a percentage, or a dash if there is no whole."""
    return f"{part / whole:.1%}" if whole else UNDEFINED


def dim_text(dim: float) -> str:
    """Return a dim, or the mean of several: ``16``, ``7.4``, ``0.03``."""
    return f"{round(dim, 1 if dim >= 1 else 2):g}"


def result_rows(metrics: Metrics) -> list[list[Cell]]:
    """Return one row of cells, in the order of :data:`COLUMNS`, for each model."""
    dense = metrics.model("dense")
    return [_result_row(model, dense) for model in metrics.models]


def results_table(metrics: dict[str, Any]) -> Table:
    """Return the comparison of the models in the content of a ``metrics.json``, for the terminal.

    Raises :class:`~embsearch_plugin.errors.RunFolderError` if something is missing from it.
    """
    table = Table(COLUMNS[0], box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS[1:]:
        table.add_column(column.replace(" ", "\n", 1), justify="right")  # two lines, to fit 80 characters
    for row in result_rows(structure(metrics, Metrics, "metrics")):
        # Text, not str: a model's name is not markup.
        table.add_row(*(Text(cell.text) for cell in row))
    return table


def _result_row(model: Model, dense: Model | None) -> list[Cell]:
    return [
        Cell(model.name),
        _measure(model.test.auc),
        _measure(model.test.log_loss),
        _measure(model.validation.auc),
        Cell(human_bytes(model.bytes), f"{model.bytes:,} bytes"),
        Cell(percent(model.bytes, dense.bytes) if dense else UNDEFINED),
        _measure(model.seconds, digits=1),
        Cell(_ratio(model.seconds, dense.seconds if dense else None)),
        Cell(UNDEFINED if model.epochs is None else str(model.epochs)),
    ]


def _measure(value: Number, digits: int = 4) -> Cell:
    return Cell(UNDEFINED) if value is None else Cell(f"{value:,.{digits}f}", str(value))


def _ratio(value: Number, reference: Number) -> str:
    return f"{value / reference:.2f}{TIMES}" if value is not None and reference else UNDEFINED
