"""Where the columns of a compact collection's output come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Layout:
    """Where the lookup of all parts puts the columns of each slot; S slots of dims D_0, D_1, ...

    Args:
        stored: int64 (sum of dims,), slot by slot and there in plan order: the column of the lookup, or -1 where none is
            stored.
        starts: int64 (sum of dims,), slot by slot: the slot's first column.
        is_natural: whether the lookup's columns are the output's, where no slot has a column order of its own.
    """

    stored: Tensor
    starts: Tensor
    is_natural: bool

    @classmethod
    def of(cls, parts: Sequence[Sequence[tuple[int, int]]], dims: Sequence[int], device: torch.device) -> "Layout":
        """Lay out slots of ``dims``; ``parts`` are, per slot, the (first column in the lookup, width) of its chunks."""
        stored: list[int] = []
        for slot, dim in zip(parts, dims, strict=True):
            kept = [column for start, width in slot for column in range(start, start + width)]
            stored += kept + [-1] * (dim - len(kept))
        starts = [sum(dims[:number]) for number, dim in enumerate(dims) for _ in range(dim)]
        is_natural = stored == list(range(len(stored)))
        return cls(torch.tensor(stored, device=device), torch.tensor(starts, device=device), is_natural)

    def source(self, placements: Sequence[Tensor | None], dims: Sequence[int]) -> Tensor | None:
        """Return the column in the lookup of each column of the output, or -1; ``None`` where they are the same.

        Args:
            placements: per slot the place of each original column in the column order, int32 (D,), or ``None``.
            dims: per slot.
        """
        if all(placement is None for placement in placements):
            return None if self.is_natural else self.stored
        device = self.stored.device
        places = [
            torch.arange(dim, dtype=torch.int32, device=device) if placement is None else placement
            for placement, dim in zip(placements, dims, strict=True)
        ]
        return self.stored.index_select(0, torch.cat(places) + self.starts)


def take_columns(values: Tensor, source: Tensor) -> Tensor:
    """Return ``values[:, source]``, with zeros where ``source`` is -1; it names each column of ``values`` once."""
    taken: Tensor = _TakenColumns.apply(values, source)
    return taken


class _TakenColumns(torch.autograd.Function):
    """The gradient is a gather too: adding it up column by column, as of any gather, would take ten times as long."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor) -> Tensor:
        width = values.shape[1]  # where columns that are not stored are written, so that a GPU's host need not count them
        columns = torch.where(source < 0, width, source)
        places = source.new_empty(width + 1).scatter_(0, columns, torch.arange(len(source), device=source.device))[:width]
        ctx.save_for_backward(places)
        if width == len(source):
            return values.index_select(1, source)
        # Where most columns are zero, placing the others takes a quarter of the time of a gather that zeros are put into.
        return values.new_zeros(len(values), len(source)).scatter_(1, places.expand(len(values), -1), values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(1, places), None
