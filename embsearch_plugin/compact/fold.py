"""Folding what followed a searched table's lookup into the compact table."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fold:
    """What the K stored columns of a plan's table are, and what makes its output of them.

        stored rows = (rows x gates)[:, columns]   or   (rows x gates) @ rotation
        output      = pooled stored rows @ projection + bias

    Args:
        columns: int64 (K or more,), the searched table's column at each place; ``None`` for the plan's own.
        rotation: float32 (W, K or more), in place of ``columns``: the new basis.
        projection: float32 (K or more, D), where the plan has one.
        bias: float32 (D,), where the plan has one.
    """

    columns: Tensor | None = None
    rotation: Tensor | None = None
    projection: Tensor | None = None
    bias: Tensor | None = None


UNFOLDED = Fold()
