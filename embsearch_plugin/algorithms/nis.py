"""NIS: Neural Input Search for Large Scale Recommendation Models (Joglekar et al., KDD 2020).

A table is cut into S x T embedding blocks (3.3.1). A controller chooses which take part: a single-size embedding (SE), one
pair (s, t) or nothing, or a multi-size one (ME), for each column chunk the s leading row blocks. What is kept is pooled, then
projected to the table's width; rows and tables that are left out are zero vectors. After a warm-up, in which all blocks train
and the controller rests (3.4.1), weight steps and controller steps take turns. A weight step trains the blocks of one choice,
drawn for the mini-batch. A controller step draws a choice for each ``group`` examples of a validation batch (A.2.2) and learns
by policy gradient, with a baseline network (3.4.2), from the reward of each (3.3.2):

    R = R_Q - lambda * max(C / B - 1, 0)

Pooling before projecting is exact: a sum of projected rows is the projected sum (3.2, MBOW).

Differences from the paper:
    * Projections start as the identity, so that a search starts as the model would without it. How the paper draws them it
      does not say (A.2.1: "all weights, including hidden layer weights and embedding matrices", Gaussian).
    * Rows are ranked by the ids that training has looked up until then, when the search starts and again whenever the number of
      steps has doubled; the paper sorts the vocabulary once, by the whole log (3.1, A.1.1), which is ``frequencies=``. What an
      arm keeps changes a little with the ranks.
    * A controller step runs the model in the mode that it is in, that of training: its dropout draws, and batch norm has the
      statistics of all groups of the batch together. The paper mentions neither.
    * C and B are bytes or parameters, as the session's budget is. C is the blocks' weights alone, as there. A derived plan
      pays for projections and remaps too; a table that is kept whole is stored projected, and has no projection.
    * Advantage actor-critic in step: A3C without its asynchronous workers. Processes that train together average their
      gradients. There is no entropy bonus; the paper mentions none.
    * How the baseline uses "the choices that have already been made" is not said; see
      :class:`~embsearch_plugin.algorithms.parts.controller.Controller`. Adagrad's sum of squares starts at PyTorch's 0;
      TensorFlow's 0.1 makes small steps for thousands of updates.
    * ``warm_up`` is 50 weight steps, not 100K of 1M to 3M, to fit short runs. While the controller has learned little all arms
      are about equally likely, so that every block goes on being trained. For long runs set some per cent of the steps. A run
      ends a search as it ends any training, and keeps the epoch of the best validation loss; where tables overfit soon, as
      those of MovieLens-1M do, that is before the controller has converged.
    * Gates outside training are the mean over the controller's draws, as weights are scaled after dropout: the most likely
      choice is arbitrary while nothing is learned, and jumps. Both are one where the controller has converged. (MovieLens-1M,
      DLRM, after 2,238 controller steps: validation log loss .510 with the mean, .520 with the most likely choice, .550 with
      all blocks.)
    * A plan keeps its budget, by an exact allocation (:meth:`NisSearch.embsearch_derive`). The paper's rule, the most likely
      choice, which may overshoot, is ``derive(strict=False)``.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.algorithms.parts.block_choices import BlockChoices
from embsearch_plugin.algorithms.parts.controller import Controller
from embsearch_plugin.algorithms.parts.embedding_blocks import Mode
from embsearch_plugin.algorithms.parts.quality import Quality, number, one_class, quality_of
from embsearch_plugin.algorithms.parts.scoring import losses
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import Fold
from embsearch_plugin.errors import NonFiniteLoss, QualityError, SettingsError
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, above, at_least
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.ranges import Range, Ranges
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.supernet.forms import Form, Projection

if TYPE_CHECKING:
    from embsearch_plugin.search.objective import Outcome
    from embsearch_plugin.search.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Nis(SearchConfig):
    """Settings of NIS.

    Args:
        mode: ``"se"``, single-size embeddings, or ``"me"``, multi-size ones.
        quality: R_Q, of the examples that share a choice: ``"auc"``, ``"recall@1"`` (any number; logits must be (B, 1 +
            negatives), the positive first), ``"mse"`` (negative), or a function (logits, labels) -> a number, higher being
            better. Groups of one class have no AUC and are skipped.
        penalty: lambda, how much R_Q must gain to be worth going over the budget by once the budget.
        lr: learning rate of Adagrad, for the controller and its baseline.
        group: validation examples that share a choice. A whole batch shares one where its examples share looked-up bags, as of
            common negatives. In a batch larger than any before, groups share choices in turn.
        score_batches: validation batches on which ``derive`` scores every candidate; in a recipe that ranks items they are of
            ``group`` examples.
    """

    name: ClassVar[str] = "nis"
    limits: ClassVar[Limits] = {
        "penalty": at_least(0),
        "lr": above(0),
        "group": at_least(1),
        "score_batches": at_least(1),
    }
    ranges: ClassVar[Ranges] = {
        "mode": ("se", "me"),
        "penalty": Range(1e-3, 1.0, log=True),
        "lr": Range(0.01, 1.0, log=True),
        "warm_up": Range(10, 1000, log=True),
    }
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
            raise SettingsError(f"mode must be 'se' or 'me'; got {self.mode!r}")
        quality_of(self.quality)

    @property
    def search_batch(self) -> int | None:
        """One group where items are ranked: examples share the batch's negatives, and so the choice that these are gated by."""
        return self.group if str(self.quality).startswith("recall@") else None

    @property
    def searches_within_budget(self) -> bool:
        """The reward depends on the budget."""
        return True

    def space(self, given: SearchSpace | None) -> SearchSpace:
        """Return five equal row blocks by four equal column chunks (4.1.3), where the user asked for no others.

        Fewer, where a table is too small for the space's ``min_block_rows`` or too narrow for its ``align``; chunks that are
        not quite equal, where its width cannot be cut into four.
        """
        others = given or SearchSpace()
        rows = (0.2,) * 5 if others.row_blocks is None else others.row_blocks
        columns = (0.25,) * 4 if others.column_chunks is None else others.column_chunks
        return replace(others, row_blocks=rows, column_chunks=columns)

    def form(self, table: Table, space: SearchSpace) -> Form:
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
        self.groups = 0  # of the largest validation batch until now
        self.skipped = 0  # groups of one class until now
        self._known: tuple[object, BlockChoices] | None = None

    @hookimpl
    def embsearch_search_start(self, session: "Session") -> None:
        """All arms are equally likely (4.1.3)."""
        self.controller = Controller(self._choices(session).arms, self.config.lr, session.gates[0].device)
        self.generator.manual_seed(session.seed)

    @hookimpl
    def embsearch_before_forward(self, session: "Session") -> None:
        """Draw the choice of a mini-batch; until the warm-up is over all blocks train."""
        if self.controller is not None:
            (drawn,) = self.controller.draw(1, self.generator)
            choices = self._choices(session)
            session.use_gates(choices.gates(choices.heights(drawn)))

    @hookimpl
    def embsearch_search_step(self, session: "Session", batch: Any) -> Mapping[str, float]:
        """Draw a choice for each group of examples, and learn from their rewards."""
        assert self.controller is not None
        choices, config = self._choices(session), self.config
        self.groups = self.groups or session.probe.groups_in(batch, config.group)
        drawn = self.controller.draw(self.groups, self.generator)
        heights = choices.heights(drawn)
        outcome = session.probe.evaluate(batch, choices.gates(heights), config.group)
        groups = self.groups
        self.groups = max(groups, session.probe.groups_of(outcome, config.group))
        limit = max(session.budget.limit(session.original_bytes), 1)  # a share of tiny tables may be less than a byte
        cost = choices.cost(heights, session.budget.unit) / limit
        quality = self._qualities(outcome, groups).to(drawn.device)
        told, reward = ~quality.isnan(), quality - config.penalty * (cost - 1).clamp(min=0)
        self.controller.learn(drawn[told], reward[told])
        session.set_gates(choices.mean_gates(self.controller.probabilities()))
        return self._summary(outcome, reward[told], cost)

    @hookimpl
    def embsearch_derive(self, session: "Session", budget: Budget | None) -> SizePlan:
        """Choose the arms that are worth most within the budget; the most likely ones where none is kept.

        An arm's worth is the validation loss on the shared weights, negative, where its choice takes it and all others are at
        the mean of what the controller draws (the gates of evaluation). Worths of different choices, and so those of one
        table's column chunks, are taken to add up. Probabilities are no worths: they say little of what was hardly drawn.
        """
        assert self.controller is not None
        choices = self._choices(session)
        if budget is None:
            chosen = self.controller.most_likely()
        else:
            reference = choices.mean_gates(self.controller.probabilities())
            scores = losses(session, reference, list(choices.alternatives(reference)), self.config.score_batches)
            worths, in_order = [-loss for loss in scores], [table.blocks.in_order for table in session.tables]
            chosen = choices.best(worths, budget.limit(session.original_bytes), budget.unit, in_order)
        by_table = zip(choices.tables, choices.heights(chosen), session.tables, strict=True)
        plans = [blocks.plan(heights.cpu(), table.blocks) for blocks, heights, table in by_table]
        return SizePlan(tuple(plans), session.space.align)

    @hookimpl
    def embsearch_fold(self, session: "Session", plan: SizePlan) -> Sequence[Fold]:
        """Say where the projections went."""
        return [_fold(session.form(index), table) for index, table in enumerate(plan.tables)]

    def _choices(self, session: "Session") -> BlockChoices:
        """Return what there is to choose; made anew where blocks have other sizes, or the model is elsewhere."""
        cut = session.gates[0].device, [table.blocks.sizes for table in session.tables]
        if self._known is None or self._known[0] != cut:
            self._known = cut, BlockChoices.of(session, self.config.mode)
        return self._known[1]

    def _qualities(self, outcome: "Outcome", groups: int) -> Tensor:
        """Return R_Q of the examples that share a choice, (N,); NaN where there are none, or they have no AUC."""
        loss = float(outcome.loss.detach())
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the validation loss must be a number; got {loss}. The controller is as before.")
        logits, labels, config = outcome.logits.detach(), outcome.labels.detach(), self.config
        if logits.shape[:1] != labels.shape[:1]:
            got = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
            raise QualityError(f"the model must return logits and labels of the same examples; got {got}. Try objective=.")
        if missing := int(logits.isnan().sum()):
            raise QualityError(
                f"the logits must be numbers; of {logits.numel()}, {missing} are NaN. The controller is as before.\n  Possible "
                "solution: look for NaN in the data, or in what objective= returns."
            )
        group = (torch.arange(len(logits), device=logits.device) // config.group) % groups
        measure, found = quality_of(config.quality), [math.nan] * groups
        for index in group.unique().tolist():
            mine = group == index
            if config.quality == "auc" and one_class(labels[mine]):
                self.skipped += 1
            else:
                found[index] = number(config.quality, measure(logits[mine], labels[mine]))
        return torch.tensor(found)

    def _summary(self, outcome: "Outcome", reward: Tensor, cost: Tensor) -> Mapping[str, float]:
        assert self.controller is not None
        if not len(reward):
            if not self.controller.updates:
                log.warning("no group of validation examples had both classes yet, so nothing is learned; use a larger group=")
            return {}
        return {
            "loss": float(outcome.loss.detach()),
            "reward": float(reward.mean()),
            "cost_per_budget": float(cost.mean()),
            "certainty": float(self.controller.probabilities().amax(1).mean()),
            "skipped_groups": float(self.skipped),
        }

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
    """Return the projection's rows in the order of the plan's columns; without one, it is multiplied into the table's rows.

    A plan that keeps columns without a projection, as those of other algorithms do, means columns of what is projected.
    """
    assert isinstance(form, Projection)
    projection, columns = form.weight.detach(), list(plan.columns or range(plan.table.dim))
    return Fold(projection=projection[columns]) if plan.projection else Fold(rotation=projection[:, columns])


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[SearchConfig]]:
    """Register NIS."""
    return [Nis]
