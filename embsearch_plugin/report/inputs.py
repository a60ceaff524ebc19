"""What a report is made of: the ``metrics.json`` of a run folder and the ``plan.json`` of its cells, checked once, here."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import cattrs

from embsearch_plugin.errors import RunFolderError
from embsearch_plugin.tasks import CLICK, TASKS, Score, Task

Number = float | None
"""A measurement; None where it is undefined, as the AUC of a single class is."""


@dataclass(frozen=True)
class Budget:
    """The budget as the user wrote it, and in bytes (None if it is not a number of bytes)."""

    text: str
    bytes: int | None


@dataclass(frozen=True)
class Cell:
    """One trained model: an allocation of a method at a budget, from one seed, with one trial's training settings.

    ``status`` is ``done``, or else the word for why there are no figures (``infeasible``), which ``reason`` explains.
    The chosen cells of a method at a budget share one trial and one allocation, differ in seed, and are the only ones that
    were tested.
    """

    method: str
    budget: str | None  # None for the dense model
    seed: int
    trial: dict[str, Any]
    status: str
    reason: str | None
    bytes: int | None
    epochs: int | None
    seconds: Number
    validation: Score | None
    chosen: bool
    test: Score | None
    stages: dict[str, list[dict[str, Any]]]
    folder: str
    capped: list[str] = field(default_factory=list)  # stages that ended because the epochs were used up
    allocation: str = ""  # what tells it from the others that the method tried; empty where it tries one

    @property
    def done(self) -> bool:
        """Whether there are figures."""
        return self.status == "done"


@dataclass(frozen=True)
class Metrics:
    """All that ``metrics.json`` says about a run."""

    recipe: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    algorithm: str  # the recipe's own; the other methods are what it is compared with
    original_bytes: int
    budgets: list[Budget]
    cells: list[Cell]
    course: list[dict[str, Any]]
    rows: dict[str, str] = field(default_factory=dict)  # from plugins, by the hook embsearch_report_rows
    task: Task = CLICK  # by its name


@dataclass(frozen=True)
class Block:
    """Rows that follow each other in plan order, and the columns they keep (a mean if the plan is fine-grained)."""

    rows: int
    dim: float


@dataclass(frozen=True)
class Table:
    """One embedding table before (``rows`` x ``dim``) and after (its blocks)."""

    collection: str
    name: str
    rows: int
    dim: int
    blocks: list[Block]
    size_bytes: int
    original_bytes: int
    features: list[str] = field(default_factory=list)
    kind: Literal["blocks", "fine"] = "blocks"


@dataclass(frozen=True)
class Plan:
    """All that ``plan.json`` says about the tables."""

    format: Literal["embsearch-plan"]
    version: Literal[1]
    size_bytes: int
    original_bytes: int
    tables: list[Table]

    def largest_first(self) -> list[Table]:
        """Return the tables by falling original bytes; the name decides between equals."""
        return sorted(self.tables, key=lambda table: (-table.original_bytes, table.name))


T = TypeVar("T", Metrics, Plan)


def checked(metrics: Metrics | dict[str, Any]) -> Metrics:
    """Return metrics as they are, or the content of a ``metrics.json`` as metrics.

    Raises:
        RunFolderError: where something is missing, of the wrong kind, or contradicts itself.
    """
    return metrics if isinstance(metrics, Metrics) else structure(metrics, Metrics, "metrics")


def read(path: Path, kind: type[T]) -> T:
    """Read a JSON file as a ``kind``; raise :class:`RunFolderError` if it is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"cannot read {path}: {error.strerror}. A run folder holds metrics.json, and a plan.json for each compact model: "
            "name the folder of a finished run, or make one with `embsearch run RECIPE`."
        ) from error
    except ValueError as error:
        raise RunFolderError(f"{path} is not valid JSON: {error}. Run the recipe again to write it anew.") from error
    return structure(data, kind, str(path))


def structure(data: Any, kind: type[T], where: str) -> T:
    """Return ``data`` as a ``kind``; raise :class:`RunFolderError` with all that is wrong in it."""
    try:
        value = _converter.structure(data, kind)
    except cattrs.BaseValidationError as error:
        raise _malformed(where, cattrs.transform_error(error, path=kind.__name__.lower())) from error
    problems = list(_contradictions(value)) if isinstance(value, Metrics) else []
    if problems:
        raise _malformed(where, problems)
    return value


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or None if it is null, NaN or infinite."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


_converter = cattrs.Converter()
_converter.register_structure_hook(Number, lambda value, _: finite(value))
_converter.register_structure_hook(Task, lambda value, _: TASKS[value])


def _malformed(where: str, problems: list[str]) -> RunFolderError:
    return RunFolderError(f"{where} does not say what a report needs: {'; '.join(problems)}. Run the recipe again.")


def _contradictions(metrics: Metrics) -> Iterator[str]:
    """Say what is of the right form and would still make a report lie."""
    budgets = {budget.text for budget in metrics.budgets}
    for number, cell in enumerate(metrics.cells):
        at = f"@ metrics.cells[{number}]"
        if cell.budget is not None and cell.budget not in budgets:
            yield f"budget {cell.budget!r} is not one of the run's {at}"
        if cell.done and (cell.bytes is None or cell.validation is None):
            yield f"a cell that is done has bytes and validation figures {at}"
        if cell.chosen and not (cell.done and cell.test):
            yield f"a cell that is chosen is done and has test figures {at}"
        for split, score in (("validation", cell.validation), ("test", cell.test)):
            missing = [metric.key for metric in metrics.task.metrics if score is not None and metric.key not in score]
            if missing:
                yield f"a {metrics.task.name} model has figures for {', '.join(missing)} {at}.{split}"
    yield from _doubtful_groups([cell for cell in metrics.cells if cell.chosen])


def _doubtful_groups(chosen: list[Cell]) -> Iterator[str]:
    def group(cell: Cell) -> tuple[str, str]:
        return cell.method, cell.budget or ""

    for (method, budget), members in groupby(sorted(chosen, key=group), group):
        cells = list(members)
        name = f"{method} at {budget}" if budget else method
        if any(cell.trial != cells[0].trial for cell in cells):
            yield f"the chosen cells of {name} have different trials @ metrics.cells"
        if any(cell.allocation != cells[0].allocation for cell in cells):
            yield f"the chosen cells of {name} have different allocations @ metrics.cells"
        if len({cell.seed for cell in cells}) < len(cells):
            yield f"a seed of {name} is chosen twice @ metrics.cells"
