"""One table that grows: ids, how often they came, and their rows."""

import logging
from typing import Any

import torch
from torch import Tensor

from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.streaming.forms import Entries, RowForm
from embsearch_plugin.streaming.growing import SLACK, GrowingTensor
from embsearch_plugin.streaming.ids import IdMap
from embsearch_plugin.streaming.row_optimizers import RowOptimizer
from embsearch_plugin.streaming.rows import Piece, Rows

log = logging.getLogger(__name__)


class Ceiling:
    """Bytes that all tables together may hold, slack included; ``None`` for as many as there are.

    ``stopped``: whether something was refused for it. It is said once.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.stopped = limit, False
        self.tables: list[GrowingTable] = []

    def room_for(self, wanted: int, entry_bytes: int) -> int:
        """Return how many of ``wanted`` entries, each that much larger, may still be had."""
        if self.limit is None or wanted == 0:
            return wanted
        left = int(self.limit / SLACK) - sum(table.used_bytes for table in self.tables)
        room = max(min(wanted, left // max(entry_bytes, 1)), 0)
        if room < wanted and not self.stopped:
            self.stopped = True
            log.warning("the tables have reached %d bytes, slack included: new ids and wider rows are refused", self.limit)
        return room


def cap_in_bytes(cap: Budget, original_bytes: int) -> int:
    """Return a cap on what tables hold; ``original_bytes`` is what a share is of.

    Raises:
        BudgetError: where it is on parameters.
    """
    if cap.unit is not Unit.BYTES:
        raise BudgetError(f"a cap on a stream's tables is in bytes, as in '200MB', or a share, as in '10%'; got {cap}.")
    return cap.limit(original_bytes)


class GrowingTable:
    """A table whose rows are made as ids come.

    Args:
        spec: the original table.
        form: what makes its outputs of its rows.
        optimizer: of its rows.
        init_std: standard deviation of the normal numbers that new rows hold.
        seed: of them.
        ceiling: of the bytes of all tables.
        extras: numbers kept for each entry by the algorithm: their shape, by name. They start at zero.
    """

    def __init__(
        self,
        spec: Table,
        form: RowForm,
        optimizer: RowOptimizer,
        init_std: float,
        seed: int,
        ceiling: Ceiling,
        extras: dict[str, tuple[int, ...]],
    ) -> None:
        self.spec, self.form, self._ceiling = spec, form, ceiling
        self.ids, self.rows = IdMap(), Rows(form.widths, optimizer)
        self._counts = GrowingTensor((), torch.int32)
        self.extras = {name: GrowingTensor(shape, torch.float32) for name, shape in extras.items()}
        self._init_std, self._random = init_std, torch.Generator().manual_seed(seed)
        ceiling.tables.append(self)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def used_bytes(self) -> int:
        """Bytes of rows, optimizer state, ids, and all that is kept per id."""
        return self.rows.used_bytes + self.ids.used_bytes + sum(tensor.used_bytes for tensor in self._per_entry())

    @property
    def held_bytes(self) -> int:
        """Bytes of memory."""
        return self.rows.held_bytes + self.ids.held_bytes + sum(tensor.held_bytes for tensor in self._per_entry())

    @property
    def weights(self) -> int:
        """The numbers that all rows hold together."""
        return sum(count * width for count, width in zip(self.rows.row_counts, self.rows.widths, strict=True))

    def counts(self, entries: Tensor) -> Tensor:
        """Return how often each entry was looked up in training, int64 (n,); 0 for -1."""
        known = self._counts.values[entries.clamp(min=0)].long() if len(self) else torch.zeros_like(entries)
        return torch.where(entries >= 0, known, 0)

    def find(self, ids: Tensor) -> Tensor:
        """Return the entry of each id, int64 (n,); -1 for those that are not there."""
        return self.ids.find(ids)

    def admit(self, ids: Tensor, times: Tensor) -> Tensor:
        """Return the entry of each id, which is made if need be and if there is room; count it.

        Args:
            ids: integers (n,), each once.
            times: how often each came, int64 (n,).
        """
        entries = self.ids.find(ids)
        new = (entries < 0).nonzero().flatten()
        new = new[: self._ceiling.room_for(len(new), self._smallest_entry)]
        if len(new):
            entries[new] = self.ids.admit(ids[new])
            for tensor in self._per_entry():
                tensor.resize(len(self.ids))
            self.rows.add(torch.randn(len(new), self.rows.widths[0], generator=self._random) * self._init_std)
        known = entries >= 0
        self._counts.values[entries[known]] += times[known].int()
        return entries

    def widen(self, entries: Tensor) -> None:
        """Give entries (n,), each once, the next width, as far as there is one and there is room."""
        sizes = self.rows.sizes(entries)
        for size in range(len(self.rows.widths) - 1, 0, -1):  # from the widest on, so that none grows twice
            growing = entries[sizes == size - 1]
            more = self.rows.entry_bytes(size) - self.rows.entry_bytes(size - 1)
            growing = growing[: self._ceiling.room_for(len(growing), more)]
            if len(growing):
                with torch.no_grad():
                    (narrow,) = (piece for piece in self.rows.read(growing) if piece.size == size - 1)
                    self.rows.widen(growing, size, self.form.widened(size, narrow.rows))

    def read(self, entries: Tensor, device: torch.device, *, training: bool, searching: bool) -> Tensor:
        """Return the entries' outputs, (n, D).

        Args:
            entries: int64 (n,), each once; -1 may occur more often.
            device: where the form is, and the outputs will be.
            training: let the backward pass train the rows, as fused kernels do.
            searching: differentiate the form's architecture parameters instead.
        """
        pieces = self.rows.read(entries)
        if training:
            step = self.rows.steps + 1  # taken where a backward pass follows
            pieces = [self._trained(entries, piece, step) for piece in pieces]
        pieces = [Piece(piece.size, piece.positions.to(device), piece.rows.to(device)) for piece in pieces]
        output: Tensor = self.form(pieces, Entries(entries, self.counts(entries), searching))
        return output

    def _trained(self, entries: Tensor, piece: Piece, step: int) -> Piece:
        own, size = entries[piece.positions], piece.size

        def train(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is not None:
                self.rows.train(own, size, gradient, step)

        leaf = piece.rows.requires_grad_()
        leaf.register_post_accumulate_grad_hook(train)
        return Piece(size, piece.positions, leaf)

    @property
    def _smallest_entry(self) -> int:
        index = self.ids.entry_bytes + sum(tensor.row_bytes for tensor in self._per_entry())
        return index + self.rows.entry_bytes(0)

    def _per_entry(self) -> list[GrowingTensor]:
        return [self._counts, *self.extras.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the form's parameters, which are the model's."""
        return {
            "ids": self.ids.state_dict(),
            "counts": self._counts.state_dict(),
            "rows": self.rows.state_dict(),
            "extras": {name: tensor.state_dict() for name, tensor in self.extras.items()},
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.ids.load_state_dict(state["ids"])
        self._counts.load_state_dict(state["counts"])
        self.rows.load_state_dict(state["rows"])
        for name, tensor in self.extras.items():
            tensor.load_state_dict(state["extras"][name])
        self._random.set_state(state["random"])
