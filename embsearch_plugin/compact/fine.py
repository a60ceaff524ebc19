"""A fine-grained table: every row keeps columns of its own, stored as a compressed sparse row matrix."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from embsearch_plugin.costs import column_dtype
from embsearch_plugin.plan import TablePlan


class FixedIndex(nn.Module):
    """A module whose buffers are the plan's: they keep their content where ``to_empty`` gives the weights fresh memory."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedIndex":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and not moved.is_meta:
                moved.copy_(buffer)
        return self


class FineTable(FixedIndex):
    """Weights kept one by one (dnis.txt, 2.2: a dimension index vector and an embedding value vector per feature).

    Stored as values (kept,), column numbers (kept,) and int32 row starts (V + 1,). No FBGEMM kernel reads this form; it
    is looked up with plain torch operations, and TorchRec does not shard it (each process holds a copy).
    """

    def __init__(self, plan: TablePlan, device: torch.device) -> None:
        super().__init__()
        assert plan.mask is not None
        self.dim = plan.table.dim
        columns = plan.mask.nonzero()[:, 1].to(column_dtype(self.dim))  # on the CPU, as plans are
        starts = torch.nn.functional.pad(plan.mask.sum(1).cumsum(0), (1, 0)).int()
        self.values = nn.Parameter(torch.zeros(columns.numel(), dtype=plan.table.dtype, device=device))
        self.columns: Tensor
        self.starts: Tensor
        self.register_buffer("columns", columns)
        self.register_buffer("starts", starts)

    def forward(self, bag: JaggedTensor, weighted: bool) -> Tensor:
        """Sum each bag's rows: float32 (B, D)."""
        ids, lengths = bag.values().long(), bag.lengths().long()
        kept = (self.starts[ids + 1] - self.starts[ids]).long()
        of_bag = torch.repeat_interleave(torch.arange(lengths.numel(), device=ids.device), lengths)
        first = torch.repeat_interleave(self.starts[ids].long() - (kept.cumsum(0) - kept), kept)
        entries = first + torch.arange(first.numel(), device=ids.device)
        values = self.values[entries].float()
        if weighted:
            values = values * torch.repeat_interleave(bag.weights(), kept)
        places = torch.repeat_interleave(of_bag, kept) * self.dim + self.columns[entries].long()
        pooled = values.new_zeros(lengths.numel() * self.dim).index_add(0, places, values)
        return pooled.view(-1, self.dim)
