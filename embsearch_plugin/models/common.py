"""What models share: tables for a schema, looking an example's fields up, and the train task around a model."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.data.ranking import RankingBatch
from embsearch_plugin.errors import ModelError
from embsearch_plugin.lookup.bags import columns_of
from embsearch_plugin.tasks import CLICK, Task


def collection_for(schema: Schema, dim: int) -> EmbeddingBagCollection:
    """Return a collection with one table of width ``dim`` per field; where a field has several values, their mean is taken."""
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=f"t_{field.name}",
                num_embeddings=field.rows,
                embedding_dim=dim,
                feature_names=[field.name],
                pooling=PoolingType.MEAN if field.multiple else PoolingType.SUM,
            )
            for field in schema.fields
        ]
    )


class Lookup(nn.Module):
    """A collection with a table per field, and which fields describe the item.

    Args:
        schema: of the data.
        dim: D of every table.
    """

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.collection = collection_for(schema, dim)
        self.items = frozenset(schema.items)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the row of each field: (B, D); for a ranking batch (B, 1 + N, D), the candidates' and their user's."""
        pooled = columns_of(self.collection(batch.sparse_features))
        if not isinstance(batch, RankingBatch):
            return pooled
        size, count = batch.candidates.shape
        bags = batch.candidates.clamp(min=0)  # a removed candidate has any row
        return {
            name: F.embedding(bags, rows) if name in self.items else rows[:size, None].expand(-1, count, -1)
            for name, rows in pooled.items()
        }


def numbers_of(batch: Batch) -> Tensor:
    """Return an example's numbers, (B, n_dense), or (B, 1 + N, n_dense), the same for all its candidates."""
    dense: Tensor = batch.dense_features
    return dense[:, None].expand(-1, batch.candidates.shape[1], -1) if isinstance(batch, RankingBatch) else dense


class TrainTask(nn.Module):
    """What TorchRec's DLRMTrain is for DLRM, for every task.

    Args:
        model: from a batch to logits (ratings themselves, where those are asked for), shaped as the batch's labels.
        task: what it is asked.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return ``loss, (loss, logits, labels)`` for a batch."""
        logits, labels = self.model(batch), batch.labels.float()
        if isinstance(batch, RankingBatch):  # nis.txt, A.2.3: the lowest number, so that its loss and gradient are zero
            logits = logits.masked_fill(batch.candidates < 0, torch.finfo(logits.dtype).min)
        loss = self.task.objective(logits, labels)
        return loss, (loss.detach(), logits.detach(), labels)


def relu_layers(widths: Sequence[int]) -> nn.Sequential:
    """Return fully connected layers with ReLU, each from one width to the next."""
    return nn.Sequential(*(layer for width, after in pairwise(widths) for layer in (nn.Linear(width, after), nn.ReLU())))


def require_clicks(name: str, schema: Schema) -> None:
    """Raise a ModelError where a model of TorchRec's, which ends in the loss of clicks, is asked something else."""
    if schema.task is not CLICK:
        raise ModelError(
            f"the model {name!r} must be asked for clicks; the data's task is {schema.task.name!r}.\n  Possible solutions: "
            "1) data.task=click  2) a model for every task: mf, mlp, neumf, fm, wide_deep."
        )


def require_items(name: str, schema: Schema) -> None:
    """Raise a ModelError unless the schema has fields of users and fields of items."""
    if not 0 < len(schema.items) < len(schema.fields):
        raise ModelError(
            f"the model {name!r} must know a user's fields from an item's; of {len(schema.fields)} fields, those of the item "
            f"are {list(schema.items)}.\n  Possible solutions: 1) data of users and items, such as movielens-1m  2) a model "
            "for any fields: mlp, fm, wide_deep."
        )
