"""An output of a searchable collection, kept so that its gradient can be taken apart by rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

if TYPE_CHECKING:
    from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection


@dataclass(frozen=True, eq=False)
class Captured:
    """One output of a collection, a leaf of the graph: values (B, sum of dims) for a batch of features."""

    supernet: "SearchableEmbeddingBagCollection"
    features: KeyedJaggedTensor
    values: Tensor

    def row_gradients(self, gradient: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield, slot by slot, the table and a row (bags that are not empty, D) for all lookups of a bag together.

        The gradient of a lookup is its id's weight times the bag's, and divided by the bag's length where that is averaged.
        """
        lengths = dict(zip(self.features.keys(), self.features.lengths().view(-1, len(self.values)), strict=True))
        squares = dict(zip(self.features.keys(), self._squared_weights().view(-1, len(self.values)), strict=True))
        parts = gradient.float().split(self.supernet.output_dims, 1)
        for slot, part in zip(self.supernet.slots, parts, strict=True):
            length, scale = lengths[slot.feature], squares[slot.feature].sqrt()
            scale = scale / length.clamp(min=1) if slot.mean else scale
            yield slot.table, (part * scale[:, None])[length > 0]

    def _squared_weights(self) -> Tensor:
        """Return the sum of the ids' squared weights, per bag float32 (F x B,)."""
        lengths, weights = self.features.lengths(), self.features.weights_or_none()
        if weights is None or not self.supernet.is_weighted():
            return lengths.float()
        return torch.segment_reduce(weights.float().square(), "sum", lengths=lengths.long(), initial=0)
