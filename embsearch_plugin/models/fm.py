"""The factorization machine (Rendle, 2010), which dnis.txt, 3.1, searches for clicks.

    logit = b + sum over fields of w_f(i_f) + <w, x> + sum over f < g of <v_f(i_f), v_g(i_g)>

A weight per id is a table of dim 1. These tables are an EmbeddingBagCollection like any other: they grow with the ids, so they
count in bytes, and a search keeps or drops their row blocks (their dims are 0 and 1, whatever ``align`` is). FBGEMM's fused
kernels want dims that are multiples of 4, so a search of this model cannot be fused.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.models.common import Lookup, TrainTask, numbers_of


@dataclass(frozen=True)
class Fm:
    """A factorization machine, for any fields and numbers; numbers have a weight each, and no factors.

    Args:
        embedding_dim: D of the tables of factors.
    """

    name: ClassVar[str] = "fm"
    embedding_dim: int = 32

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``."""
        return TrainTask(FmNet(schema, self.embedding_dim), schema.task)


class FmNet(nn.Module):
    """From a batch to logits, shaped as its labels."""

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.factors = Lookup(schema, dim)
        self.linear = Linear(schema)
        for bags in self.factors.collection.embedding_bags.values():
            nn.init.normal_(bags.weight, std=0.01)  # products start near zero

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits; the sum over pairs is half of |sum of v|^2 - sum of |v|^2 (Rendle's lemma 3.1)."""
        rows = torch.stack(list(self.factors(batch).values()))
        pairs = (rows.sum(0).square() - rows.square().sum(0)).sum(-1) / 2
        linear: Tensor = self.linear(batch)
        return linear + pairs


class Linear(nn.Module):
    """A weight per id, which starts at zero, and one per number: the linear part of a logit, its bias included."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.lookup = Lookup(schema, 1)
        self.numbers = nn.Parameter(torch.zeros(len(schema.dense)))
        self.bias = nn.Parameter(torch.zeros(()))
        for bags in self.lookup.collection.embedding_bags.values():
            nn.init.zeros_(bags.weight)

    def forward(self, batch: Batch) -> Tensor:
        """Return the linear part, shaped as the batch's labels."""
        weights = torch.cat(list(self.lookup(batch).values()), dim=-1)
        return weights.sum(-1) + numbers_of(batch) @ self.numbers + self.bias
