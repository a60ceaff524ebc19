"""Forms: what makes a table's output out of what was looked up, where that is not the gated rows themselves.

A form belongs to one table. Rows of W columns are looked up and pooled; the form makes D columns of them. Its gates either
multiply the rows, block by block, before it (W of them), or weigh candidates inside it (as many as it likes, one row block).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class Form(nn.Module):
    """What follows the lookup of one table. Its parameters are trained by the user's optimizer, as the tables are.

    Attributes:
        weighs: whether gates are handed to :meth:`forward`, to weigh candidates, instead of multiplying rows.
        width: W, the columns that are looked up.
        n_gates: C, the columns of the gates.
    """

    weighs: ClassVar[bool] = False

    def __init__(self, width: int, n_gates: int) -> None:
        super().__init__()
        self.width, self.n_gates = width, n_gates

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the output of a table's bags (n, D): those of one feature after the other's, example by example.

        Args:
            inputs: what is pooled (n, W), gated; or, for a form that weighs, not gated, and then the gates, (1, C) or (n, C).
        """
        output: Tensor = super().__call__(*inputs)
        return output

    @classmethod
    def together(cls, forms: Sequence["Form"], pooled: Tensor, gates: Sequence[Tensor]) -> Tensor | None:
        """Return the outputs of all tables (B, sum of D) at once; ``None``, as here, where that is no quicker than one by one.

        Asked for where one feature reads each table.

        Args:
            forms: of all tables.
            pooled: side by side, (B, sum of W).
            gates: per table (1, C), where the forms weigh.
        """
        return None


def unrounded(values: Tensor) -> torch.autocast:
    """Compute as without autocast, as a lookup does, whose output is float32 whatever the rest of the model is in."""
    return torch.autocast(values.device.type, enabled=False)


class Projection(Form):
    """Gated rows times a trained matrix P (W, D), which starts as the identity (nis.txt, 3.3.1: the column chunks' P_t)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.weight = nn.Parameter(torch.eye(dim))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return ``pooled`` (n, W) projected, (n, D)."""
        with unrounded(pooled):
            return pooled.float() @ self.weight.float()

    @classmethod
    def together(cls, forms: Sequence[Form], pooled: Tensor, gates: Sequence[Tensor]) -> Tensor | None:
        """Project all tables by one product, where their widths are one."""
        weights: list[Tensor] = [form.weight for form in forms if isinstance(form, Projection)]
        if len(weights) < len(forms) or len({form.width for form in forms}) > 1:
            return None
        rows = pooled.float().view(len(pooled), len(forms), -1).transpose(0, 1)
        with unrounded(pooled):
            return (rows @ torch.stack(weights).float()).transpose(0, 1).reshape(len(pooled), -1)
