"""Selecting one of a table's candidate dims: what AutoDim and SAM share (autodim.txt, II.B.3, II.D.1, III.B)."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.candidates import FORMS, CandidateForm, Lookup, OwnDim, candidates_of
from embsearch_plugin.algorithms.parts.scoring import losses
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.errors import PlanError, SettingsError, SpaceError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.knapsack import Option, TableOptions, allocate
from embsearch_plugin.limits import Limits, above, at_least
from embsearch_plugin.plan import Block, SizePlan, TablePlan
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.space import SearchSpace

if TYPE_CHECKING:
    from embsearch_plugin.search.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CandidateDims(SearchConfig):
    """What AutoDim and SAM have in common: the supernet, and how a plan comes of it.

    Args:
        candidates: the dims to choose from (III.B), ascending.
        lookup: ``"shared"`` candidates are the first columns of one table, as wide as the largest; ``"separate"`` ones have
            columns of their own, side by side in one table (II.B.1).
        transform: to the table's width by zero ``"padding"`` or a ``"linear"`` layer per candidate (II.B.2).
        maps: whether the plan's tables get a linear map each, also where the search pads: what III.H advises for factorization
            machines and other models that need one width.
        lr: learning rate of Adam for the weights of the candidates (III.B).
        scored_on: validation batches on which ``derive`` scores candidates to meet a budget; it takes about as many forwards
            as tables x candidates x batches.
    """

    limits: ClassVar[Limits] = {"lr": above(0), "scored_on": at_least(1)}
    ranges: ClassVar[Ranges] = {
        "candidates": ((2, 4, 6, 8, 10), (4, 8, 16), (4, 8, 16, 32)),
        "transform": ("padding", "linear"),
        "lr": Range(1e-3, 0.1, log=True),
    }
    warm_up: int = 0
    retrains: bool = True
    candidates: tuple[int, ...] = (2, 4, 6, 8, 10)
    lookup: Lookup = "shared"
    transform: Literal["padding", "linear"] = "padding"
    maps: bool = False
    lr: float = 0.01
    scored_on: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.candidates or self.candidates[0] < 1 or list(self.candidates) != sorted(set(self.candidates)):
            raise SettingsError(f"candidates must be positive dims, ascending, each once, as (2, 4); got {self.candidates!r}")
        if self.lookup not in ("shared", "separate") or self.transform not in FORMS:
            raise SettingsError(
                "lookup must be 'shared' or 'separate', and transform 'padding' or 'linear'; "
                f"got {self.lookup!r} and {self.transform!r}"
            )

    @property
    def cuts_rows(self) -> bool:
        """A dim is a whole table's."""
        return False

    @property
    def cuts_columns(self) -> bool:
        """Its candidates are its own."""
        return False

    def space(self, given: SearchSpace | None) -> SearchSpace:
        """A dim is a whole table's: its rows are one block. Of what is given, ``align`` counts."""
        return replace(given or SearchSpace(), row_blocks=1, column_chunks=None, scope="table", groups=())

    def check(self, tables: Sequence[Table], space: SearchSpace) -> None:
        """Make sure that a table is as wide as a candidate."""
        super().check(tables, space)
        if all(table.dim < self.candidates[0] for table in tables):
            ours, theirs = list(self.candidates), sorted({table.dim for table in tables})
            raise SpaceError(
                f"a table must be as wide as a candidate at least; the candidates are {ours}, and the tables' dims "
                f"{theirs}.\n  Possible solutions: 1) smaller candidates  2) wider tables."
            )

    def form(self, table: Table, space: SearchSpace) -> CandidateForm:
        """Return what weighs a table's candidates."""
        candidates = candidates_of(table, self.candidates, space.align, self.lookup)
        return FORMS[self.transform](table.dim, candidates) if candidates else OwnDim(table.dim)


class CandidateSearch:
    """The candidates' weights, and plans made of them. What they learn from is the subclass's business."""

    def __init__(self, config: CandidateDims) -> None:
        self.config = config
        self.vectors = torch.empty(0, 0)  # (M, N), per table; minus infinity where it has fewer candidates
        self._optimizer: torch.optim.Adam | None = None
        self._random = torch.Generator()

    @property
    def alpha(self) -> Tensor:
        """The selection probabilities of the candidates, (M, N)."""
        return self.vectors.softmax(1)

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """Make sure that there is something to search with, where no forward has run."""
        self._begin(session)

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Take each table's candidate of the largest alpha (Eq. 13), or what is best within the budget.

        Probabilities are not worths. So each dim of each table is scored by the validation loss of the shared weights, in
        evaluation mode, with Eq. 13's choice for all other tables; an exact knapsack then takes the dims whose losses add
        up to the least. No table is dropped: candidates are positive.

        Raises:
            BudgetError: where the smallest candidates do not fit.
        """
        chosen = [form.candidates[n] for form, n in zip(_forms(session), self.vectors.argmax(1).tolist(), strict=True)]
        dims = [candidate.stored for candidate in chosen]
        if budget is not None:
            dims = self._within(session, budget, dims)
        plans = [self._plan(*each) for each in zip(session.specs, _forms(session), dims, strict=True)]
        return SizePlan(tuple(plans), session.space.align)

    @hookimpl
    def embsearch_fold(self, session: "Session", plan: SizePlan) -> Sequence[Fold]:
        """What a plan's columns are: those of the largest candidate that is stored in as many."""
        device = session.gates[0].device
        return [_fold(form, table, device) for form, table in zip(_forms(session), plan.tables, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors, their Adam's state, and that of the random numbers."""
        optimizer = self._optimizer.state_dict() if self._optimizer else None
        return {"vectors": self.vectors.detach(), "optimizer": optimizer, "random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._random.set_state(state["random"].cpu())
        if state["optimizer"]:
            self._set_vectors(state["vectors"]).load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors

    def sample(self, step: int) -> Tensor:
        """Return p (M, N) of Eq. 6. The noise -log(-log(u)) is minus the log of an exponential variable."""
        noise = -torch.empty(self.vectors.shape).exponential_(generator=self._random).log()
        scores = F.log_softmax(self.vectors, 1) + noise.to(self.vectors.device)
        return (scores / temperature(step)).softmax(1)

    def _begin(self, session: "Session") -> None:
        """Give all candidates of a table the same probability."""
        if self._optimizer is None:
            self._random.manual_seed(session.seed)
            numbers = [form.n_gates for form in _forms(session)]
            vectors = torch.zeros(len(numbers), max(numbers))
            for row, number in zip(vectors, numbers, strict=True):
                row[number:] = -torch.inf
            self._set_vectors(vectors.to(session.gates[0].device))
            self._warn_of_a_budget_that_is_too_small(session)

    def _warn_of_a_budget_that_is_too_small(self, session: "Session") -> None:
        """Say so before the search, not only by the error after it. Another budget may still be given to ``derive``."""
        least = 0
        for spec, form in zip(session.specs, _forms(session), strict=True):
            plans = [self._plan(spec, form, dim) for dim in _by_stored(form)]
            least += min(map(session.budget.unit.of, plans))
        if least > session.budget.limit(session.original_bytes):
            log.warning(
                "the smallest candidates take %s %s, more than the budget of %s: derive will need a larger one, or smaller "
                "candidates and SearchSpace(align=1)",
                f"{least:,}",
                session.budget.unit,
                session.budget,
            )

    def _set_vectors(self, values: Tensor) -> torch.optim.Adam:
        self.vectors = values.clone().requires_grad_()
        self._optimizer = torch.optim.Adam([self.vectors], lr=self.config.lr)
        return self._optimizer

    def _descend(self, session: "Session", step: int) -> dict[str, float]:
        """Take a step of Adam along the gradient that is there; write the gates of evaluation."""
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad()
        alpha = self.alpha.detach()
        session.set_gates(self._gates(session, alpha))
        return {"temperature": temperature(step), "largest_alpha": float(alpha.amax(1).mean())}

    def _gates(self, session: "Session", weights: Tensor) -> list[Tensor]:
        """Return each table's row of weights (M, N), as gates (1, its number of candidates)."""
        return [row[None, : form.n_gates] for row, form in zip(weights, _forms(session), strict=True)]

    def _within(self, session: "Session", budget: Budget, dims: Sequence[int]) -> list[int]:
        """Return the stored dims whose losses, each scored beside the others' ``dims``, add up to the least."""
        forms = _forms(session)
        one_hots = [
            {dim: torch.eye(form.n_gates, device=session.gates[0].device)[[n]] for dim, n in _by_stored(form).items()}
            for form in forms
        ]
        reference = [ways[dim] for ways, dim in zip(one_hots, dims, strict=True)]
        places = [(table, dim) for table, ways in enumerate(one_hots) for dim in ways]
        alternatives = [(table, one_hots[table][dim]) for table, dim in places]
        found = losses(session, reference, alternatives, self.config.scored_on)
        options: list[list[Option]] = [[] for _ in forms]
        for (table, dim), loss in zip(places, found, strict=True):
            plan = self._plan(session.specs[table], forms[table], dim)
            options[table].append(Option(dim, budget.unit.of(plan), -loss))
        tables = [TableOptions(str(spec), tuple(ways)) for spec, ways in zip(session.specs, options, strict=True)]
        return [dim for (dim,) in allocate(tables, budget.limit(session.original_bytes), budget.unit)]

    def _plan(self, spec: Table, form: CandidateForm, dim: int) -> TablePlan:
        maps = form.shifts and (self.config.maps or self.config.transform == "linear")
        return TablePlan(spec, (Block(spec.rows, dim),), projection=maps, bias=form.shifts)


def temperature(step: int) -> float:
    """Return the Gumbel-softmax's temperature after ``step`` weight steps (III.B)."""
    return max(0.5, 2 - 0.0005 * step)


def _forms(session: "Session") -> list[CandidateForm]:
    forms = [session.form(table) for table in range(len(session.specs))]
    return [form for form in forms if isinstance(form, CandidateForm)]


def _by_stored(form: CandidateForm) -> dict[int, int]:
    """Return, by stored dim, the number of the largest candidate."""
    return {candidate.stored: number for number, candidate in enumerate(form.candidates)}


def _fold(form: CandidateForm, plan: TablePlan, device: torch.device) -> Fold:
    if not plan.width:
        return UNFOLDED
    numbers = _by_stored(form)
    if plan.width not in numbers:
        raise PlanError(
            f"a plan of this search has the dims {sorted(numbers)} for table {str(plan.table)!r}; got {plan.width}.\n"
            "  Possible solution: es.apply the plan to a fresh model instead."
        )
    fold = form.fold(numbers[plan.width])
    if plan.projection and fold.projection is None:  # what was padded is mapped from now on, at first by the identity
        return replace(fold, projection=torch.eye(plan.width, plan.table.dim, device=device))
    return fold
