"""TorchRec's own models, built for a data set's schema."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRMTrain, InteractionArch, SparseArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.lookup.bags import columns_of
from embsearch_plugin.models.common import collection_for, require_clicks


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
        model = DLRM(
            collection_for(schema, self.embedding_dim),
            len(schema.dense),
            [*self.dense_layers, self.embedding_dim],
            [*self.over_layers, 1],
        )
        model.sparse_arch = _WholeSparseArch(model.sparse_arch.embedding_bag_collection)
        model.inter_arch = _SymmetricInteractionArch(model.inter_arch.F)
        return DLRMTrain(model)


class _WholeSparseArch(SparseArch):
    """TorchRec's, which takes the output apart and puts it together again; where it is in order, it is taken as it is."""

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled: KeyedTensor = self.embedding_bag_collection(features)
        values = pooled.values()
        if list(pooled.keys()) != list(self.sparse_feature_names):  # sharded tables may come in another order
            columns = pooled.to_dict()
            values = torch.cat([columns[name] for name in self.sparse_feature_names], dim=1)
        return values.reshape(-1, self.F, self.D)


class _SymmetricInteractionArch(InteractionArch):
    """TorchRec's, with one matrix product less in the backward: :class:`_PairProducts`."""

    def __init__(self, num_sparse_features: int) -> None:
        super().__init__(num_sparse_features)
        (one, other), rows = self.triu_indices, num_sparse_features + 1
        pair_of = torch.full((rows, rows), len(one))  # a row with itself is no pair
        pair_of[one, other] = pair_of[other, one] = torch.arange(len(one))
        self.register_buffer("place_of", one * rows + other, persistent=False)
        self.register_buffer("pair_of", pair_of.flatten(), persistent=False)

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        rows = torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1)
        return torch.cat((dense_features, _PairProducts.apply(rows, self.place_of, self.pair_of)), dim=1)


class _PairProducts(torch.autograd.Function):
    """The dot products of all pairs of an example's rows, (B, R, D) to (B, pairs).

    All products P = X X^T of an example take two matrix products in the backward. But P is symmetric, and so may the gradient
    be that comes for its upper half: (G + G^T) X is one. Written in operations that can be differentiated again.

    ``place_of`` is the place of each pair in P, flattened (pairs,); ``pair_of`` the pair of each place (R x R,), or the number
    of pairs on the diagonal.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place_of: Tensor, pair_of: Tensor) -> Tensor:
        ctx.save_for_backward(rows, pair_of)
        return torch.bmm(rows, rows.transpose(1, 2)).flatten(1).index_select(1, place_of)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, pair_of = ctx.saved_tensors
        padded = F.pad(gradient.to(rows.dtype), (0, 1))  # under autocast the products are of another type than rows
        whole = padded.index_select(1, pair_of).view(-1, rows.shape[1], rows.shape[1])
        return torch.bmm(whole, rows), None, None


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
