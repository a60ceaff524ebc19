"""Rows as they would be after one weight step, for second-order gradients (dnis.txt, Eq. 6 and 7).

Only the rows that the training batch looks up can change in a step, so only those are held: nothing here costs O(rows).
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class VirtualRows:
    """The rows of a training batch, first as leaves, then moved by a virtual weight step.

    Before :meth:`move`, every lookup makes the rows it reads leaves of the graph. After it, rows that were read before
    come back moved, and the others as they are stored.
    """

    leaves: list[Tensor] = field(default_factory=list)
    _read: dict[Hashable, list[tuple[Tensor, int]]] = field(default_factory=dict)
    _moves: dict[Hashable, tuple[Tensor, Tensor]] | None = None

    def lookup(self, table: Hashable, weight: Tensor, ids: Tensor) -> Tensor:
        """Return the rows (n, D) of ``ids``; ``table`` tells tables apart."""
        if not weight.requires_grad:  # a frozen table: no step moves it
            return weight.detach()[ids].float()
        if self._moves is None:
            unique, places = torch.unique(ids, return_inverse=True)
            self.leaves.append(weight.detach()[unique].float().requires_grad_())
            self._read.setdefault(table, []).append((unique, len(self.leaves) - 1))
            return self.leaves[-1][places]
        rows = weight.detach()[ids].float()
        if table not in self._moves:
            return rows
        unique, moves = self._moves[table]
        places = torch.searchsorted(unique, ids).clamp(max=unique.numel() - 1)
        return rows + torch.where((unique[places] == ids)[:, None], moves[places], 0.0)

    def move(self, gradients: list[Tensor], rate: float) -> None:
        """Move the rows by ``-rate`` times the gradient of each leaf; a row read twice moves by both."""
        self._moves = {}
        for table, reads in self._read.items():
            unique, places = torch.unique(torch.cat([ids for ids, _ in reads]), return_inverse=True)
            steps = torch.cat([gradients[leaf] for _, leaf in reads])
            if unique.numel():
                moves = steps.new_zeros(unique.numel(), steps.shape[1]).index_add(0, places, steps)
                self._moves[table] = unique, -rate * moves
