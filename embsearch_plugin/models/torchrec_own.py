"""TorchRec's own models, built for a data set's schema."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.sparse.jagged_tensor import KeyedTensor

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.models.common import collection_for, require_clicks
from embsearch_plugin.supernet.bags import columns_of


@dataclass(frozen=True)
class Dlrm:
    """TorchRec's ``DLRM`` in its ``DLRMTrain``.

    Args:
        embedding_dim: D of every table, and of the dense arch's output.
        dense_layers: widths of the dense arch before its last layer, which has D.
        over_layers: widths of the over arch before its last layer, which has one.
    """

    name: ClassVar[str] = "dlrm"
    embedding_dim: int = 32
    dense_layers: tuple[int, ...] = (64,)
    over_layers: tuple[int, ...] = (128, 64)

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``.

        Raises:
            ModelError: where the data asks for something else than clicks.
        """
        require_clicks(self.name, schema)
        return DLRMTrain(
            DLRM(
                collection_for(schema, self.embedding_dim),
                len(schema.dense),
                [*self.dense_layers, self.embedding_dim],
                [*self.over_layers, 1],
            )
        )


@dataclass(frozen=True)
class DeepFm:
    """TorchRec's ``SimpleDeepFMNN``.

    Its factorization machine flattens all rows of an example into one vector of F x D entries and squares their one sum: rows
    interact through the sums of their entries, not through dot products as in Rendle (2010) and the DeepFM paper.

    Args:
        embedding_dim: D of every table.
        hidden_layer: width of the dense arch's hidden layer.
        deep_layer: width of the deep part's output.
    """

    name: ClassVar[str] = "deepfm"
    embedding_dim: int = 32
    hidden_layer: int = 64
    deep_layer: int = 128

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``.

        Raises:
            ModelError: where the data asks for something else than clicks.
        """
        require_clicks(self.name, schema)
        collection = collection_for(schema, self.embedding_dim)
        return DeepFmTrain(SimpleDeepFMNN(len(schema.dense), collection, self.hidden_layer, self.deep_layer))


class DeepFmTrain(nn.Module):
    """What DLRMTrain is for DLRM. SimpleDeepFMNN ends in a sigmoid, so the loss is that of probabilities.

    SimpleDeepFMNN takes the features out of the KeyedTensor one at a time, and the backward of each slice fills zeros of the
    whole width, F times in all: a third of a step. It is handed a dict of them instead, made by one split.
    """

    def __init__(self, model: SimpleDeepFMNN) -> None:
        super().__init__()
        self.model = model
        model.sparse_arch.register_forward_hook(_split_once)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return ``loss, (loss, logits, labels)`` for a batch."""
        probabilities = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        labels = batch.labels.float()
        loss = F.binary_cross_entropy(probabilities, labels)
        return loss, (loss.detach(), torch.logit(probabilities.detach(), eps=1e-7), labels)


def _split_once(module: nn.Module, inputs: object, pooled: KeyedTensor) -> dict[str, Tensor]:
    return columns_of(pooled)
