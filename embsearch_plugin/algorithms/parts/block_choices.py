"""The choices among embedding blocks of all tables as one list, and what they mean: heights, gates, costs, a best choice."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embsearch_plugin.algorithms.parts.embedding_blocks import EmbeddingBlocks, Mode
from embsearch_plugin.costs import Unit
from embsearch_plugin.knapsack import allocate_among

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session


class _Alike:
    """Tables of as many row blocks and the same column chunks: what is asked of each is answered for all of them at once.

    Args:
        tables: n of them.
        indices: which tables these are.
        first: of each, its first choice.
        menu: of each, (choices, arms, T).
    """

    def __init__(self, tables: Sequence[EmbeddingBlocks], indices: Sequence[int], first: Sequence[int], menu: Tensor) -> None:
        self.tables, self.indices, self.menu = list(tables), list(indices), menu
        self._number = torch.arange(len(menu), device=menu.device)
        self._choices = torch.tensor(first, device=menu.device)[:, None] + self._number  # (n, choices)
        self._rows = torch.tensor([[0, *accumulate(table.rows)] for table in tables], device=menu.device)  # (n, S + 1)
        self._widths = torch.tensor(tables[0].widths, device=menu.device)

    def heights(self, choices: Tensor) -> Tensor:
        """Return what choices (..., choices) stand for, int64 (n, ..., T)."""
        return self.menu[self._number, choices[..., self._choices]].sum(-2).movedim(-2, 0)

    def gates(self, heights: Tensor) -> Tensor:
        """Return the gates of heights (n, ..., T): float32 (n, ..., S, D)."""
        return self.tables[0].gates(heights)

    def mean_gates(self, probabilities: Tensor) -> Tensor:
        """Return the mean gates of choices drawn with probabilities (choices, widest): (n, S, D)."""
        mine = probabilities[self._choices, : self.menu.shape[1]]
        return torch.einsum("nca,casd->nsd", mine, self.tables[0].gates(self.menu))  # choices share no block

    def cost(self, heights: Tensor, unit: Unit) -> Tensor:
        """Return what heights (n, ..., T) cost, int64 (n, ...)."""
        rows = self._rows.gather(1, heights.flatten(1)).view(heights.shape)
        sizes = torch.tensor([unit.weights(table.spec, 1) for table in self.tables], device=rows.device)
        return (rows * self._widths).sum(-1) * sizes.view(-1, *[1] * (heights.dim() - 2))


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
        first = list(accumulate(map(len, self.menus), initial=0))
        cuts: dict[object, list[int]] = {}
        for index, table in enumerate(self.tables):
            cuts.setdefault((len(table.rows), table.widths), []).append(index)
        self._alike = [
            _Alike([self.tables[i] for i in indices], indices, [first[i] for i in indices], self.menus[indices[0]])
            for indices in cuts.values()
        ]

    @classmethod
    def of(cls, session: "Session", mode: Mode) -> "BlockChoices":
        """Return the choices among the blocks that a session cuts its tables into."""
        cuts = [session.space.of(table.spec).chunk_widths(table.spec.dim) for table in session.tables]
        tables = [EmbeddingBlocks(t.spec, t.blocks.sizes, cut) for t, cut in zip(session.tables, cuts, strict=True)]
        return cls(tables, mode, session.gates[0].device)

    def heights(self, choices: Tensor) -> list[Tensor]:
        """Return what choices (..., choices) stand for, per table int64 (..., T)."""
        return self._by_table([alike.heights(choices) for alike in self._alike])

    def gates(self, heights: Sequence[Tensor]) -> list[Tensor]:
        """Return the gates of heights, per table float32 (..., S, D)."""
        return self._by_table([alike.gates(self._of(alike, heights)) for alike in self._alike])

    def mean_gates(self, probabilities: Tensor) -> list[Tensor]:
        """Return the mean gates of choices drawn with probabilities (choices, widest), per table (S, D)."""
        return self._by_table([alike.mean_gates(probabilities) for alike in self._alike])

    def cost(self, heights: Sequence[Tensor], unit: Unit) -> Tensor:
        """Return the memory cost of all tables (3.3.2's sum of C_F) in weights or their bytes: int64 (...)."""
        return torch.cat([alike.cost(self._of(alike, heights), unit) for alike in self._alike]).sum(0)

    def _of(self, alike: _Alike, of_tables: Sequence[Tensor]) -> Tensor:
        return torch.stack([of_tables[index] for index in alike.indices])

    def _by_table(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return of each table what was found of those that are cut alike, (n, ...) each."""
        pairs = zip(self._alike, found, strict=True)
        of_tables = {index: own for alike, parts in pairs for index, own in zip(alike.indices, parts, strict=True)}
        return [of_tables[index] for index in range(len(self.tables))]

    def alternatives(self, reference: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield, for each arm of each choice, the table's number and its gates; what the choice does not decide stays."""
        for index, (table, menu) in enumerate(zip(self.tables, self.menus, strict=True)):
            for arms in menu:
                decided = table.gates(arms.amax(0))[:1] > 0  # (1, D), the columns
                for heights in arms:
                    yield index, torch.where(decided, table.gates(heights), reference[index])

    def best(self, worths: Sequence[float], limit: int, unit: Unit, in_order: Sequence[int]) -> Tensor:
        """Return the arms, int64 (choices,), whose worths sum to most within ``limit``, remaps and projections paid.

        Args:
            worths: of all arms, in the order of :meth:`alternatives`.
            limit: in ``unit``.
            unit: as the budget's.
            in_order: of each table, how many leading row blocks hold rows that stand in order.

        Raises:
            AllocationError: where it could not be solved.
        """
        parts = torch.tensor(worths, dtype=torch.float64).split([menu.shape[0] * menu.shape[1] for menu in self.menus])
        by_table = zip(self.tables, self.menus, parts, in_order, strict=True)
        offers = [t.ways(menu.cpu(), worth.view(menu.shape[:2]), unit, ordered) for t, menu, worth, ordered in by_table]
        found = allocate_among(offers, limit, unit)
        chosen = [torch.tensor(arms).expand(len(menu)) for (_, arms), menu in zip(found, self.menus, strict=True)]
        return torch.cat(chosen).to(self.menus[0].device)
