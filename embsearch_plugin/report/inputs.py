"""What a report is made of: ``metrics.json`` and ``plan.json`` of one run folder, checked once, here."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import cattrs

from embsearch_plugin.errors import RunFolderError

Number = float | None
"""A measurement; None where it is undefined, as the AUC of a single class is."""


@dataclass(frozen=True)
class Score:
    """The quality of one model on one split."""

    auc: Number
    log_loss: Number


@dataclass(frozen=True)
class Model:
    """One trained model: what it costs and how good it is."""

    name: str
    bytes: int
    epochs: int | None
    seconds: Number
    validation: Score
    test: Score


@dataclass(frozen=True)
class Budget:
    """The budget as the user wrote it, and in bytes (None if it is not a number of bytes)."""

    text: str
    bytes: int | None


@dataclass(frozen=True)
class Search:
    """The algorithm, and a row of numbers for each recorded search step."""

    algorithm: str
    course: list[dict[str, Any]]


@dataclass(frozen=True)
class Metrics:
    """All that ``metrics.json`` says about a run."""

    recipe: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    budget: Budget
    models: list[Model]
    stages: dict[str, list[dict[str, Any]]]
    search: Search
    rows: dict[str, str] = field(default_factory=dict)  # from plugins, by the hook embsearch_report_rows

    def model(self, name: str) -> Model | None:
        """Return the model of that name, or None."""
        return next((model for model in self.models if model.name == name), None)


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


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or None if it is null, NaN or infinite."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


_converter = cattrs.Converter()
_converter.register_structure_hook(Number, lambda value, _: finite(value))


def structure(data: Any, kind: type[T], where: str) -> T:
    """Return ``data`` as a ``kind``; raise :class:`RunFolderError` with all that is wrong in it."""
    try:
        return _converter.structure(data, kind)
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error, path=kind.__name__.lower()))
        raise RunFolderError(f"{where} does not say what a report needs: {problems}. Run the recipe again.") from error


def read(path: Path, kind: type[T]) -> T:
    """Read a JSON file as a ``kind``; raise :class:`RunFolderError` if it is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"cannot read {path}: {error.strerror}. A run folder holds metrics.json and plan.json: "
            "name the folder of a finished run, or make one with `embsearch run RECIPE`."
        ) from error
    except ValueError as error:
        raise RunFolderError(f"{path} is not valid JSON: {error}. Run the recipe again to write it anew.") from error
    return structure(data, kind, str(path))
