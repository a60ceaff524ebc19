"""Which rows are frequent: counting ids, and when to rank the rows by the counts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embsearch_plugin import distributed
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SessionError
from embsearch_plugin.lookup.readers import TableRows
from embsearch_plugin.randomness import private_random
from embsearch_plugin.search.loaders import generators_of, unshared
from embsearch_plugin.search.tables import SearchedTables
from embsearch_plugin.space import SearchSpace, cut_tables

Frequencies = Mapping[str, Tensor] | Iterable[Any]


class Ranking:
    """Counts ids and cuts the ranked rows into blocks.

    Ids are counted while the model trains. The rows are ranked when the search starts and again whenever the number of
    steps has doubled: so early ranks are soon mended, and ranking costs next to nothing in the long run. Counts that are
    given, or come from a pass over a loader, are final.

    Args:
        tables: the tables.
        space: how to cut.
        given: counts per table name, or batches to count; ``None`` to count while training.
        run: runs a batch through the model, for a pass over a loader.
        seed: of the numbers that such a pass draws.
    """

    def __init__(
        self, tables: SearchedTables, space: SearchSpace, given: Frequencies | None, run: Callable[[Any], None], seed: int
    ) -> None:
        self._tables, self._space, self._given, self._run, self._seed = tables, space, given, run, seed
        self._next = 0
        if given is None:
            self._start_counting()

    def rank(self, step: int) -> None:
        """Rank and cut for the first time, or again when it is time."""
        if self._tables.blocks is not None and (self._given is not None or step < self._next):
            return
        self._tables.cut(cut_tables(self._tables.specs, self._latest(), self._space))
        self._next = max(2 * step, 1)

    def counts(self) -> list[Tensor]:
        """Return how often each row occurred, per table (V,): as given, or as counted until now.

        Raises:
            SessionError: where counts are missing or of another shape, or nothing was counted yet.
        """
        return [count.clone() for count in self._latest()]

    def _latest(self) -> list[Tensor]:
        """Return the counts themselves, which go on changing while ids are counted: copies of all would not be small."""
        if self._given is not None and not isinstance(self._given, Mapping):
            counted = self._pass_over(self._given)
            self._given = {str(spec): count for spec, count in zip(self._tables.specs, counted, strict=True)}
        if isinstance(self._given, Mapping):
            return _checked(self._given, self._tables.specs)
        return self._counted()

    def _counted(self) -> list[Tensor]:
        counted = [supernet.counts for supernet in self._tables.supernets if supernet.counts is not None]
        counts = [count for rows in counted for count in rows.of_tables]
        alone = distributed.world_size() == 1
        totals = [count.cpu() if alone else distributed.total(count).cpu() for count in counts]
        if not any(bool(count.any()) for count in totals):
            raise SessionError(
                "rows cannot be ranked: no id was counted yet.\n  Possible solutions: 1) take some training steps before "
                "a search step  2) give frequencies= to prepare."
            )
        return totals

    def _pass_over(self, batches: Iterable[Any]) -> list[Tensor]:
        self._start_counting()
        try:
            for supernet in self._tables.supernets:
                supernet.counts_always = True
            with private_random(self._seed, generators_of(batches)):
                for batch in unshared(batches):
                    self._run(batch)
            return self._counted()
        finally:  # the loop goes on, whatever a loader raises
            for supernet in self._tables.supernets:
                supernet.counts, supernet.counts_always = None, False

    def _start_counting(self) -> None:
        for supernet in self._tables.supernets:
            zeros = [torch.zeros(table.rows, dtype=torch.int64, device="cpu") for table in supernet.tables]
            supernet.counts = TableRows(zeros, torch.device("cpu"))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and when to rank next."""
        counts = [supernet.counts for supernet in self._tables.supernets]
        return {"next": self._next, "counts": [None if rows is None else list(rows.of_tables) for rows in counts]}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Make sure that rows can be ranked on from ``state``.

        Raises:
            SessionError: where it holds no counts, since they were given, and none are given here.
        """
        if self._given is None and None in state["counts"]:
            raise SessionError(
                "this state is of a search whose frequencies were given, and it does not hold them; here none are given.\n"
                "  Possible solution: prepare(..., frequencies=...) as when the state was saved."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._next = state["next"]
        for supernet, counts in zip(self._tables.supernets, state["counts"], strict=True):
            of_tables = None if counts is None else [count.to(torch.int64) for count in counts]
            supernet.counts = None if of_tables is None else TableRows(of_tables, of_tables[0].device)


def check_frequencies(given: Frequencies | None, tables: Sequence[Table]) -> None:
    """Make sure that rows can be ranked by what is given.

    Raises:
        SessionError: where it is neither counts nor batches, and where counts are missing, of another shape or below zero.
    """
    if isinstance(given, Mapping):
        _checked(given, tables)
    elif given is not None and not isinstance(given, Iterable):
        raise SessionError(
            f"frequencies must be counts by table name, or batches to count; got {given!r}. Try the train loader."
        )


def _checked(given: Mapping[str, Tensor], tables: Sequence[Table]) -> list[Tensor]:
    """Return the counts of each table, (V,); an error where they are missing, of another shape or below zero."""
    counts = []
    for table in tables:
        count = given.get(str(table), given.get(table.name))
        if not isinstance(count, Tensor) or count.shape != (table.rows,):
            got = f"shape {tuple(count.shape)}" if isinstance(count, Tensor) else f"a {type(count).__name__}"
            raise SessionError(
                f"frequencies must hold a tensor of counts, of shape ({table.rows},), for table {table.name!r}; got {got}.\n"
                "  Possible solution: frequencies=train_loader, which is counted."
            )
        if not bool((count >= 0).all()):  # NaN is not, either
            raise SessionError(
                f"frequencies must be at least 0; some of table {table.name!r} are not. Try torch.bincount(ids)."
            )
        counts.append(count.cpu())
    return counts
