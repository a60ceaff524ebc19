"""DNIS: Differentiable Neural Input Search (Cheng, Shen, Huang, 2020).

A soft selection layer alpha, one row per row block and one column per embedding dimension, multiplies the embeddings
(Eq. 4). It starts at one, descends the validation loss with an Adam of its own, and is clipped to [0, 1] (Algorithm 1).
Afterwards it is merged into the embeddings, and what is small there is pruned (2.5).

Differences from the paper:
    * Rows are cut per table by default; ``SearchSpace(scope="global")`` sorts the features of all tables in one list, as
      in 2.3.
    * The pruning threshold of Eq. 9 is tuned by hand there; here it follows from the budget.
    * The default plan keeps whole (block, column) pairs, which kernels can read. A pair's worth is the energy (sum of squares)
      of its merged weights: keeping the largest elements of a matrix, Eq. 9, is keeping most of its energy. The columns of a
      table share one order of worth, so that each block keeps a prefix of it.
    * ``fine_grained=True`` is Eq. 9 itself, with compressed sparse rows in place of COO: their indices are smaller.
    * Second-order gradients (Eq. 7) differentiate the virtual step exactly, where DARTS takes finite differences; ``xi`` is
      a plain SGD step there whatever optimizer the user has, as in Eq. 6.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.budget import Budget, Option, TableOptions, allocate, human_bytes
from embsearch_plugin.errors import BudgetError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan, TablePlan, fine_index_bytes, placement_bytes, remap_bytes

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.search.tables import SearchTable


@dataclass(frozen=True, kw_only=True)
class Dnis(AlgorithmConfig):
    """Settings of DNIS.

    Args:
        lr: learning rate of Adam for alpha (3.1).
        xi: learning rate of the virtual weight step (Eq. 6); 0 is the first-order approximation.
        fine_grained: prune single weights (Eq. 9) instead of (block, column) pairs.
        threshold: epsilon of Eq. 9, used where no budget is kept (``derive(strict=False)``).
        epsilon: of Eq. 8, against division by zero.
        patience: stop searching when the mean validation loss of ``window`` search steps has not improved for so many
            windows; alpha then stays as it is.
        window: search steps over which the loss is averaged.
    """

    name: ClassVar[str] = "dnis"
    lr: float = 0.01
    xi: float = 0.0
    fine_grained: bool = False
    threshold: float = 0.01
    epsilon: float = 1e-7
    patience: int = 10
    window: int = 100

    def build(self) -> "DnisSearch":
        """Return a new search."""
        return DnisSearch(self)


class DnisSearch:
    """One search by DNIS."""

    def __init__(self, config: Dnis) -> None:
        self.config = config
        self.alpha: list[Tensor] = []  # per table (S, D); one for all tables where blocks are global
        self._optimizer: torch.optim.Adam | None = None
        self._stop = _EarlyStop(config.patience, config.window)

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """Alpha starts as an all-one matrix (Algorithm 1, line 4)."""
        self._set_alpha([torch.ones_like(gate) for gate in self._shared(session, session.gates)])

    @hookimpl
    def embsearch_search_step(self, session: "Session", step: int, batch: Any) -> Mapping[str, float]:
        """Lines 7 to 9 of Algorithm 1: gradient, normalization, descent and clipping."""
        if self._stop.stopped:
            return {}
        assert self._optimizer is not None
        loss, gradients = session.gate_gradients(batch, self._gates(session, self.alpha), self.alpha, self.config.xi)
        for alpha, gradient in zip(self.alpha, gradients, strict=True):
            alpha.grad = normalized(gradient, self.config.epsilon)
        self._optimizer.step()
        with torch.no_grad():
            for alpha in self.alpha:
                alpha.clamp_(0, 1)
        session.set_gates(self._gates(session, self.alpha))
        self._stop.saw(loss)
        return {"loss": loss, **self._summary()}

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Merge alpha into the embeddings and prune (2.5)."""
        if self.config.fine_grained:
            return _derive_fine(session, budget, self.config.threshold)
        return _derive_pairs(session, budget, self.config.threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return alpha, its Adam's state, and what early stopping has seen."""
        optimizer = self._optimizer.state_dict() if self._optimizer else None
        return {
            "alpha": [alpha.detach() for alpha in self.alpha],
            "optimizer": optimizer,
            "stop": vars(self._stop).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._set_alpha(list(state["alpha"]))
        if self._optimizer is not None and state["optimizer"]:
            self._optimizer.load_state_dict(state["optimizer"])
        vars(self._stop).update(state["stop"])

    def _set_alpha(self, values: Sequence[Tensor]) -> None:
        self.alpha = [value.clone().requires_grad_() for value in values]
        self._optimizer = torch.optim.Adam(self.alpha, lr=self.config.lr) if self.alpha else None

    def _shared(self, session: "Session", gates: Sequence[Tensor]) -> list[Tensor]:
        if session.space.scope == "table":
            return list(gates)
        return [max(gates, key=lambda gate: gate.shape[1])]

    def _gates(self, session: "Session", alpha: Sequence[Tensor]) -> list[Tensor]:
        """Return each table's rows and columns of alpha."""
        if session.space.scope == "table":
            return list(alpha)
        return [alpha[0][:, : table.spec.dim] for table in session.tables]

    def _summary(self) -> dict[str, float]:
        values = torch.cat([alpha.detach().flatten() for alpha in self.alpha])
        return {"alpha_mean": float(values.mean()), "alpha_below_half": float((values < 0.5).float().mean())}


def normalized(gradient: Tensor, epsilon: float) -> Tensor:
    """Divide each row of a gradient (S, D) by the mean of its absolute values (Eq. 8)."""
    return gradient / (gradient.abs().mean(dim=1, keepdim=True) + epsilon)


class _EarlyStop:
    """Says when a loss, averaged over windows of steps, has stopped improving."""

    def __init__(self, patience: int, window: int) -> None:
        self.patience, self.window = patience, window
        self.total, self.seen, self.best, self.bad = 0.0, 0, float("inf"), 0

    @property
    def stopped(self) -> bool:
        return self.bad >= self.patience

    def saw(self, loss: float) -> None:
        self.total, self.seen = self.total + loss, self.seen + 1
        if self.seen == self.window:
            mean = self.total / self.window
            self.best, self.bad = (mean, 0) if mean < self.best else (self.best, self.bad + 1)
            self.total, self.seen = 0.0, 0


def _derive_pairs(session: "Session", budget: Budget | None, threshold: float) -> SizePlan:
    """Choose a dim per row block: the most energy within the budget, or every pair above the threshold."""
    tables = [_Pairs(table, session.block_energy(index), session) for index, table in enumerate(session.tables)]
    if budget is None:
        chosen = [pairs.above(threshold) for pairs in tables]
    else:
        options = [pairs.options(budget.unit) for pairs in tables]
        chosen = allocate(options, budget.limit(session.original_bytes), budget.unit)
    plans = [pairs.plan(dims) for pairs, dims in zip(tables, chosen, strict=True)]
    return SizePlan(tuple(plans), session.space.align)


class _Pairs:
    """The (block, column) pairs of one table: their energies, and the order in which its columns are kept."""

    def __init__(self, table: "SearchTable", energy: Tensor, session: "Session") -> None:
        self.table = table
        self.dims = session.space.dims(table.spec.dim)
        self.order = torch.argsort(energy.sum(0), descending=True, stable=True)
        self.energy = energy[:, self.order]  # (S, D)

    def options(self, unit: str) -> TableOptions:
        spec, whole = self.table.spec, sum(self.table.blocks.sizes)
        blocks = [self._options(energy, size, unit) for energy, size in zip(self.energy, self.table.blocks.sizes, strict=True)]
        placement = placement_bytes(spec) if unit == "bytes" else 0
        uniform = [
            Option(o.dim, o.cost + (placement if o.dim not in (0, spec.dim) else 0), o.utility)
            for o in self._options(self.energy.sum(0), whole, unit)
        ]
        fixed = remap_bytes(spec) + placement if unit == "bytes" else 0
        return TableOptions(str(spec), tuple(uniform), tuple(blocks) if len(blocks) > 1 else (), fixed)

    def _options(self, energy: Tensor, rows: int, unit: str) -> tuple[Option, ...]:
        weight = self.table.spec.dtype.itemsize if unit == "bytes" else 1
        kept = torch.nn.functional.pad(energy.cumsum(0), (1, 0)).tolist()
        return tuple(Option(dim, rows * dim * weight, kept[dim]) for dim in self.dims)

    def above(self, threshold: float) -> tuple[int, ...]:
        """Per block, the smallest dim that keeps every column whose root mean square reaches the threshold."""
        sizes = torch.tensor(self.table.blocks.sizes, dtype=torch.float64).clamp(min=1)
        kept = (self.energy / sizes[:, None]).sqrt() >= threshold
        last = (kept * torch.arange(1, kept.shape[1] + 1)).amax(1).tolist()
        return tuple(next(dim for dim in self.dims if dim >= need) for need in last)

    def plan(self, dims: Sequence[int]) -> TablePlan:
        """Build the table's plan from one dim for all blocks, or one for each."""
        blocks = self.table.blocks
        per_block = list(dims) if len(dims) > 1 else list(dims) * len(blocks.sizes)
        rows = [blocks.rows_of(block) for block in range(len(blocks.sizes))]
        return TablePlan.nested(self.table.spec, per_block, rows, self.order.tolist())


def _derive_fine(session: "Session", budget: Budget | None, threshold: float) -> SizePlan:
    """Keep the weights whose merged value reaches one threshold over all tables (Eq. 9)."""
    if budget is not None:
        threshold = _bisect(session, budget)
    plans = []
    for index, table in enumerate(session.tables):
        mask = session.merged_weight(index).abs() >= threshold
        rows = [table.blocks.rows_of(block) for block in range(len(table.blocks.sizes))]
        kept = bool(mask.any())
        plans.append(TablePlan.fine(table.spec, mask, rows) if kept else TablePlan.nested(table.spec, [0], [torch.cat(rows)]))
    return SizePlan(tuple(plans), session.space.align)


def _bisect(session: "Session", budget: Budget) -> float:
    """Return the smallest threshold whose plan is within the budget."""
    limit = budget.limit(session.original_bytes)
    largest = max(float(magnitudes.max()) for magnitudes in _magnitudes(session))
    low, high = 0.0, largest * (1 + 1e-6) + 1e-30  # at `high` nothing is kept, and nothing costs nothing
    if _fine_cost(session, low, budget.unit) <= limit:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _fine_cost(session, middle, budget.unit) <= limit else (middle, high)
    if _fine_cost(session, high, budget.unit) > limit:
        raise BudgetError(f"no fine-grained plan fits {human_bytes(limit)}. Raise the budget.")
    return high


def _magnitudes(session: "Session") -> Iterator[Tensor]:
    for index in range(len(session.tables)):
        yield session.merged_weight(index).abs()


def _fine_cost(session: "Session", threshold: float, unit: str) -> int:
    total = 0
    for table, magnitudes in zip(session.tables, _magnitudes(session), strict=True):
        kept = int((magnitudes >= threshold).sum())
        if unit == "bytes" and kept:
            total += kept * table.spec.dtype.itemsize + fine_index_bytes(table.spec, kept)
        elif unit == "parameters":
            total += kept
    return total


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register DNIS."""
    return [Dnis]
