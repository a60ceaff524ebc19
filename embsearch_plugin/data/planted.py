"""A data set of which the truth is known: every field has a planted latent rank.

Criteo's shape (13 numbers, 26 categorical fields, zipf ids) and a signal made of pairwise interactions, as a DLRM or a
factorization machine computes them. For an example with ids i_1 .. i_F and numbers x:

    logit = sum over f < g of <u_f(i_f), u_g(i_g)> + <w, x>            label ~ Bernoulli(sigmoid(logit))

u_f(i) has rank_f entries; in a product, the shorter vector is filled up with zeros. So the fields' subspaces are
nested: direction k is shared by all fields whose rank is above k. This makes the ranks the truth a search should find:

* Sufficient. Tables of rank_f columns suffice, whether a method keeps the first columns, masks columns or learns a
  projection. With subspaces at random angles only the last would do.
* Necessary. A rotation common to all fields leaves every product as it was, so a basis cannot be learnt. The ranks can:
  f's interactions with a field of at least its rank have rank rank_f. A direction of one field alone would interact
  with nothing; hence at least two fields must have the largest rank.
* Equal energy. Each u_f has mean zero and uncorrelated entries over the ids as they occur, so no field has an effect of
  its own. Direction k of m_k fields is scaled by (m_k - 1) ** -1/4, which gives the part of the logit where field f
  meets the others along k the same variance for every f and k: a field of rank 8 has 8 directions worth keeping.

``PlantedDataset.oracle_plan`` turns the truth into the size plan that a search should find. To ask whether a search finds
it, the ranks must differ, need about as many bytes as the budget, and be learnable (see ``recipes/planted_dlrm_dnis.yaml``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from embsearch_plugin.algorithms.parts.pruning import best_pairs
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.data.dataset import Field, Schema, Split, TabularDataset, random_split
from embsearch_plugin.errors import DataError, SettingsError
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.search.tables import SearchTable
from embsearch_plugin.space import SearchSpace, cut_tables

Floats = NDArray[np.float64]

DENSE_SHARE = 0.1  # of the logit's variance
CHUNK = 65_536  # examples whose latent vectors are held at once


class PlantedDataset(TabularDataset):
    """The generated examples, and what they were generated from.

    ``ranks``: the latent rank of each field. ``latents``: u of each field, (rows, rank) float64. ``dense_weights``: w,
    (n_dense,) float64. ``logits``: the true ones, (N,) float64; no model's AUC is above theirs, up to chance.
    """

    def __init__(
        self,
        *,
        latents: tuple[Tensor, ...],
        dense_weights: Tensor,
        ids: Tensor,
        dense: Tensor,
        chance: Tensor,
        splits: dict[Split, Tensor],
    ) -> None:
        self.ranks = tuple(table.shape[1] for table in latents)
        self.latents = latents
        self.dense_weights = dense_weights
        self.logits = interactions(latents, ids) + dense.double() @ dense_weights
        labels = (chance < self.logits.sigmoid()).float()
        super().__init__(_schema(latents, dense.shape[1]), dense, ids, labels, splits)

    def oracle_plan(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> SizePlan:
        """Return the plan that a search should find: the best within the budget, from the latents alone.

        Rows are ranked and cut by how often their ids occur. A pair of a row block and a column k of field f is worth the
        variance of the logit that is lost with it, where p(i) is the share of the examples that have id i:

            sum over i in the block of p(i) * u_fk(i)^2, times the sum over g other than f of Var(u_gk)

        A column beyond a field's rank is worth nothing, so it is not kept, whatever is left of the budget.

        Args:
            tables: one for each field, in the fields' order, as ``session.specs``.
            budget: the ceiling.
            space: how tables are cut.

        Raises:
            DataError: where the tables are not the fields', or narrower than the largest rank.
            BudgetError: where no plan fits.
        """
        _check_tables(tables, self.ranks)
        counts = [torch.bincount(column, minlength=len(u)) for column, u in zip(self.ids.t(), self.latents, strict=True)]
        searched = [SearchTable(t, blocks) for t, blocks in zip(tables, cut_tables(tables, counts, space), strict=True)]
        worths = _worths(self.latents, [count / len(self.ids) for count in counts], width=max(table.dim for table in tables))
        energies = [
            torch.stack([worth[t.blocks.rows_of(block).long(), : t.spec.dim].sum(0) for block in range(len(t.blocks.sizes))])
            for t, worth in zip(searched, worths, strict=True)
        ]
        return best_pairs(searched, energies, budget, space)


@dataclass(frozen=True)
class Planted:
    """Generates the planted data set; equal configs give equal data. The splits are random, 8:1:1.

    ``rows`` and ``ranks`` are dealt to the fields in turn, starting again when used up. ``zipf`` is the exponent of the
    ids' frequencies, ``signal`` the standard deviation of the logits. The best possible AUC is about .84; a DLRM of
    dim 8 reaches .80 in six epochs. Larger tables need more examples, about 2,000 per row.

    Args:
        examples: how many, of all splits.
        fields: categorical ones.
        n_dense: numbers.
        rows: of the fields' tables, dealt in turn.
        ranks: the fields' latent ranks, dealt in turn.
        zipf: exponent of the ids' frequencies.
        signal: standard deviation of the logits.
        seed: of all that is drawn.
    """

    name: ClassVar[str] = "planted"

    examples: int = 200_000
    fields: int = 26
    n_dense: int = 13
    rows: tuple[int, ...] = (100,)
    ranks: tuple[int, ...] = (0, 1, 2, 4)
    zipf: float = 1.05
    signal: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.examples, self.fields, *self.rows, len(self.rows), len(self.ranks))
        if min(counts) < 1 or min(self.n_dense, *self.ranks, self.seed) < 0:
            raise SettingsError(
                "examples, fields and rows must be at least 1, n_dense, ranks and seed at least 0, rows and ranks hold one; "
                f"got {self.examples}, {self.fields}, {self.rows}, {self.n_dense}, {self.ranks} and {self.seed}"
            )
        if not (math.isfinite(self.signal) and math.isfinite(self.zipf) and min(self.signal, self.zipf) >= 0):
            raise SettingsError(f"signal and zipf must be numbers, at least 0; got {self.signal} and {self.zipf}")

    def load(self) -> PlantedDataset:
        """Generate the data set; 200,000 examples take about a second.

        Raises:
            DataError: a field has no more rows than its rank, or the largest rank is one field's alone.
        """
        rows, ranks = (tuple(islice(cycle(given), self.fields)) for given in (self.rows, self.ranks))
        _check(rows, ranks)
        rng = np.random.default_rng(self.seed)
        frequencies = [_zipf(n, self.zipf, rng) for n in rows]
        scales = self.signal**0.5 * _scales(ranks)
        latents = tuple(_latent(p, scales[:rank], rng) for p, rank in zip(frequencies, ranks, strict=True))
        weights = rng.standard_normal(self.n_dense)
        weights *= self.signal * DENSE_SHARE**0.5 / np.linalg.norm(weights)
        ids = [rng.choice(len(p), self.examples, p=p).astype(np.int32) for p in frequencies]
        return PlantedDataset(
            latents=latents,
            dense_weights=torch.from_numpy(weights),
            ids=torch.from_numpy(np.stack(ids, axis=1)),
            dense=torch.from_numpy(rng.standard_normal((self.examples, self.n_dense), dtype=np.float32)),
            chance=torch.from_numpy(rng.random(self.examples)),
            splits=random_split(self.examples, (0.8, 0.1, 0.1), self.seed),
        )


def interactions(latents: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Return the sum over f < g of <u_f, u_g> for ids (N, F), as (N,); ``latents`` are as in ``PlantedDataset``.

    By the identity of factorization machines (Rendle 2010, lemma 3.1): half of |sum of u_f|^2 - sum of |u_f|^2.
    """
    width = max(table.shape[1] for table in latents)
    padded = [F.pad(table, (0, width - table.shape[1])) for table in latents]
    return torch.cat([_pair_sum(padded, chunk) for chunk in ids.split(CHUNK)])


def _pair_sum(tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    vectors = [table.index_select(0, column) for table, column in zip(tables, ids.t(), strict=True)]
    total = torch.stack(vectors).sum(0)
    squares = sum(vector.square().sum(1) for vector in vectors)
    return (total.square().sum(1) - squares) / 2


def _worths(latents: Sequence[Tensor], shares: Sequence[Tensor], width: int) -> list[Tensor]:
    """Return, per field, the variance of the logit that rests on each row and column, (rows, width)."""
    variances = [
        F.pad(share[:, None] * latent.square(), (0, width - latent.shape[1]))
        for share, latent in zip(shares, latents, strict=True)
    ]
    total = torch.stack([variance.sum(0) for variance in variances]).sum(0)
    return [variance * (total - variance.sum(0)) for variance in variances]


def _zipf(rows: int, exponent: float, rng: np.random.Generator) -> Floats:
    """Return the probability of each id; which ids are frequent is left to chance, as in a real log."""
    weights = np.arange(1, rows + 1) ** -exponent
    return rng.permutation(weights / weights.sum())


def _scales(ranks: Sequence[int]) -> Floats:
    """Return what the entries of u are multiplied by, such that all interactions have variance 1 - DENSE_SHARE.

    With s_k the scale of direction k, its m_k (m_k - 1) / 2 pairs have variance s_k^4 each. At s_k^4 = c / (m_k - 1)
    the variances add up to c times half the sum of all m_k, which is the sum of all ranks.
    """
    fields = np.array([sum(rank > k for rank in ranks) for k in range(max(ranks))])
    total = (1 - DENSE_SHARE) * 2 / max(sum(ranks), 1)
    return np.asarray((total / (fields - 1)) ** 0.25)


def _latent(frequencies: Floats, scales: Floats, rng: np.random.Generator) -> Tensor:
    """Return one field's u (rows, rank): gaussian, then made to have mean 0 and covariance scales^2 exactly."""
    z = rng.standard_normal((len(frequencies), len(scales)))
    z -= frequencies @ z
    covariance = z.T @ (frequencies[:, None] * z)
    return torch.from_numpy(np.linalg.solve(np.linalg.cholesky(covariance), z.T).T * scales)


def _schema(latents: Sequence[Tensor], n_dense: int) -> Schema:
    fields = tuple(Field(f"cat_{f}", len(table)) for f, table in enumerate(latents))
    return Schema(fields, tuple(f"int_{i}" for i in range(n_dense)))


def _check(rows: Sequence[int], ranks: Sequence[int]) -> None:
    for f, (n, rank) in enumerate(zip(rows, ranks, strict=True)):
        if n <= rank:
            raise DataError(f"field 'cat_{f}' must have more rows than its rank, got {n} and {rank}. Try: more rows.")
    largest = max(ranks)
    if largest and ranks.count(largest) < 2:
        raise DataError(
            f"the largest rank must be given to at least two fields, got {largest} once in {tuple(ranks)}: its last "
            "directions would interact with nothing. Try: more fields, or a smaller largest rank."
        )


def _check_tables(tables: Sequence[Table], ranks: Sequence[int]) -> None:
    if len(tables) != len(ranks):
        raise DataError(f"there must be one table for each of the {len(ranks)} fields, got {len(tables)}. Try: session.specs.")
    narrowest = min(table.dim for table in tables)
    if narrowest < max(ranks):
        raise DataError(
            f"tables must be at least as wide as the largest rank, got {narrowest} and {max(ranks)}: the truth would not fit. "
            "Try: a larger embedding_dim."
        )
