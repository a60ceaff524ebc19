"""NIS: Neural Input Search for Large Scale Recommendation Models (Joglekar et al., KDD 2020).

A table is cut into S x T embedding blocks (3.3.1). A controller chooses which take part: a single-size embedding (SE), one
pair (s, t) or nothing, or a multi-size one (ME), for each column chunk the s leading row blocks. What is kept of the chunks is
pooled, then projected to the table's width; rows and tables that are left out are zero vectors. After a warm-up, in which all
blocks train and the controller rests (3.4.1), weight steps and controller steps take turns. Weight steps train the blocks of one
choice per mini-batch. A controller step draws a choice for each ``group`` examples of a validation batch (A.2.2) and learns by
policy gradient, with a baseline network (3.4.2), from the reward of each (3.3.2):

    R = R_Q - lambda * max(C / B - 1, 0)

Pooling before projecting is exact: a sum of projected rows is the projected sum (3.2, MBOW).

Differences from the paper:
    * Projections start as the identity, so that a search starts as the model would without it; how the paper draws them it
      does not say (A.2.1 draws embeddings and hidden layers Gaussian).
    * C and B are bytes or parameters, as the session's budget is. C is the blocks' weights alone, as there. A derived plan pays
      for projections and remaps too.
    * Advantage actor-critic in step: A3C without its asynchronous workers. Processes that train together average their
      gradients. No entropy bonus, which the paper does not mention.
    * How the baseline "uses the choices that have already been made" is not said; see
      :class:`~embsearch_plugin.algorithms.controller.Controller`. Adagrad's accumulators start at PyTorch's 0, where
      TensorFlow's are 0.1 and make small steps for thousands of updates.
    * ``warm_up`` is 50 weight steps, not 100K of 1M to 3M: it has to fit short runs. At the start all arms are equally likely, so
      that blocks go on being trained. For long runs set some per cent of the steps.
    * Gates outside training are the mean over the controller's draws, as dropout's weights are scaled: the most likely choice
      is arbitrary while nothing is learned, and jumps. The two become one as the controller converges.
    * The budget of a plan is kept, by an exact allocation (:meth:`NisSearch.embsearch_derive`); the paper's rule, the most likely
      choice, which may overshoot, is ``derive(strict=False)``.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.algorithms.controller import Controller
from embsearch_plugin.algorithms.embedding_blocks import EmbeddingBlocks, Mode
from embsearch_plugin.algorithms.quality import Quality, number, quality_of
from embsearch_plugin.algorithms.scoring import losses
from embsearch_plugin.budget import Budget, allocate_among
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.errors import NonFiniteLoss
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.supernet.forms import Form, Projection

if TYPE_CHECKING:
    from embsearch_plugin.search.objective import Outcome
    from embsearch_plugin.search.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Nis(AlgorithmConfig):
    """Settings of NIS.

    Args:
        mode: ``"se"``, single-size embeddings, or ``"me"``, multi-size ones.
        quality: R_Q, of the examples that share a choice: ``"auc"``, ``"recall@1"`` (any number; logits must be (B, 1 +
            negatives), the positive first), ``"mse"`` (negative), or a function (logits, labels) -> a number, higher being
            better. Groups of one class have no AUC and are skipped.
        penalty: lambda, how much R_Q must gain to be worth going over the budget by once the budget.
        lr: learning rate of Adagrad, for the controller and its baseline.
        group: validation examples that share a choice. A whole batch shares one where its examples share looked-up bags, as of
            common negatives.
        score_batches: validation batches on which ``derive`` scores every candidate.
    """

    name: ClassVar[str] = "nis"
    folds_gates: ClassVar[bool] = False
    mode: Mode = "me"
    quality: str | Quality = "auc"
    penalty: float = 0.01
    lr: float = 0.1
    group: int = 64
    score_batches: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("se", "me"):
            raise ValueError(f"mode must be 'se' or 'me'; got {self.mode!r}")
        if min(self.group, self.score_batches) < 1 or self.lr <= 0 or self.penalty < 0:
            raise ValueError(
                "group and score_batches must be at least 1, lr above 0, penalty at least 0; got "
                f"{self.group}, {self.score_batches}, {self.lr}, {self.penalty}"
            )
        quality_of(self.quality)

    @property
    def searches_within_budget(self) -> bool:
        """The reward depends on the budget."""
        return True

    def space(self, given: SearchSpace | None) -> SearchSpace:
        """Return five equal row blocks by four equal column chunks (4.1.3), where the user asked for nothing else."""
        return given or SearchSpace(row_blocks=(0.2,) * 5, column_chunks=4)

    def form(self, table: Table) -> Form:
        """Return the chunks' projections, one below the other."""
        return Projection(table.dim)

    def build(self) -> "NisSearch":
        """Return a new search."""
        return NisSearch(self)


class NisSearch:
    """One search by NIS."""

    def __init__(self, config: Nis) -> None:
        self.config = config
        self.controller: Controller | None = None
        self.generator = torch.Generator()
        self.groups = 0  # of a validation batch; 0 where none was seen
        self.skipped = 0  # groups of one class until now

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """All arms are equally likely (4.1.3)."""
        arms = [menu.shape[1] for menu in self._menus(session) for _ in menu]
        self.controller = Controller(arms, self.config.lr, session.gates[0].device)
        self.generator.manual_seed(session.seed)

    @hookimpl
    def embsearch_before_forward(self, session: "Session") -> None:
        """Draw the choice of a mini-batch; until the warm-up is over all blocks train."""
        if self.controller is not None:
            (choice,) = self.controller.draw(1, self.generator)
            session.use_gates(self._gates(session, self._heights(session, choice)))

    @hookimpl
    def embsearch_search_step(self, session: "Session", batch: Any) -> Mapping[str, float]:
        """Draw a choice for each group of examples, and learn from their rewards."""
        assert self.controller is not None
        self.groups = self.groups or session.groups_in(batch, self.config.group)
        choices = self.controller.draw(self.groups, self.generator)
        heights = self._heights(session, choices)
        outcome = session.evaluate(batch, self._gates(session, heights), self.config.group)
        quality = self._qualities(outcome).to(choices.device)
        cost = self._cost(session, heights)
        reward = quality - self.config.penalty * (cost - 1).clamp(min=0)  # 3.3.2
        told = ~reward.isnan()
        self.controller.learn(choices[told], reward[told])
        session.set_gates(self._mean_gates(session))
        return self._summary(outcome, reward[told], cost)

    def _summary(self, outcome: "Outcome", reward: Tensor, cost: Tensor) -> Mapping[str, float]:
        if not len(reward):
            log.warning("no group of a validation batch has both classes, so its step taught nothing: use a larger group=")
            return {}
        assert self.controller is not None
        return {
            "loss": float(outcome.loss.detach()),
            "reward": float(reward.mean()),
            "cost_per_budget": float(cost.mean()),
            "certainty": float(self.controller.probabilities().amax(1).mean()),
            "skipped_groups": float(self.skipped),
        }

    def _qualities(self, outcome: "Outcome") -> Tensor:
        """Return R_Q of each group, (N,); NaN where a group has no examples, or no AUC."""
        if not math.isfinite(float(outcome.loss.detach())):
            raise NonFiniteLoss(f"the validation loss must be a number; got {float(outcome.loss.detach())}.")
        logits, labels = outcome.logits.detach(), outcome.labels.detach()
        group = (torch.arange(len(logits), device=logits.device) // self.config.group) % self.groups
        quality, found = quality_of(self.config.quality), [math.nan] * self.groups
        for index in group.unique().tolist():
            mine = group == index
            if self.config.quality == "auc" and labels[mine].gt(0.5).float().mean() in (0, 1):
                self.skipped += 1
            else:
                found[index] = number(self.config.quality, quality(logits[mine], labels[mine]))
        return torch.tensor(found)

    # Choices and what they mean.

    def _blocks(self, session: "Session") -> list[EmbeddingBlocks]:
        cut = session.space.chunk_widths
        return [EmbeddingBlocks(t.spec, t.blocks.sizes, cut(t.spec.dim)) for t in session.tables]

    def _menus(self, session: "Session") -> list[Tensor]:
        """Return the arms of each table's choices, per table (choices, arms, T)."""
        return [blocks.menu(self.config.mode).to(session.gates[0].device) for blocks in self._blocks(session)]

    def _split(self, session: "Session", values: Tensor, dim: int) -> list[Tensor]:
        """Split what there is of each choice by table."""
        return list(values.split([len(menu) for menu in self._menus(session)], dim))

    def _heights(self, session: "Session", choices: Tensor) -> list[Tensor]:
        """Return what choices (..., choices) stand for, per table (..., T)."""
        by_table = zip(self._menus(session), self._split(session, choices, -1), strict=True)
        return [menu[torch.arange(len(menu), device=menu.device), mine].sum(-2) for menu, mine in by_table]

    def _gates(self, session: "Session", heights: Sequence[Tensor]) -> list[Tensor]:
        """Return the gates of heights, per table (..., S, D)."""
        return [b.gates(b.kept(own)) for b, own in zip(self._blocks(session), heights, strict=True)]

    def _mean_gates(self, session: "Session") -> list[Tensor]:
        """Return the mean of the gates that would be drawn, per table (S, D)."""
        assert self.controller is not None
        gates = []
        shares = self._split(session, self.controller.probabilities(), 0)
        for blocks, menu, share in zip(self._blocks(session), self._menus(session), shares, strict=True):
            each = blocks.gates(blocks.kept(menu))  # (choices, arms, S, D): choices have no block in common
            gates.append(torch.einsum("ca,casd->sd", share[:, : menu.shape[1]], each))
        return gates

    def _cost(self, session: "Session", heights: Sequence[Tensor]) -> Tensor:
        """Return the memory cost as a share of the budget: C / B, (N,)."""
        budget = session.budget
        sizes = [
            blocks.n_weights(own) * (blocks.spec.dtype.itemsize if budget.unit == "bytes" else 1)
            for blocks, own in zip(self._blocks(session), heights, strict=True)
        ]
        return torch.stack(sizes).sum(0) / budget.limit(session.original_bytes)

    # The result.

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Choose the arms that are worth most within the budget; the most likely ones where none is kept.

        An arm is worth its validation loss on the shared weights, negative: that of its choice, all other choices being at the
        mean of what the controller draws (the gates of evaluation). Worths of different choices, and so those of the column
        chunks of ME, are taken to add up. Probabilities say little of arms that were hardly drawn, and are not worths.
        """
        assert self.controller is not None
        chosen = self.controller.most_likely() if budget is None else self._best(session, budget)
        heights = self._heights(session, chosen)
        plans = [
            blocks.plan(own.cpu(), table.blocks)
            for blocks, own, table in zip(self._blocks(session), heights, session.tables, strict=True)
        ]
        return SizePlan(tuple(plans), session.space.align)

    def _best(self, session: "Session", budget: Budget) -> Tensor:
        """Return the arms that are worth most within the budget, (choices,)."""
        unit = budget.unit
        worths = self._worths(session)
        offers = [
            blocks.ways(blocks.menu(self.config.mode), worth, unit)
            for blocks, worth in zip(self._blocks(session), worths, strict=True)
        ]
        found = allocate_among(offers, budget.limit(session.original_bytes), unit)
        chosen = [torch.tensor(arms).expand(len(worth)) for (_, arms), worth in zip(found, worths, strict=True)]
        return torch.cat(chosen).to(session.gates[0].device)

    def _worths(self, session: "Session") -> list[Tensor]:
        """Return what each arm is worth, per table (choices, arms)."""
        reference = self._mean_gates(session)
        alternatives = list(self._alternatives(session, reference))
        found = torch.tensor(losses(session, reference, alternatives, self.config.score_batches), dtype=torch.float64)
        menus = self._menus(session)
        by_table = found.neg().split([menu.shape[0] * menu.shape[1] for menu in menus])
        return [worth.view(menu.shape[:2]) for worth, menu in zip(by_table, menus, strict=True)]

    def _alternatives(self, session: "Session", reference: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield a table's number and its gates under each arm of each choice, all else as in the reference."""
        for index, (blocks, menu) in enumerate(zip(self._blocks(session), self._menus(session), strict=True)):
            for arms in menu:
                concerned = blocks.gates(arms.amax(0, keepdim=True) > 0) > 0  # (1, D): the columns that the choice decides on
                for heights in arms:
                    yield index, torch.where(concerned, blocks.gates(blocks.kept(heights)), reference[index])

    @hookimpl
    def embsearch_fold(self, session: "Session", plan: SizePlan) -> Sequence[Fold]:
        """Return the projections' rows in the order of the plans' columns."""
        return [_fold(session.form(index), table) for index, table in enumerate(plan.tables)]

    def state_dict(self) -> dict[str, Any]:
        """Return the controller, its generator, and what was seen of the batches."""
        return {
            "controller": None if self.controller is None else self.controller.state_dict(),
            "generator": self.generator.get_state(),
            "groups": self.groups,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        controller = state["controller"]
        self.controller = None if controller is None else Controller.from_state(controller, self.config.lr)
        self.generator.set_state(state["generator"].cpu())
        self.groups, self.skipped = state["groups"], state["skipped"]


def _fold(form: Form, plan: TablePlan) -> Fold:
    assert isinstance(form, Projection)
    if not plan.projection:
        return UNFOLDED
    return Fold(projection=form.weight.detach()[list(plan.columns or range(plan.table.dim))])


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register NIS."""
    return [Nis]
