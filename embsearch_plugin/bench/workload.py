"""What is measured: a DLRM, batches for it, and a size plan."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_plugin.algorithms.dnis import Dnis
from embsearch_plugin.collection import Table
from embsearch_plugin.data.dataset import Field, Schema
from embsearch_plugin.decorator import prepare
from embsearch_plugin.fused import FusedEmbeddingBags
from embsearch_plugin.models.torchrec_own import Dlrm
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.search.session import Session

FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
Kernels = Literal["TBE", "EBC, sparse gradients", "EBC, dense gradients"]
TBE, SPARSE, DENSE = get_args(Kernels)
SKEW = 8  # the rank of an id is V * u ** SKEW for uniform u: the first 1 % of the rows get over half of the lookups

# Plans: shares of the rows, most frequent first, and the part of D that they keep.
TWO_WIDTHS = ((0.2, 1.0), (0.8, 0.25))
FOUR_WIDTHS = ((0.05, 1.0), (0.15, 0.5), (0.3, 0.25), (0.5, 0.125))


@dataclass(frozen=True)
class Workload:
    """A DLRM with Criteo's 13 numbers, and batches of skewed ids.

    Args:
        tables: number of tables, one feature each.
        rows: V of each.
        dim: D of each.
        batch: B.
        bag: ids per bag: each bag holds one, or 1 to ``2 * bag - 1`` of them.
        kernels: what looks tables up and trains them: FBGEMM's fused row-wise Adagrad, or the plain collection and SGD.
        device: where models and batches are.
    """

    tables: int = 26
    rows: int = 100_000
    dim: int = 32
    batch: int = 4096
    bag: int = 1
    kernels: Kernels = TBE
    device: str = "cpu"

    @property
    def fused(self) -> bool:
        """Whether tables are on FBGEMM's fused kernels."""
        return self.kernels == TBE

    def batches(self, count: int = 4) -> list[Batch]:
        """Return some batches."""
        return [self._batch(seed) for seed in range(count)]

    def _batch(self, seed: int) -> Batch:
        draw, bags = torch.Generator().manual_seed(seed), self.tables * self.batch
        lengths = torch.ones(bags, dtype=torch.int64)
        if self.bag > 1:
            lengths = torch.randint(1, 2 * self.bag, (bags,), generator=draw)
        ranks = (torch.rand(int(lengths.sum()), generator=draw) ** SKEW * self.rows).long()
        features = KeyedJaggedTensor([f"f{i}" for i in range(self.tables)], self._order[ranks], lengths=lengths)
        labels = torch.randint(0, 2, (self.batch,), generator=draw).float()
        return Batch(torch.randn(self.batch, 13, generator=draw), features, labels).to(torch.device(self.device))

    @cached_property
    def _order(self) -> Tensor:
        """The row of each rank: frequent rows lie anywhere in a table."""
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(1))

    def model(self) -> nn.Module:
        """Build the DLRM in its train task, its tables plain."""
        return self._built().to(self.device)

    def _built(self) -> nn.Module:
        schema = Schema(tuple(Field(f"f{i}", self.rows) for i in range(self.tables)), tuple(f"n{i}" for i in range(13)))
        torch.manual_seed(0)
        model = Dlrm(embedding_dim=self.dim).build(schema)
        for found in find_collections(model):
            for bag in found.module.get_submodule("embedding_bags").children():
                assert isinstance(bag, nn.EmbeddingBag)
                bag.sparse = self.kernels == SPARSE
        return model

    def baseline(self) -> nn.Module:
        """Build the DLRM as one would train it without a search."""
        model = self.model()
        for found in find_collections(model) if self.fused else ():
            found.replace_in(model, FusedEmbeddingBags(found.module, FUSED))
        return model

    def searched(self) -> tuple[nn.Module, Session]:
        """Build the DLRM and prepare it for a search by DNIS from the first step on."""
        model = self.model()
        session = prepare(model, algorithm=Dnis(warm_up=0), budget="25%", fused=FUSED if self.fused else None)
        return model, session

    def plan(self, widths: tuple[tuple[float, float], ...]) -> SizePlan:
        """Return the plan that keeps, of each table, shares of the rows at parts of the width."""
        found, ends, blocks = find_collections(self._on_meta())[0], 0.0, []
        for share, _ in widths:
            start, ends = round(ends * self.rows), ends + share
            blocks.append(self._order[start : round(ends * self.rows)].int())
        return SizePlan(tuple(self._table_plan(table, widths, blocks) for table in found.tables))

    def _table_plan(self, table: Table, widths: tuple[tuple[float, float], ...], blocks: list[Tensor]) -> TablePlan:
        return TablePlan.nested(table, [int(part * self.dim) for _, part in widths], blocks)

    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self._built()

    def alike(self, **changes: Any) -> "Workload":
        """Return it with some values changed."""
        return replace(self, **changes)
