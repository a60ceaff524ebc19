"""Optimizers of rows that come, grow and move: a step touches the rows of its batch, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class RowOptimizer(Protocol):
    """What updates rows, given their gradients."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state of one row of a width, float32, by name; new rows start at zero."""

    def update(self, rows: Tensor, gradients: Tensor, state: State, step: int) -> Tensor:
        """Return the rows (n, width) after a step, and change ``state`` in place; ``step`` counts from 1."""


@dataclass(frozen=True)
class RowAdam:
    """Adam on the rows that have a gradient (Kingma and Ba, 2015), as torch's ``SparseAdam``: steps are counted per table."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return those of both moments."""
        return {"exp_avg": (width,), "exp_avg_sq": (width,)}

    def update(self, rows: Tensor, gradients: Tensor, state: State, step: int) -> Tensor:
        """Return the rows after a step."""
        first, second = self.betas
        mean = state["exp_avg"].lerp_(gradients, 1 - first)
        square = state["exp_avg_sq"].lerp_(gradients.square(), 1 - second)
        size = self.lr * (1 - second**step) ** 0.5 / (1 - first**step)
        return rows.addcdiv(mean, square.sqrt() + self.eps, value=-size)


@dataclass(frozen=True)
class RowWiseAdagrad:
    """Adagrad with one sum per row, of the mean of its squared gradient, as FBGEMM's ``EXACT_ROWWISE_ADAGRAD``."""

    lr: float
    eps: float = 1e-8

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return that of the sum."""
        return {"sum": ()}

    def update(self, rows: Tensor, gradients: Tensor, state: State, step: int) -> Tensor:
        """Return the rows after a step."""
        total = state["sum"].add_(gradients.square().mean(dim=1))
        return rows - self.lr * gradients / (total.sqrt() + self.eps)[:, None]


ROW_OPTIMIZERS = {"adam": RowAdam, "rowwise_adagrad": RowWiseAdagrad}


def kept_state(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what a row's state is after it has grown: a number per row stays, and moments of columns start anew.

    Args:
        old: (n, ...), of the narrower rows.
        shape: of one row's state at the new width.
    """
    return old if not shape else torch.zeros(len(old), *shape)
