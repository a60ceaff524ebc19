"""The section ``study`` of a recipe: what is varied, and what is wanted. Plain data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embsearch_plugin.errors import SettingsError
from embsearch_plugin.ranges import Choices, Range, is_number

DEFAULT_SAMPLER = {"name": "TPESampler"}
DEFAULT_PRUNER = {"name": "MedianPruner", "n_startup_trials": 5, "n_warmup_steps": 2}
ROW_BLOCKS, COLUMN_CHUNKS = Range(1, 6), Range(1, 4)
ROW_GROWTH, COLUMN_GROWTH = Range(1.0, 8.0, log=True), Range(0.25, 8.0, log=True)
METRIC, BYTES, LATENCY = "metric", "bytes", "latency"


@dataclass(frozen=True)
class Layout:
    """How tables are cut, as a space: how many row blocks and column chunks there are, and how large.

    A block is so many times as large as the block of more frequent rows before it, and so for chunks. So every draw sums to
    one, and where no growth is below one, shares rise. Growths of blocks that a draw does not have are not asked for, and
    nothing of rows or columns where the algorithm does not cut them.

    Args:
        row_blocks: how many; null for what the recipe's space says.
        row_growth: of row blocks.
        column_chunks: how many; null for what the recipe's space says.
        column_growth: of column chunks, whose ends are then rounded to multiples of the space's ``align``.
        groups: by a name of your own, the tables (patterns such as "t_user*") that share a layout; all share one by default.
    """

    row_blocks: Range | None = ROW_BLOCKS
    row_growth: Range = ROW_GROWTH
    column_chunks: Range | None = COLUMN_CHUNKS
    column_growth: Range = COLUMN_GROWTH
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("row_blocks", "column_chunks"):
            count: Range | None = getattr(self, name)
            if count is not None and not all(isinstance(end, int) and end >= 1 for end in count.ends):
                raise SettingsError(f"{name} must range over whole numbers from 1; got {count.low!r} to {count.high!r}")
            if count is not None and count.fraction:
                raise SettingsError(f"{name}: {count.fraction}")
        for name in ("row_growth", "column_growth"):
            growth: Range = getattr(self, name)
            if not all(is_number(end) and end > 0 for end in growth.ends):
                raise SettingsError(f"{name} must range over numbers above 0; got {growth.low!r} to {growth.high!r}")
        if empty := [group for group, tables in self.groups.items() if not tables]:
            raise SettingsError(f"groups must hold at least one table each; {', '.join(empty)} holds none")


@dataclass(frozen=True)
class Study:
    """What ``embsearch study`` varies, and what it wants. A trial is the recipe with other values.

    Args:
        fields: what is varied, by name, and the values: a range (``{low: 0.001, high: 0.1, log: true}``), a list of choices, or
            null for the range that the field declares. A name is a field of the recipe (``train.lr``, ``model.embedding_dim``,
            ``search.algorithm``, ``search.budgets`` for one budget), or a field of an algorithm (``dnis.lr``), which is asked
            for only where that algorithm is chosen; an algorithm's name alone is all the ranges that it declares.
        layout: how tables are cut; null for what the recipe says.
        objectives: one to three of ``metric`` (the task's first on the validation split, or one by its key), ``bytes`` of all
            tables, and ``latency`` of their lookups in microseconds per batch. One objective is a metric within the recipe's
            budget, and trials are pruned; more are a Pareto front, and Optuna does not prune.
        sampler: one of Optuna's by the name of its class, with its arguments.
        pruner: likewise; by default MedianPruner, from the third epoch on, where there is one objective.
        storage: a URL as Optuna takes it (sqlite, postgresql, mysql, redis), or ``journal:///FILE``; by default SQLite in the
            run folder.
        name: the study's in the storage; by default that of the run folder.
    """

    fields: Mapping[str, Range | Choices | None]
    layout: Layout | None = None
    objectives: tuple[str, ...] = (METRIC, BYTES)
    sampler: Any = field(default_factory=lambda: dict(DEFAULT_SAMPLER))
    pruner: Any = None
    storage: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for part in ("sampler", "pruner"):
            object.__setattr__(self, part, _named(part, getattr(self, part)))
        if problems := self._problems():
            raise SettingsError("; ".join(problems))

    def _problems(self) -> list[str]:
        problems = [
            f"{name} must hold at least one choice, none twice; got {list(values)}"
            for name, values in self.fields.items()
            if isinstance(values, tuple) and (not values or any(values.count(value) > 1 for value in values))
        ]
        if not 1 <= len(self.objectives) <= 3 or len(set(self.objectives)) < len(self.objectives):
            problems.append(f"objectives must be one to three, none twice; got {list(self.objectives)}")
        if self.metric is None:
            problems.append(f"one objective, and only one, must be a metric; got {list(self.objectives)}")
        if self.pruner is not None and len(self.objectives) > 1:
            problems.append(f"pruner must be null with {len(self.objectives)} objectives: Optuna prunes with one only")
        if not self.fields and self.layout is None:
            problems.append("there must be something to vary: fields, or a layout")
        return problems

    @property
    def metric(self) -> str | None:
        """The one objective that is neither bytes nor latency."""
        named = [name for name in self.objectives if name not in (BYTES, LATENCY)]
        return named[0] if len(named) == 1 else None


def _named(part: str, given: Any) -> Any:
    """Return a part of Optuna's as a mapping with its ``name``."""
    if given is None or (isinstance(given, Mapping) and isinstance(given.get("name"), str)):
        return given
    if isinstance(given, str):
        return {"name": given}
    raise SettingsError(f"{part} must be the name of a class of Optuna's, or a mapping with a name; got {given!r}")


def hidden(url: str) -> str:
    """Return a storage's URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
