"""The tables of a searched model, over all its collections, as one list."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from embsearch_plugin import distributed
from embsearch_plugin.collection import FoundCollection, Table
from embsearch_plugin.errors import SessionError, SpaceError, UnsupportedCollection
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.plugins import build_supernet, find_collections
from embsearch_plugin.space import RowBlocks, SearchSpace
from embsearch_plugin.supernet.captured import Captured
from embsearch_plugin.supernet.forms import Form
from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection
from embsearch_plugin.supernet.virtual import VirtualRows

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SearchTable:
    """A table in a search: what it is, and how its rows are cut."""

    spec: Table
    blocks: RowBlocks


class SearchedTables:
    """The searchable collections put into a model, and their tables as one list.

    Args:
        model: its collections are replaced by searchable ones.
        space: how tables are cut.
        fused: TorchRec's ``fused_params``, where the tables are to be trained by fused kernels.
        form: what is to follow a table's lookup; the same kind for all, or ``None`` for all.
        check: raises where the tables cannot be searched; asked before the model is touched.
        folds_gates: whether weights are stored multiplied by the gates.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace,
        fused: Mapping[str, Any] | None = None,
        form: Callable[[Table], Form | None] = lambda table: None,
        *,
        check: Callable[[Sequence[Table]], None],
        folds_gates: bool = True,
    ) -> None:
        self.found = find_collections(model)
        for found in self.found:
            refuse_ties(model, found)
        self.specs: list[Table] = [table for found in self.found for table in found.tables]
        check(self.specs)  # an error now, not after the warm-up
        forms = [[made for table in found.tables if (made := form(table)) is not None] for found in self.found]
        for found in self.found if any(forms) else ():
            _refuse_meta(found)
        if fused is not None:
            check_fused_widths(self.specs, space)
        self.supernets = [build_supernet(f, own) for f, own in zip(self.found, forms, strict=True)]
        for supernet in self.supernets:
            supernet.fused_params, supernet.folds_gates = fused, folds_gates
        self.blocks: list[RowBlocks] | None = None
        for found, supernet in zip(self.found, self.supernets, strict=True):
            found.replace_in(model, supernet)
        for old, _ in self.added_tables():  # its numbers are in the new one; an optimizer may go on holding it
            old.data, old.grad = old.data.new_empty(0), None

    @property
    def device(self) -> torch.device:
        """Where the model's tables are."""
        return self.supernets[0].device

    @property
    def original_bytes(self) -> int:
        """Weight bytes of the original tables."""
        return sum(spec.size_bytes for spec in self.specs)

    def cut(self, blocks: list[RowBlocks]) -> None:
        """Say which rows are in which block; gates start at one the first time, and are kept later."""
        self.blocks = blocks
        for supernet, part in zip(self.supernets, self.split(blocks), strict=True):
            supernet.set_blocks(part, supernet.device)

    def forwards(self) -> int:
        """Return how often the model's owner has looked tables up with gradients."""
        return sum(supernet.forwards for supernet in self.supernets)

    def kernel_states(self) -> list[dict[str, Any]]:
        """Return what fused kernels hold besides weights, a dict per fused collection."""
        return [s.inner.kernel_state() for s in self.supernets if isinstance(s.inner, FusedEmbeddingBags)]

    def load_kernel_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from ``states``.

        Raises:
            SessionError: where they are of more, or fewer, fused collections.
        """
        if states:
            for supernet in self.supernets:
                supernet.fuse()
        fused = [s.inner for s in self.supernets if isinstance(s.inner, FusedEmbeddingBags)]
        if len(states) != len(fused):
            raise SessionError(
                f"this state has {len(states)} collections on fused kernels, and the model {len(fused)}.\n  Possible "
                "solutions: 1) prepare with the same fused=  2) load a state saved before the first forward pass before it."
            )
        for inner, state in zip(fused, states, strict=True):
            inner.load_kernel_state(state)

    def check_dtypes(self) -> None:
        """Make sure that weights are still stored in the type that was there at the start, since bytes are counted by it.

        Raises:
            SessionError: where the model was converted since.
        """
        for index, spec in enumerate(self.specs):
            for _, _, weight in self.weight_pieces(index):
                if weight.dtype != spec.dtype:
                    raise SessionError(
                        f"table {spec} was {spec.dtype} when the search began and is {weight.dtype} now, so its bytes are "
                        "others.\n  Possible solution: convert the model before it is prepared."
                    )

    @property
    def gates(self) -> list[Tensor]:
        """The gates, per table float32 (S, C)."""
        return [gate for supernet in self.supernets for gate in supernet.gates]

    def set_gates(self, gates: Sequence[Tensor]) -> None:
        """Write the gates, per table (S, C)."""
        for supernet, part in zip(self.supernets, self.split(gates), strict=True):
            supernet.set_gates([gate.detach() for gate in part])

    @property
    def kept(self) -> list[Tensor]:
        """Which single weights take part, per table bool (V, W); empty where all do."""
        return [mask for supernet in self.supernets for mask in supernet.kept]

    def keep_weights(self, kept: Sequence[Tensor]) -> None:
        """Let only these single weights take part, per table bool (V, W)."""
        for supernet, part in zip(self.supernets, self.split(kept), strict=True):
            supernet.keep_weights(part)

    @torch.no_grad()
    def remove_pruned(self) -> None:
        """Write zero where weights take no part: an optimizer's momentum may have moved them since."""
        for index, mask in enumerate(self.kept):
            ((_, _, weight),) = self.weight_pieces(index)
            weight.mul_(mask)

    def use_gates(self, gates: Sequence[Tensor] | None, group: int) -> None:
        """Use ``gates``, per table (S, C) or (N, S, C), in training forwards from now on; ``None`` for those written."""
        for supernet, part in zip(self.supernets, self.split(gates or [None] * len(self.specs)), strict=True):
            supernet.next_gates = None if gates is None else cast(list[Tensor], part)
            supernet.group = group

    @contextmanager
    def searching(self, gates: Sequence[Tensor], virtual: VirtualRows | None = None, group: int = 1) -> Iterator[None]:
        """Within it, ``gates`` take the place of the current ones, and no table gets a gradient."""
        with ExitStack() as stack:
            for supernet, part in zip(self.supernets, self.split(gates), strict=True):
                stack.enter_context(supernet.searching(part, virtual, group))
            yield

    @contextmanager
    def at_least(self, examples: int) -> Iterator[None]:
        """Within it, searching on a batch of fewer examples raises ``TooSmallBatch``."""
        for supernet in self.supernets:
            supernet.smallest_batch = examples
        try:
            yield
        finally:
            for supernet in self.supernets:
                supernet.smallest_batch = 1

    @contextmanager
    def capturing(self) -> Iterator[list[Captured]]:
        """Within it, the collections' outputs are leaves of the graph, and are added to the list."""
        captured: list[Captured] = []
        for supernet in self.supernets:
            supernet.captured = captured
        try:
            with self.searching(self.gates):
                yield captured
        finally:
            for supernet in self.supernets:
                supernet.captured = None

    def rows_of(self, captured: Sequence[Captured], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return, per table (n, D), a row for each captured bag that is not empty, of the outputs' gradients.

        Its outer product is the sum of those of the gradients of the bag's lookups.
        """
        found = [[torch.empty(0, spec.dim, device=self.device)] for spec in self.specs]
        for output, gradient in zip(captured, gradients, strict=True):
            first = sum(len(supernet.tables) for supernet in self.supernets[: self.supernets.index(output.supernet)])
            for table, rows in output.row_gradients(gradient):
                found[first + table].append(rows)
        return [torch.cat(rows) for rows in found]

    def weight_pieces(self, table: int) -> list[tuple[int, int, Tensor]]:
        """Return the parts of a table's weights on this process, as (first row, first column, weights)."""
        supernet, number = self._place(table)
        return supernet.weight_pieces(number)

    def added_tables(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield each table of another width than the original's, which a form brought with it, after the original."""
        for found, supernet in zip(self.found, self.supernets, strict=True):
            if supernet.is_plain and supernet.inner is not found.module:
                yield from zip(found.module.parameters(), supernet.inner.parameters(), strict=True)

    def form_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all forms."""
        return [parameter for supernet in self.supernets for parameter in supernet.forms.parameters()]

    def form(self, table: int) -> Form:
        """Return what follows a table's lookup."""
        supernet, number = self._place(table)
        return cast(Form, supernet.forms[number])

    def _row_gates(self, table: int) -> Tensor:
        supernet, number = self._place(table)
        return supernet.row_gates(number)

    def _place(self, table: int) -> tuple[SearchableEmbeddingBagCollection, int]:
        """Return the collection that holds a table, and the table's number there."""
        for supernet in self.supernets:
            if table < len(supernet.tables):
                return supernet, table
            table -= len(supernet.tables)
        raise IndexError(f"there are {len(self.specs)} tables")

    def merged_weight(self, table: int) -> Tensor:
        """Return a table's weights times the gates that multiply rows, float32 (V, W).

        Raises:
            UnsupportedCollection: where the table is sharded, on every process.
        """
        if not self._place(table)[0].is_local:
            raise UnsupportedCollection(
                f"the weights of table {str(self.specs[table])!r} must be whole on every process, and they are sharded.\n"
                "  Possible solutions: 1) derive before DistributedModelParallel  2) DistributedDataParallel instead  3) an "
                "algorithm that reads sums over row blocks: dnis or magnitude, not fine_grained."
            )
        ((_, _, weight),) = self.weight_pieces(table)
        lookup = self._lookup(table).to(weight.device)
        merged = weight.detach().float() * self._row_gates(table).index_select(0, lookup)
        return merged * self.kept[table] if self.kept else merged

    def block_energy(self, table: int) -> Tensor:
        """Return the sum of squares of the merged weights, per row block and column: float64 (S, W)."""
        gate = self._row_gates(table).double().cpu()
        energy, lookup = torch.zeros_like(gate), self._lookup(table)
        for row, column, weight in self.weight_pieces(table):
            squares = weight.detach().double().cpu().square()
            if self.kept:
                squares *= self.kept[table].cpu()
            part = torch.zeros(gate.shape[0], weight.shape[1], dtype=torch.float64)
            part.index_add_(0, lookup[row : row + weight.shape[0]], squares)
            energy[:, column : column + weight.shape[1]] += part
        if not all(supernet.is_local for supernet in self.supernets):
            energy = distributed.total(energy)
        return energy * gate.square()

    def _lookup(self, table: int) -> Tensor:
        assert self.blocks is not None
        return self.blocks[table].lookup().long()

    def split(self, items: Sequence[T]) -> list[list[T]]:
        """Split a list over all tables by collection."""
        parts, start = [], 0
        for found in self.found:
            parts.append(list(items[start : start + len(found.tables)]))
            start += len(found.tables)
        return parts


def refuse_ties(model: nn.Module, found: FoundCollection) -> None:
    """Refuse tables whose weights the model uses elsewhere too: a rewrite would part them.

    Raises:
        UnsupportedCollection: naming both places.
    """
    inside = tuple(f"{path}." for path in found.paths)
    owners: dict[int, str] = {}
    for name, parameter in found.module.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            raise UnsupportedCollection(f"the tables {owners[id(parameter)]!r} and {name!r} of {found.paths[0]!r} are one.")
        owners[id(parameter)] = name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners and not name.startswith(inside):
            raise UnsupportedCollection(
                f"{name!r} is the same parameter as {owners[id(parameter)]!r} of {found.paths[0]!r}; with a compact table it "
                "could not be.\n  Possible solution: give the two parameters of their own."
            )


def _refuse_meta(found: FoundCollection) -> None:
    if any(parameter.is_meta for parameter in found.module.parameters()):
        raise UnsupportedCollection(
            f"{found.paths[0]!r} is on the meta device, and what this algorithm adds to it could not be initialised there.\n"
            "  Possible solution: build the model on a real device, or to_empty and initialise it, before it is prepared."
        )


def check_fused_widths(specs: Sequence[Table], space: SearchSpace) -> None:
    """Make sure that fused kernels can store the tables, whole and cut.

    Raises:
        SpaceError: naming the table they cannot.
    """
    for spec in specs:
        if spec.dim % 4 or space.align % 4:
            raise SpaceError(
                f"fused kernels store widths that are multiples of 4; table {spec} has dim {spec.dim}, and align is "
                f"{space.align}.\n  Possible solutions: 1) SearchSpace(align=4) and dims that are multiples of 4  "
                "2) train without fused=."
            )
