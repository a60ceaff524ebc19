"""Matrix factorization: the dot product of a user's vector and an item's (dnis.txt, 3.1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.models.common import TrainTask, require_items
from embsearch_plugin.models.neumf import UserAndItem, start_gaussian


@dataclass(frozen=True)
class Mf:
    """Matrix factorization, for data of users and items; numbers are not used.

    A difference from the paper's inner product: one number is added to all of them, so that the mean of the ratings needs no
    column of the tables. There are no biases per user and item: its MF has half of the parameters of its NeuMF, which leaves
    no room for them. Weights start as in NeuMF.

    Args:
        embedding_dim: D of every table.
    """

    name: ClassVar[str] = "mf"
    embedding_dim: int = 64

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``.

        Raises:
            ModelError: where the schema does not say which fields describe the item.
        """
        require_items(self.name, schema)
        return TrainTask(MfNet(schema, self.embedding_dim), schema.task)


class MfNet(nn.Module):
    """From a batch to logits, shaped as its labels."""

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.mf = UserAndItem(schema, dim)
        self.bias = nn.Parameter(torch.zeros(()))
        self.apply(start_gaussian)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        user, item = self.mf(batch)
        return (user * item).sum(-1) + self.bias
