"""Multiplying pooled rows by gates, with as little memory as that takes.

A step's time on a CPU is largely the time to touch new memory, so what is as large as the output is made once, and is
made again in the backward rather than kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gate_rows(pooled: Sequence[Tensor], table: Tensor, rows: Tensor) -> Tensor:
    """Return pooled * table[rows], (B, sum of dims).

    Args:
        pooled: (B, sum of dims) in one or more runs of columns.
        table: (R, width), float32.
        rows: (B, sum of dims / width), the row of the table for each piece of ``pooled``.
    """
    gated: Tensor = _GatedRows.apply(table, rows, *pooled)
    return gated


def gate_cells(pooled: Tensor, gates: Tensor, *, overwrite: bool) -> Tensor:
    """Return the sum over cells s of pooled[s] * gates[s], (B, sum of dims).

    Args:
        pooled: (S, B, sum of dims).
        gates: (S, sum of dims), float32.
        overwrite: whether the backward may write the gradient of ``pooled`` in its place: nobody else reads it then.
    """
    gated: Tensor = _GatedCells.apply(pooled, gates, overwrite)
    return gated


class _GatedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, *pooled: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, *(pooled if ctx.needs_input_grad[0] else ()))
        ctx.runs = [(run.shape[1], run.dtype) for run in pooled]
        output = _gathered(table, rows, torch.promote_types(table.dtype, pooled[0].dtype))
        for part, run in zip(output.split([run.shape[1] for run in pooled], dim=1), pooled, strict=True):
            part.mul_(run)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, *pooled = ctx.saved_tensors
        of_table = torch.zeros_like(table) if pooled else None
        of_pooled: list[Tensor | None] = []
        widths = [width for width, _ in ctx.runs]
        by_run = zip(gradient.split(widths, 1), rows.split([w // table.shape[1] for w in widths], 1), strict=True)
        for number, (part, places) in enumerate(by_run):
            if of_table is not None:
                products = (pooled[number] * part).view(-1, table.shape[1])
                of_table.index_add_(0, places.flatten(), products.to(table.dtype))
            wanted = ctx.needs_input_grad[2 + number]
            of_pooled.append(_gathered(table, places, part.dtype).mul_(part).to(ctx.runs[number][1]) if wanted else None)
        return of_table, None, *of_pooled


class _GatedCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, gates: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(pooled if ctx.needs_input_grad[1] else None, gates)
        ctx.dtype, ctx.memory = pooled.dtype, pooled.detach() if overwrite else None
        total = pooled[0] * gates[0]
        for part, gate in zip(pooled[1:], gates[1:], strict=True):
            total.addcmul_(part.to(total.dtype), gate.to(total.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pooled, gates = ctx.saved_tensors
        of_pooled = of_gates = None
        if pooled is not None:
            product = torch.empty_like(gradient)  # one for all cells
            sums = [torch.mul(gradient, part, out=product).sum(0) for part in pooled]
            of_gates = torch.stack(sums).to(gates.dtype)
        if ctx.needs_input_grad[0]:
            of_pooled = torch.mul(gradient, gates[:, None], out=ctx.memory).to(ctx.dtype)
        return of_pooled, of_gates, None


def _gathered(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return table[rows] as (B, sum of dims)."""
    return table.index_select(0, rows.flatten()).view(rows.shape[0], -1).to(dtype)
