"""The cells that long bags are split by: where a feature is read by several tables, combinations of their row blocks.

Shapes: B examples, S cells, n ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embsearch_plugin.lookup.slots import Slot


def most_cells(slots: Sequence[Slot], n_blocks: Sequence[int]) -> int:
    """Return the largest number of cells of any feature: the numbers of blocks of the tables that read it, multiplied.

    Args:
        slots: who reads which feature.
        n_blocks: of each table.
    """
    cells = dict.fromkeys((slot.feature for slot in slots), 1)
    for slot in slots:
        cells[slot.feature] *= n_blocks[slot.table]
    return max(cells.values())


@dataclass(frozen=True)
class Cells:
    """The cells of one batch.

    Args:
        of_ids: per feature the cell of each of its ids, (n,).
        blocks: for each slot the block that each cell stands for, (S,).
        size: S, the same for all features.
    """

    of_ids: Sequence[Tensor]
    blocks: Mapping[Slot, Tensor]
    size: int

    @classmethod
    def of(cls, blocks: Mapping[Slot, Tensor], n_blocks: Sequence[int], device: torch.device) -> "Cells":
        """Return the cells of ids.

        Args:
            blocks: for each slot the block of each of its ids, (n,).
            n_blocks: of each table.
            device: where to put them.
        """
        size = most_cells(list(blocks), n_blocks)
        numbers = torch.arange(size, device=device)
        by_feature: dict[str, list[Slot]] = {}
        for slot in blocks:
            by_feature.setdefault(slot.feature, []).append(slot)
        of_ids, of_cells = [], {}
        for first, *others in by_feature.values():
            cell, base = blocks[first], n_blocks[first.table]
            of_cells[first] = numbers % base
            for slot in others:
                cell = cell.int() + blocks[slot].int() * base
                of_cells[slot] = (numbers // base) % n_blocks[slot.table]
                base *= n_blocks[slot.table]
            of_ids.append(cell)
        return cls(of_ids, of_cells, size)


def mean_shares(slots: Sequence[Slot], shares: Mapping[str, Tensor]) -> Tensor:
    """Per cell, bag and column: the factor that makes a mean over the cell's ids a part of the mean over the bag.

    Args:
        slots: whose columns.
        shares: per feature (S, B).

    Returns:
        (S, B, sum of dims); one where a table is summed.
    """
    columns = [shares[slot.feature] if slot.mean else torch.ones_like(shares[slot.feature]) for slot in slots]
    repeats = torch.tensor([slot.dim for slot in slots], device=columns[0].device)
    return torch.stack(columns, dim=-1).repeat_interleave(repeats, dim=-1)
