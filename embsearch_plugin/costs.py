"""What the parts of a stored table cost, in bytes or in parameters: the one place where either is counted."""

from enum import StrEnum
from typing import Protocol

import torch

from embsearch_plugin.collection import Table

INDEX_BYTES = torch.int32.itemsize
PROJECTION_DTYPE = torch.float32


class Sized(Protocol):
    """A plan, of a table or of a model."""

    @property
    def size_bytes(self) -> int:
        """Bytes as stored."""

    @property
    def n_params(self) -> int:
        """Weights, those of projections and biases included."""


class Unit(StrEnum):
    """What a budget counts: bytes, indices included, or parameters, as the papers do, which know no indices."""

    BYTES = "bytes"
    PARAMETERS = "parameters"

    def weights(self, table: Table, count: int) -> int:
        """Return what weights of a table cost."""
        return count * table.dtype.itemsize if self is Unit.BYTES else count

    def remap(self, table: Table) -> int:
        """Return what the map from a row to its place in the plan costs: int32 (V,)."""
        return self._index(table.rows * INDEX_BYTES)

    def placement(self, table: Table) -> int:
        """Return what the map from a column to its place in the plan costs: int32 (D,)."""
        return self._index(table.dim * INDEX_BYTES)

    def projected_column(self, table: Table) -> int:
        """Return what the projection's row of one stored column costs, float32 (D,); a bias costs as much."""
        return table.dim * PROJECTION_DTYPE.itemsize if self is Unit.BYTES else table.dim

    def fine_index(self, table: Table, kept: int) -> int:
        """Return what a compressed sparse row index costs: int32 row starts (V + 1,), a column number for each kept weight."""
        return self._index((table.rows + 1) * INDEX_BYTES + kept * column_dtype(table.dim).itemsize)

    def _index(self, count: int) -> int:
        return count if self is Unit.BYTES else 0

    def of(self, plan: Sized) -> int:
        """Return what a plan costs."""
        return plan.size_bytes if self is Unit.BYTES else plan.n_params

    def text(self, count: int) -> str:
        """Return a cost as people read it."""
        return human_bytes(count) if self is Unit.BYTES else f"{count:,} parameters"


def column_dtype(dim: int) -> torch.dtype:
    """Return the smallest integer type that numbers ``dim`` columns."""
    return torch.uint8 if dim <= 256 else torch.int16 if dim <= 2**15 else torch.int32


def human_bytes(count: float) -> str:
    """Return a size as people read it: ``"3.1 MiB"``."""
    if abs(round(count)) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(round(count, 1)) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
