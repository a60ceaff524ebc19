"""Spectral: the trained tables in a basis of falling worth, and one exact allocation over all of them. Our own method.

After ordinary training, per table with rows E (V x D): let p_i be row i's share of the table's lookups, and G the mean of
g g^T over examples, where g is the gradient of an example's loss with respect to a looked-up row (the empirical Fisher
matrix; an example's lookups add up). Losing the part delta_i of every row then costs, to second order, about

    1/2 sum over i of  p_i delta_i^T G delta_i          of the mean loss,

where g is taken to say nothing of the row that was looked up, nor of the others of its bag. g is the bag's gradient, times
the id's weight, and divided by the bag's length where a table is averaged. The examples are those of all processes. A bag is
taken to be one example's. Where examples share bags, as the negatives of a whole batch, attach validation batches in which each
has its own: a run does.

So, with Q from the SVD of diag(sqrt p) E G^(1/2) = P S Q^T, the table is stored as A = E G^(1/2) Q, whose columns stand by
falling worth, and is read through the projection Q^T G^(-1/2). Dropping column c for the rows of block b costs 1/2 sum over
i in b of p_i A_ic^2: one currency for all tables. Which pairs are kept is decided by one exact knapsack over all tables, in
which a projection pays for its rows. A table that is too small to pay for one keeps its own basis, with the diagonal of G.
Columns are kept by the chunks of the space, whose widths double by default; chunks of one column made no better models of
MovieLens-1M clicks (``docs/results.md``), and take the allocation longer.
Fine-tuning is the training that goes on after ``compact``.

Nothing is done while the model trains: all of it happens in ``derive`` and ``compact``, on a few validation batches. A row that
was never counted is worth nothing: it is kept only where its block is, whatever the budget.

A budget is a ceiling. Where the past says little of what comes, a dense model fits too much of it, and so does what is cut from
it. So in a run (``embsearch run``) a few tiny uniform dims, trained from scratch, are its rivals, and validation decides.

Related: low-rank factorization weighted by the Fisher information (Hsu et al., 2022), there with one weight per row of a matrix
and the same rank for all its rows.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from embsearch_plugin import distributed
from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.prefixes import Prefixes
from embsearch_plugin.algorithms.parts.uniform_dims import fitting_dims
from embsearch_plugin.algorithms.uniform import Uniform
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.errors import AttachError, SettingsError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.knapsack import allocate_among
from embsearch_plugin.limits import Limits, above, at_least, share
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.search.validation import NO_EXAMPLES
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.supernet.searchable import TooSmallBatch

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.search.tables import SearchTable


@dataclass(frozen=True, kw_only=True)
class Spectral(SearchConfig):
    """Settings of the spectral method.

    Args:
        batches: validation batches that G is estimated from; a few thousand examples are enough.
        floor: eigenvalues of G below this share of the largest count as that; it is inverted.
        tolerance: the share of each row block's worth that may be lost where no budget is kept (``derive(strict=False)``).
        fine_tuning: a run ends it after this share of the dense training's epochs, so that all of it costs no more than 1.3
            plain trainings (a step of a compact model takes longer on a CPU); 100, say, lets it converge.
        rivals: the uniform dims that a run trains beside it, as far as they fit the budget; a session of one's own has none.
    """

    name: ClassVar[str] = "spectral"
    ranges: ClassVar[Ranges] = {"floor": Range(1e-4, 0.1, log=True), "fine_tuning": Range(0.1, 1.0)}
    limits: ClassVar[Limits] = {
        "batches": at_least(1),
        "floor": share(one=True),
        "tolerance": share(zero=True),
        "fine_tuning": above(0),
    }
    starts_from: ClassVar[Literal["scratch", "dense"]] = "dense"
    examples_apart: ClassVar[bool] = True
    every: int = 50  # a step costs nothing; at steps the rows are ranked anew, where they were last at half as many
    batches: int = 16
    floor: float = 1e-2
    tolerance: float = 0.01
    fine_tuning: float = 0.2
    rivals: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(dim < 1 for dim in self.rivals) or len(set(self.rivals)) < len(self.rivals):
            raise SettingsError(f"rivals must be positive dims, no one twice; got {list(self.rivals)}")

    @property
    def trains(self) -> bool:
        """It needs the trained model only."""
        return False

    def fine_tuning_epochs(self, dense_epochs: int) -> float:
        """Return ``fine_tuning`` of the dense training's epochs."""
        return self.fine_tuning * dense_epochs

    def allocations(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> Sequence[SearchConfig]:
        """Return the method itself and its rivals: multiples of the space's ``align`` that fit the budget."""
        dims = [dim for dim in self.rivals if dim % space.align == 0]
        return [self, *(Uniform(dim=dim) for dim in fitting_dims(tables, budget, dims))]

    def build(self) -> "SpectralSearch":
        """Return the algorithm of one session."""
        return SpectralSearch(self)


class SpectralSearch:
    """The spectral method in one session."""

    def __init__(self, config: Spectral) -> None:
        self.config = config

    @hookimpl
    def embsearch_search_step(self) -> Mapping[str, float]:
        """Leave everything as it is."""
        return {}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Keep the pairs of row block and column that are worth most within the budget."""
        align = session.space.align
        bases = self._bases(session)
        if budget is None:
            all_rotated = [_columns(basis, session.space, rotated=True) for basis in bases]
            return SizePlan(tuple(each.plan(_within(each, self.config.tolerance)) for each in all_rotated), align)
        columns = [[_columns(basis, session.space, rotated=rotated) for rotated in (False, True)] for basis in bases]
        ways = [[(each, way) for each in pair for way in each.ways(budget.unit)] for pair in columns]
        options = [[way for _, way in of_table] for of_table in ways]
        chosen = allocate_among(options, budget.limit(session.original_bytes), budget.unit)
        return SizePlan(tuple(of_table[way][0].plan(dims) for of_table, (way, dims) in zip(ways, chosen, strict=True)), align)

    @hookimpl
    def embsearch_fold(self, session: "Session", plan: SizePlan) -> Sequence[Fold]:
        """Return the new bases, of the weights as they are now."""
        bases = self._bases(session) if any(table.projection for table in plan.tables) else []
        return [bases[index].fold if table.projection else UNFOLDED for index, table in enumerate(plan.tables)]

    def _bases(self, session: "Session") -> list["_Basis"]:
        fisher, shares = _fisher(session, self.config.batches), [_shares(counts) for counts in session.frequencies]
        weights = [session.merged_weight(index).double().cpu() for index in range(len(session.tables))]
        parts = zip(session.tables, weights, shares, fisher, strict=True)
        return [_Basis(*part, self.config.floor) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the weights say it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""


def _shares(counts: Tensor) -> Tensor:
    """Return the share of each row in a table's lookups, float64 (V,)."""
    return counts.double().cpu() / counts.sum().clamp(min=1)


def _fisher(session: "Session", batches: int) -> list[Tensor]:
    """Return G of each table, float64 (D, D): the mean over the examples of all processes, so that all derive one plan."""
    device = session.gates[0].device
    sums = [torch.zeros(spec.dim, spec.dim, dtype=torch.float64, device=device) for spec in session.specs]
    examples = torch.zeros((), dtype=torch.float64, device=device)
    for batch in session.validation_batches(batches):
        with suppress(TooSmallBatch):  # one without examples says nothing
            gradients, size = session.probe.row_gradients(batch)
            examples += size
            for of_table, rows in zip(sums, gradients, strict=True):
                of_table.addmm_(rows.double().t(), rows.double())
    *means, seen = distributed.mean([*sums, examples])
    if not seen:
        raise AttachError(NO_EXAMPLES)
    session.probe.require_finite(means)
    return [(mean / seen).cpu() for mean in means]


@dataclass(frozen=True, eq=False)
class _Basis:
    """One table's columns in the order of their worth: its own ones, or rotated.

    Args:
        table: the table, and how its rows are cut.
        weight: float64 (V, D).
        shares: p, float64 (V,).
        fisher: G, float64 (D, D).
        floor: eigenvalues of G below this share of the largest count as that.
    """

    table: "SearchTable"
    weight: Tensor
    shares: Tensor
    fisher: Tensor
    floor: float

    @cached_property
    def fold(self) -> Fold:
        """The new basis: G^(1/2) Q, and its inverse, the projection, with rows of length one."""
        values, vectors = torch.linalg.eigh(self.fisher)
        root = values.clamp(min=max(float(values[-1]) * self.floor, 1e-30)).sqrt()
        there, back = (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()
        second_moment = self.weight.t() @ (self.weight * self.shares[:, None])
        q = torch.linalg.eigh(there @ second_moment @ there).eigenvectors.flip(1)
        projection = q.t() @ back
        lengths = projection.norm(dim=1)
        return Fold(rotation=(there @ q * lengths).float(), projection=(projection / lengths[:, None]).float())

    @cached_property
    def rotated_worth(self) -> Tensor:
        """What each (block, column) pair of the new basis is worth, (S, D)."""
        assert self.fold.rotation is not None and self.fold.projection is not None
        length = (self.fold.projection.double() @ self.fisher * self.fold.projection.double()).sum(1)
        return self._worth(self.weight @ self.fold.rotation.double(), length)

    @cached_property
    def own_worth(self) -> Tensor:
        """What each (block, column) pair of the table's own basis is worth, (S, D)."""
        return self._worth(self.weight, self.fisher.diagonal())

    def _worth(self, rows: Tensor, curvature: Tensor) -> Tensor:
        squares = rows.square() * self.shares[:, None] * curvature / 2
        lookup = self.table.blocks.lookup().long()
        return squares.new_zeros(len(self.table.blocks.sizes), rows.shape[1]).index_add_(0, lookup, squares)


def _columns(basis: _Basis, space: SearchSpace, *, rotated: bool) -> Prefixes:
    """Return the columns to store a table by: its own, or rotated ones."""
    worth = basis.rotated_worth if rotated else basis.own_worth
    return Prefixes(basis.table, worth, space.of(basis.table.spec).dims(basis.table.spec.dim), projection=rotated)


def _within(rotated: Prefixes, tolerance: float) -> tuple[int, ...]:
    """Return, per block, the smallest dim that loses at most this share of the block's worth."""
    worth, total = rotated.worth, rotated.worth.sum(1, keepdim=True)
    kept = torch.nn.functional.pad(worth.cumsum(1), (1, 0))[:, :-1]  # by each number of columns below D
    return rotated.at_least((total - kept > tolerance * total).sum(1).tolist())


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register the spectral method."""
    return [Spectral]
