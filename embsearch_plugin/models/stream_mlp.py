"""The model of esapn.txt, 2.2: batch norm and tanh on the rows of user and item, then layers with tanh."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.lookup.bags import columns_of
from embsearch_plugin.models.common import TrainTask
from embsearch_plugin.tasks import STARS

CLASSES = 5


@dataclass(frozen=True)
class StreamMlp:
    """The paper's model; its tables are on the meta device, since growing tables take their place.

    Args:
        embedding_dim: D of every table.
        layers: widths of the layers with tanh; the output follows.
    """

    name: ClassVar[str] = "stream_mlp"
    embedding_dim: int = 128
    layers: tuple[int, ...] = (512,)

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``."""
        return TrainTask(StreamNet(schema, self.embedding_dim, self.layers), schema.task)


class StreamNet(nn.Module):
    """From a batch to logits, (B,), or (B, 5) where classes of stars are asked for."""

    def __init__(self, schema: Schema, dim: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.collection = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(name=f"t_{f.name}", num_embeddings=f.rows, embedding_dim=dim, feature_names=[f.name])
                for f in schema.fields
            ],
            device=torch.device("meta"),
        )
        self.norms = nn.ModuleDict({field.name: nn.BatchNorm1d(dim) for field in schema.fields})
        widths = [len(schema.fields) * dim, *layers]
        self.layers = nn.ModuleList(nn.Linear(width, after) for width, after in pairwise(widths))
        self.output = nn.Linear(widths[-1], CLASSES if schema.task is STARS else 1)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        rows = columns_of(self.collection(batch.sparse_features))
        hidden = torch.cat([torch.tanh(norm(rows[name])) for name, norm in self.norms.items()], 1)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits: Tensor = self.output(hidden)
        return logits.squeeze(1) if logits.shape[1] == 1 else logits
