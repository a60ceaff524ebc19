"""Wide & Deep (Cheng et al., 2016), which dnis.txt, 3.1, searches for clicks: a linear part and an MLP, trained together."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.models.common import TrainTask
from embsearch_plugin.models.fm import Linear
from embsearch_plugin.models.mlp import MlpNet


@dataclass(frozen=True)
class WideDeep:
    """Wide & Deep, for any fields and numbers.

    The wide part is a weight per id, in tables of dim 1, as in :mod:`embsearch_plugin.models.fm`. Differences from the paper:
    the wide part has no cross products, which are chosen by hand for each data set; one optimizer trains both parts.

    Args:
        embedding_dim: D of the tables of the deep part.
        layers: widths of its layers with ReLU.
    """

    name: ClassVar[str] = "wide_deep"
    embedding_dim: int = 32
    layers: tuple[int, ...] = (128, 64)

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``."""
        return TrainTask(WideDeepNet(schema, self.embedding_dim, self.layers), schema.task)


class WideDeepNet(nn.Module):
    """From a batch to logits, shaped as its labels."""

    def __init__(self, schema: Schema, dim: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.wide = Linear(schema)
        self.deep = MlpNet(schema, dim, layers)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        wide: Tensor = self.wide(batch)
        return wide + self.deep(batch)
