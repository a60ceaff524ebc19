"""What an adapter says of the embedding collections it found in a model."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Table:
    """One embedding table of V rows and D columns, as its owner configured it.

    Args:
        collection: path of the module that holds the table, as in ``named_modules()``.
        name: the table's name, in its owner's spelling.
        rows: V, ``num_embeddings``.
        dim: D, ``embedding_dim``.
        dtype: type of the stored weights.
        features: the features looked up in this table, in order.
    """

    collection: str
    name: str
    rows: int
    dim: int
    dtype: torch.dtype
    features: tuple[str, ...]

    @property
    def n_params(self) -> int:
        """Number of weights, V x D."""
        return self.rows * self.dim

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights as stored."""
        return self.n_params * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.collection}.{self.name}" if self.collection else self.name


@dataclass(frozen=True)
class FoundCollection:
    """A collection that an adapter offers to search.

    Args:
        adapter: name of the adapter that answers for it; the same adapter builds its supernet and its compact form.
        paths: every path under which the model holds the module (aliases included), the first one first.
        module: the collection itself.
        tables: its tables, in the collection's own order.
    """

    adapter: str
    paths: tuple[str, ...]
    module: nn.Module
    tables: tuple[Table, ...]

    def replace_in(self, model: nn.Module, replacement: nn.Module) -> None:
        """Put ``replacement`` where ``model`` holds this collection, under every alias."""
        for path in self.paths:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacement)
