"""Multiplying pooled rows by gates, with as little memory as that takes.

A step's time on a CPU is largely the time to touch new memory, so what is as large as the output is made once, and is
made again in the backward rather than kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gate_rows(pooled: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return pooled * table[rows], (B, sum of dims).

    Args:
        pooled: (B, sum of dims).
        table: (R, width), float32.
        rows: (B x sum of dims / width,), the row of the table for each piece of ``pooled``, example by example.
    """
    gated: Tensor = _GatedRows.apply(pooled, table, rows)
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
    def forward(ctx: Any, pooled: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(pooled if ctx.needs_input_grad[1] else None, table, rows)
        ctx.dtype = pooled.dtype
        return _times(table.index_select(0, rows).view(pooled.shape), pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pooled, table, rows = ctx.saved_tensors
        of_pooled = of_table = None
        if ctx.needs_input_grad[0]:
            of_pooled = _times(table.index_select(0, rows).view(gradient.shape), gradient).to(ctx.dtype)
        if pooled is not None:
            products = (pooled * gradient).view(-1, table.shape[1])
            of_table = torch.zeros_like(table).index_add_(0, rows, products.to(table.dtype))
        return of_pooled, of_table, None


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


def _times(fresh: Tensor, other: Tensor) -> Tensor:
    """Return the product, in the memory of ``fresh`` where its type holds it."""
    return fresh.mul_(other) if torch.promote_types(fresh.dtype, other.dtype) == fresh.dtype else fresh * other
