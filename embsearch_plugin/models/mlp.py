"""A multi-layer perceptron over the concatenated rows of all fields (He et al., 2017; dnis.txt, 3.1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.models.common import Lookup, TrainTask, numbers_of, relu_layers


@dataclass(frozen=True)
class Mlp:
    """An MLP, for any fields and numbers.

    Args:
        embedding_dim: D of every table.
        layers: widths of the layers with ReLU; one of width 1 without it follows.
    """

    name: ClassVar[str] = "mlp"
    embedding_dim: int = 64
    layers: tuple[int, ...] = (64, 32, 16)

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``."""
        return TrainTask(MlpNet(schema, self.embedding_dim, self.layers), schema.task)


class MlpNet(nn.Module):
    """From a batch to logits, shaped as its labels."""

    def __init__(self, schema: Schema, dim: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.lookup = Lookup(schema, dim)
        widths = [len(schema.fields) * dim + len(schema.dense), *layers]
        self.layers = relu_layers(widths)
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        inputs = torch.cat([*self.lookup(batch).values(), numbers_of(batch)], dim=-1)
        logits: Tensor = self.output(self.layers(inputs))
        return logits.squeeze(-1)
