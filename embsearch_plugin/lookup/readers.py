"""Doing for all tables at once what a CPU does table by table: on a GPU, launching an operation takes longer than running it.

Shapes: B examples, R readers, n ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Read:
    """What all readers read of a batch, one reader after the other.

    Args:
        ids: (n,).
        reader: the number of who reads each, (n,).
        lengths: of the bags that each reads, (R, B).
        counts: how many ids each reads.
    """

    ids: Tensor
    reader: Tensor
    lengths: Tensor
    counts: Sequence[int]

    def have_rows(self, rows: Tensor) -> bool:
        """Whether all ids are below the rows of who reads them, (R,). The host waits for the answer."""
        return bool(((self.ids >= 0) & (self.ids < rows.index_select(0, self.reader))).all())


class Readers:
    """Who reads which feature, and numbers that belong to each reader.

    Args:
        features: names, in the order of the batches.
        reads: the feature that each reader reads.
        numbers: a number for each reader, by what they are; :meth:`of` gives them as tensors.
    """

    def __init__(self, features: Sequence[str], reads: Sequence[str], **numbers: Sequence[int]) -> None:
        self._features = [list(features).index(name) for name in reads]
        self._in_order = list(features) == list(reads)
        self._numbers = {**numbers, "features": self._features}
        self._tensors: dict[torch.device, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensors": {}}

    @staticmethod
    def together(features: KeyedJaggedTensor) -> bool:
        """Whether to do for all readers at once what each wants of a batch."""
        return bool(features.values().is_cuda)

    def of(self, name: str, device: torch.device) -> Tensor:
        """Return the numbers of that name, (R,). They are copied to a device once: a GPU's host waits for every copy."""
        tensors = self._tensors.get(device)
        if tensors is None:
            tensors = {of: torch.tensor(values, device=device) for of, values in self._numbers.items()}
            if not torch.compiler.is_compiling():  # then they may have no content
                self._tensors[device] = tensors
        return tensors[name]

    def read(self, features: KeyedJaggedTensor) -> Read:
        """Return what all read of a batch, by a fixed number of operations."""
        lengths, counts = features.lengths().view(len(features.keys()), -1), features.length_per_key()
        if not self._in_order:
            lengths = lengths.index_select(0, self.of("features", lengths.device))
        counts = [counts[feature] for feature in self._features]
        reader = torch.repeat_interleave(lengths.sum(1), output_size=sum(counts))
        return Read(self.spread(features, features.values()), reader, lengths, counts)

    def spread(self, features: KeyedJaggedTensor, values: Tensor) -> Tensor:
        """Return for each reader the values of its feature's ids, one reader after the other.

        Args:
            features: a batch.
            values: one for each of its ids.
        """
        if self._in_order:
            return values
        of_feature = values.split(features.length_per_key())
        return torch.cat([of_feature[feature] for feature in self._features])


class TableRows:
    """A number for each row of several tables, one table after the other in one tensor.

    Args:
        of_tables: integers (V,) each.
        device: where they are to be.
    """

    def __init__(self, of_tables: Sequence[Tensor], device: torch.device) -> None:
        self.whole = torch.cat([numbers.to(device) for numbers in of_tables])
        self._sizes = [len(numbers) for numbers in of_tables]

    @property
    def of_tables(self) -> tuple[Tensor, ...]:
        """Views of each table's, (V,)."""
        return self.whole.split(self._sizes)

    def of(self, table: int) -> Tensor:
        """A view of a table's, (V,)."""
        return self.whole.narrow(0, sum(self._sizes[:table]), self._sizes[table])

    def on(self, device: torch.device) -> "TableRows":
        """Return it on a device; itself where it is there."""
        return self if self.whole.device == device else TableRows(self.of_tables, device)
