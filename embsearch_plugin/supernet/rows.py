"""Which rows of a collection's tables a batch reads: whether there are such rows, the block of each, how often each is read.

On a CPU each table is asked by itself, on a GPU all at once.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.collection import Table
from embsearch_plugin.lookup.bags import check_readers, ids_of, ordered, rows_at
from embsearch_plugin.lookup.readers import Read, Readers, TableRows
from embsearch_plugin.lookup.slots import Slot


class RowReaders:
    """The slots of a collection as readers of its tables' rows.

    Args:
        tables: the tables.
        slots: who reads which.

    Attributes:
        features: what is read, in the order of the slots.
    """

    def __init__(self, tables: Sequence[Table], slots: Sequence[Slot]) -> None:
        self.tables, self.slots = tuple(tables), tuple(slots)
        self.features = list(dict.fromkeys(slot.feature for slot in slots))
        starts = list(accumulate((table.rows for table in tables), initial=0))
        self._readers = Readers(
            self.features,
            [slot.feature for slot in slots],
            rows=[tables[slot.table].rows for slot in slots],
            starts=[starts[slot.table] for slot in slots],
        )

    def read(self, features: KeyedJaggedTensor) -> "BatchRows":
        """Return what a batch reads.

        Raises:
            InputError: where the batch cannot be read; on a GPU, also where an id has no row.
        """
        features = ordered(features, self.features)
        if not self._readers.together(features):
            return BatchRows(self, features)
        read = self._readers.read(features)
        if not torch.compiler.is_exporting() and not read.have_rows(self._readers.of("rows", read.ids.device)):
            self.check(features)  # which says where
        return BatchRows(self, features, read)

    def check(self, features: KeyedJaggedTensor) -> None:
        """Raise an InputError where an id has no row."""
        check_readers(features, [(self.tables[s.table].name, s.feature, self.tables[s.table].rows) for s in self.slots])

    def starts(self, device: torch.device) -> Tensor:
        """Return for each slot the number of its table's first row among all tables' rows, (slots,)."""
        return self._readers.of("starts", device)


class BatchRows:
    """The rows that one batch reads.

    Args:
        readers: who reads them.
        features: the batch, its features in the readers' order.
        read: what all read, where that is asked at once; its ids have rows.
    """

    def __init__(self, readers: RowReaders, features: KeyedJaggedTensor, read: Read | None = None) -> None:
        self.features = features
        self._readers, self._read = readers, read

    @cached_property
    def ids(self) -> dict[str, Tensor]:
        """The ids of each feature, (n,)."""
        return ids_of(self.features)

    def check(self) -> None:
        """Raise an InputError where an id has no row; :meth:`blocks` does, too."""
        if self._read is None:
            self._readers.check(self.features)

    def blocks(self, blocks: TableRows) -> dict[Slot, Tensor]:
        """Return for each slot the block of each of its ids, (n,).

        Args:
            blocks: the block of each row.
        """
        slots, tables = self._readers.slots, self._readers.tables
        if self._read is not None:
            found = blocks.whole.index_select(0, self._rows(self._read)).split(self._read.counts)
            return dict(zip(slots, found, strict=True))
        return {s: rows_at(blocks.of(s.table), self.ids[s.feature], tables[s.table].name, s.feature) for s in slots}

    def count(self, counts: TableRows) -> None:
        """Add to each row's number, int64, how often the batch reads it."""
        if self._read is not None:
            counts.whole.index_add_(0, self._rows(self._read), torch.ones_like(self._read.ids, dtype=counts.whole.dtype))
            return
        for slot in self._readers.slots:
            ids = self.ids[slot.feature]
            counts.of(slot.table).index_add_(0, ids, torch.ones_like(ids, dtype=counts.whole.dtype))

    def _rows(self, read: Read) -> Tensor:
        """Return which of all tables' rows, one table after the other, each slot reads, (n,)."""
        return read.ids + self._readers.starts(read.ids.device).index_select(0, read.reader)
