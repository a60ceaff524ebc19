"""Neural collaborative filtering, NeuMF (He et al., 2017), as nis.txt, 4.1.2 and A.2.1, describes it.

    MF:   p = user * item, entry by entry                                  (d)
    MLP:  q = ReLU layers of 4d, 2d and d over [user, item]                (d)
    logit = <h, [p, q]>                                                    h: 2d

Each component has tables of its own, d wide for MF and 4d wide for MLP. Where the item has several fields, their rows are
concatenated and mapped back to the table's width by a matrix; so are the user's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.models.common import Lookup, TrainTask, relu_layers, require_items


@dataclass(frozen=True)
class NeuMf:
    """NeuMF, for data of users and items; numbers are not used.

    nis.txt's NCF has ``mlp_factor`` 4. dnis.txt, 3.1, has one dim for all tables (its NeuMF has twice the parameters of its
    MF), which is 1; the layers' widths it does not say.

    All weights start as in nis.txt, A.2.1: normal, with standard deviation 1 / sqrt(n), n a layer's outputs or a table's dim
    (for h its 2d entries); biases at zero.

    Args:
        embedding_dim: d, of the tables of MF.
        mlp_factor: how many times as wide the tables of MLP are, and its first layer; each layer is half as wide as the last.
    """

    name: ClassVar[str] = "neumf"
    embedding_dim: int = 16
    mlp_factor: int = 4

    def build(self, schema: Schema) -> nn.Module:
        """Build the train task: ``loss, (loss, logits, labels) = model(batch)``.

        Raises:
            ModelError: where the schema does not say which fields describe the item.
        """
        require_items(self.name, schema)
        return TrainTask(NeuMfNet(schema, self.embedding_dim, self.mlp_factor * self.embedding_dim), schema.task)


class NeuMfNet(nn.Module):
    """From a batch to logits, shaped as its labels; the parts are named as in the paper's figure 3."""

    def __init__(self, schema: Schema, mf_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.mf = UserAndItem(schema, mf_dim)
        self.mlp = UserAndItem(schema, mlp_dim)
        self.layers = relu_layers([2 * mlp_dim, mlp_dim, mlp_dim // 2, mlp_dim // 4])
        self.output = nn.Linear(mf_dim + mlp_dim // 4, 1, bias=False)
        self.apply(start_gaussian)
        nn.init.normal_(self.output.weight, std=self.output.in_features**-0.5)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        user, item = self.mf(batch)
        deep = self.layers(torch.cat(self.mlp(batch), dim=-1))
        logits: Tensor = self.output(torch.cat([user * item, deep], dim=-1))
        return logits.squeeze(-1)


class UserAndItem(nn.Module):
    """Tables for all fields, and one vector each for the user and for the item, as wide as the tables.

    Several fields of one side are concatenated and mapped by a matrix (nis.txt, 4.1.2); a single one is taken as it is.
    """

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.lookup = Lookup(schema, dim)
        self.users = [field.name for field in schema.fields if field.name not in schema.items]
        self.items = list(schema.items)
        self.map_user, self.map_item = (_joined(len(names), dim) for names in (self.users, self.items))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the vectors of the user and of the item, (B, D) each; for a ranking batch (B, 1 + N, D)."""
        rows = self.lookup(batch)
        user, item = (torch.cat([rows[name] for name in names], dim=-1) for names in (self.users, self.items))
        return self.map_user(user), self.map_item(item)


def _joined(fields: int, dim: int) -> nn.Module:
    return nn.Identity() if fields == 1 else nn.Linear(fields * dim, dim, bias=False)


def start_gaussian(module: nn.Module) -> None:
    """Draw a module's weights as nis.txt, A.2.1, says: standard deviation 1 / sqrt(n), n its outputs or its table's dim."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.out_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.EmbeddingBag):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
