"""The choices among embedding blocks of all tables as one list, and what they mean: heights, gates, costs, a best choice."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embsearch_plugin.algorithms.parts.embedding_blocks import EmbeddingBlocks, Mode
from embsearch_plugin.budget import allocate_among

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


class BlockChoices:
    """What a controller of single- or multi-size embeddings chooses among.

    Args:
        tables: the tables' embedding blocks.
        mode: single or multi-size.
        device: where choices are.
    """

    def __init__(self, tables: Sequence[EmbeddingBlocks], mode: Mode, device: torch.device) -> None:
        self.tables = list(tables)
        self.menus = [table.menu(mode).to(device) for table in tables]  # each (choices, arms, T)
        self.arms = [menu.shape[1] for menu in self.menus for _ in menu]  # of each choice
        self._ranges = [slice(*ends) for ends in pairwise(accumulate(map(len, self.menus), initial=0))]

    @classmethod
    def of(cls, session: "Session", mode: Mode) -> "BlockChoices":
        """Return the choices among the blocks that a session cuts its tables into."""
        cuts = [session.space.of(table.spec).chunk_widths(table.spec.dim) for table in session.tables]
        tables = [EmbeddingBlocks(t.spec, t.blocks.sizes, cut) for t, cut in zip(session.tables, cuts, strict=True)]
        return cls(tables, mode, session.gates[0].device)

    def heights(self, choices: Tensor) -> list[Tensor]:
        """Return what choices (..., choices) stand for, per table int64 (..., T)."""
        numbers = [torch.arange(len(menu), device=menu.device) for menu in self.menus]
        by_table = zip(self.menus, numbers, self._ranges, strict=True)
        return [menu[number, choices[..., own]].sum(-2) for menu, number, own in by_table]

    def gates(self, heights: Sequence[Tensor]) -> list[Tensor]:
        """Return the gates of heights, per table float32 (..., S, D)."""
        return [table.gates(own) for table, own in zip(self.tables, heights, strict=True)]

    def mean_gates(self, probabilities: Tensor) -> list[Tensor]:
        """Return the mean gates of choices drawn with probabilities (choices, widest), per table (S, D)."""
        return [
            torch.einsum("ca,casd->sd", probabilities[own, : menu.shape[1]], table.gates(menu))  # choices share no block
            for table, menu, own in zip(self.tables, self.menus, self._ranges, strict=True)
        ]

    def cost(self, heights: Sequence[Tensor], unit: str) -> Tensor:
        """Return the memory cost of all tables (3.3.2's sum of C_F) in weights or their bytes: int64 (...)."""
        by_table = zip(self.tables, heights, strict=True)
        return torch.stack([table.n_weights(own) * table.weight_size(unit) for table, own in by_table]).sum(0)

    def alternatives(self, reference: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield, for each arm of each choice, the table's number and its gates; what the choice does not decide stays."""
        for index, (table, menu) in enumerate(zip(self.tables, self.menus, strict=True)):
            for arms in menu:
                decided = table.gates(arms.amax(0))[:1] > 0  # (1, D), the columns
                for heights in arms:
                    yield index, torch.where(decided, table.gates(heights), reference[index])

    def best(self, worths: Sequence[float], limit: int, unit: str) -> Tensor:
        """Return the arms, int64 (choices,), whose worths sum to most within ``limit``, remaps and projections paid.

        Args:
            worths: of all arms, in the order of :meth:`alternatives`.
            limit: in ``unit``.
            unit: as the budget's.

        Raises:
            AllocationError: where it could not be solved.
        """
        parts = torch.tensor(worths, dtype=torch.float64).split([menu.shape[0] * menu.shape[1] for menu in self.menus])
        by_table = zip(self.tables, self.menus, parts, strict=True)
        offers = [table.ways(menu.cpu(), worth.view(menu.shape[:2]), unit) for table, menu, worth in by_table]
        found = allocate_among(offers, limit, unit)
        chosen = [torch.tensor(arms).expand(len(menu)) for (_, arms), menu in zip(found, self.menus, strict=True)]
        return torch.cat(chosen).to(self.menus[0].device)
