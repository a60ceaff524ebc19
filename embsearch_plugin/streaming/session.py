"""StreamSession: tables that grow, on one model."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import FoundCollection, Table
from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.errors import AttachError, PlanError, SessionError, UnsupportedCollection
from embsearch_plugin.optimizers import check_hook_fires, join
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.randomness import private_random
from embsearch_plugin.search.objective import Objective, Outcome, evaluating, move, outcome_of, train_task, untouched
from embsearch_plugin.search.session import ATTRIBUTE
from embsearch_plugin.search.validation import ValidationStream
from embsearch_plugin.search.weight_steps import WeightSteps
from embsearch_plugin.streaming.base import StreamAlgorithm, StreamConfig
from embsearch_plugin.streaming.collection import Lookup, StreamingEmbeddingBagCollection
from embsearch_plugin.streaming.serving import fill, plan_of, same_plans
from embsearch_plugin.streaming.table import Ceiling, GrowingTable, cap_in_bytes
from embsearch_plugin.tasks import example_losses

log = logging.getLogger(__name__)


class StreamSession:
    """Tables that grow while a model learns from a stream. Made by :func:`embsearch_plugin.prepare`, or the decorator.

    The loop is anybody's: predict a batch in evaluation mode, then train on it. An id is admitted when it is first trained on.

    Attributes:
        model: the model.
        config: what was asked for.
        seed: of the random numbers drawn.
        algorithm: what decides.
        tables: the growing tables, over all collections.
        step_count: weight steps since ``attach``, and those between steps by hand where none is attached.
    """

    def __init__(
        self, model: nn.Module, config: StreamConfig, cap: Budget | None, objective: Objective = train_task, seed: int = 0
    ) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.step_count = self.search_steps = 0
        self.algorithm: StreamAlgorithm = config.build()
        self._objective = objective
        self._found = _collections_of(model)
        specs = [table for found in self._found for table in found.tables]
        self._ceiling = Ceiling(None if cap is None else cap_in_bytes(cap, sum(spec.size_bytes for spec in specs)))
        with private_random(seed):  # of which forms draw their parameters
            self.tables = [self._table(spec, number) for number, spec in enumerate(specs)]
        self._originals = [ref(weight) for found in self._found for weight in found.module.parameters()]
        self._collections = [self._put_in_place(found) for found in self._found]
        # The original tables are let go of, and their memory with them.
        self._found = [replace(f, module=new) for f, new in zip(self._found, self._collections, strict=True)]
        self._handles = [model.register_forward_hook(_after_forward)]
        self._past: ValidationStream | None = None
        self._weight_steps = WeightSteps(self._forwards, self._after_weight_step)
        self._inside = False
        model.__dict__[ATTRIBUTE] = self
        self.algorithm.start(self)

    def _table(self, spec: Table, number: int) -> GrowingTable:
        config = self.config
        return GrowingTable(
            spec,
            config.row_form(spec),
            config.row_optimizer,
            config.init_std,
            self.seed * 1_000_003 + number,
            self._ceiling,
            config.extras(spec),
        )

    def _put_in_place(self, found: FoundCollection) -> StreamingEmbeddingBagCollection:
        original = cast(EmbeddingBagCollection, found.module)
        tables = [next(table for table in self.tables if table.spec is spec) for spec in found.tables]
        collection = StreamingEmbeddingBagCollection(original.embedding_bag_configs(), tables, original.is_weighted())
        collection.growth = self.algorithm.grows
        device = next(original.parameters()).device
        found.replace_in(self.model, collection.train(original.training))
        return collection if device.type == "meta" else collection.to(device)

    # What is there.

    @property
    def specs(self) -> list[Table]:
        """The original tables, over all collections."""
        return [table.spec for table in self.tables]

    @property
    def used_bytes(self) -> int:
        """Bytes of rows, their optimizer's state, ids, and all else that is kept per id."""
        return sum(table.used_bytes for table in self.tables)

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory that this takes, with room to grow."""
        return sum(table.held_bytes for table in self.tables)

    @property
    def stopped(self) -> bool:
        """Whether the cap has refused an id or a wider row."""
        return self._ceiling.stopped

    @property
    def knows_losses(self) -> bool:
        """Whether examples' losses can be read off what the model returns; not so where an objective is given."""
        return self._objective is train_task

    @property
    def lookups(self) -> list[Lookup]:
        """What the last forward pass looked up, per table."""
        return [lookup for collection in self._collections for lookup in collection.lookups]

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Outcome:
        """Run the objective; leaves no trace."""
        with self._own_forward(searching=False):
            return outcome_of(self._objective, self.model, move(batch, self._device))

    def gradients(self, batch: Any, leaves: Callable[[], Sequence[Tensor]]) -> tuple[float, Sequence[Tensor]]:
        """Return the loss on a batch, and its gradients with respect to what the weights of a mixture are made of.

        Args:
            batch: of the past.
            leaves: asked after the forward pass, which may make them.
        """
        with self._own_forward(searching=True), torch.enable_grad():
            loss = outcome_of(self._objective, self.model, move(batch, self._device)).loss
            return float(loss.detach()), torch.autograd.grad(loss, leaves())

    @contextmanager
    def _own_forward(self, *, searching: bool) -> Iterator[None]:
        """Within it, forward passes are ours, and buffers and random states are restored afterwards."""
        self._inside = True
        try:
            with ExitStack() as stack:
                for collection in self._collections:
                    stack.enter_context(collection.own_forward(searching=searching))
                stack.enter_context(untouched(self.model, (), self.seed * 1_000_003 + self.search_steps))
                yield
        finally:
            self._inside = False

    @property
    def _device(self) -> torch.device:
        return self._collections[0].device

    # The loop.

    def attach(self, optimizer: Optimizer | Sequence[Optimizer], validation: Iterable[Any] | None = None) -> None:
        """Let a search step follow ``optimizer.step()``; have the optimizer train what the session added to the model.

        Args:
            optimizer: the loop's optimizer, or several: a search step follows when each of them has stepped.
            validation: batches of the past: one is taken for each search step, and it is iterated anew when it ends, so an
                iterable whose only batch is drawn from the past gives another one each time.

        Raises:
            AttachError: where a step hook cannot fire, an optimizer trains the tables that growing ones replaced, or the
                algorithm learns from past batches and none are given.
        """
        self._check_not_over()
        optimizers = list(dict.fromkeys(optimizer)) if isinstance(optimizer, Sequence) else [optimizer]
        if self._weight_steps.attached:
            raise AttachError("this session is attached already; call detach() first.")
        for each in optimizers:
            check_hook_fires(each)
        if self.algorithm.searches and validation is None:
            raise AttachError(
                f"{self.config.name} learns from batches of the past: attach(optimizer, validation=...).\n  Possible solution: "
                "an iterable of batches that were seen."
            )
        trained = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        held = {id(p) for p in trained}
        if any(id(original()) in held for original in self._originals):
            raise AttachError(
                "an optimizer holds the weights of the original tables, which growing tables have replaced.\n"
                "  Possible solution: make the optimizer after the model was prepared."
            )
        if validation is not None and self.algorithm.searches:
            self._past = ValidationStream(validation, self.seed)
        added = [p for table in self.tables for p in table.form.parameters() if id(p) not in held]
        if added:
            join(optimizers[0], added)
        self._weight_steps.attach(optimizers)

    def detach(self) -> None:
        """Take no more search steps; ``attach`` may be called again."""
        self._weight_steps.detach()

    def step(self, batch: Any) -> Mapping[str, float]:
        """Take one search step by hand on a batch of the past; return its metrics.

        Where no optimizer is attached, what the loop did since the last one counts as one weight step.
        """
        self._check_not_over()
        if not self._weight_steps.attached and self._weight_steps.advance():
            self.step_count += 1
        metrics = self.algorithm.search_step(self, batch)
        self.search_steps += 1
        return metrics

    def _forwards(self) -> int:
        return sum(collection.forwards for collection in self._collections)

    def _after_weight_step(self) -> None:
        self.step_count += 1
        since = self.step_count - self.config.warm_up
        if self._past is not None and since >= 0 and since % self.config.every == 0:
            try:
                batch = self._past.next()
            except AttachError:  # nothing is past yet
                return
            self.step(batch)

    def _scored(self, output: Any) -> None:
        """The model was run by its owner: in training, tell the algorithm the examples' losses."""
        ours = self._inside or not (self.model.training and torch.is_grad_enabled())
        if ours or not (self.knows_losses and self.algorithm.searches):
            return
        outcome = outcome_of(lambda model, batch: output, self.model, None)
        losses = example_losses(outcome.logits.detach(), outcome.labels).cpu()
        for table, lookup in zip(self.tables, self.lookups, strict=True):
            self.algorithm.scored(table, lookup, losses)

    # The result.

    def derive(self) -> SizePlan:
        """Return the plan that stores every row as wide as it is now; changes nothing. Ids that never came have no row.

        Raises:
            SessionError: where ids came that a table has no rows for.
        """
        self._check_not_over()
        return SizePlan(tuple(plan_of(table) for table in self.tables), align=1)

    def compact(self, plan: SizePlan) -> nn.Module:
        """Rewrite the model in place with compact tables, to be served; return it. The session is over.

        It then answers as it does now in evaluation mode. Rows are trained by the loop's optimizer from then on, if at all.

        Raises:
            PlanError: where the plan is not that of ``derive`` now.
        """
        if not same_plans(plan, self.derive()):
            raise PlanError("compact takes the plan of the stream as it is now: compact(session.derive()).")
        with evaluating(self.model):  # mixtures have batch norm, which is folded into their rows
            compacted = self._compacted(plan)
        for found, collection, compact in zip(self._found, self._collections, compacted, strict=True):
            found.replace_in(self.model, compact.to(collection.device).train(collection.training))
        self._leave()
        return self.model

    def _compacted(self, plan: SizePlan) -> list[CompactEmbeddingBagCollection]:
        """Return the compact collections, on the host."""
        made = []
        for found, collection in zip(self._found, self._collections, strict=True):
            plans = [p for p in plan.tables if p.table in found.tables]
            compact = CompactEmbeddingBagCollection(
                collection.embedding_bag_configs(), plans, collection.is_weighted(), torch.device("cpu")
            )
            for number, (each, table) in enumerate(zip(plans, collection.tables, strict=True)):
                fill(compact, number, each, table, collection.device)
            made.append(compact)
        return made

    def _leave(self) -> None:
        self.detach()
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop(ATTRIBUTE, None)

    def _check_not_over(self) -> None:
        if self.model.__dict__.get(ATTRIBUTE) is not self:
            raise SessionError("this stream is over: its model was compacted. Prepare a model built anew.")

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on in a new process: tensors and plain values only. The model has its own."""
        return {
            "for": self._fingerprint(),
            "tables": [table.state_dict() for table in self.tables],
            "algorithm": self.algorithm.state_dict(),
            "step_count": self.step_count,
            "search_steps": self.search_steps,
            "stopped": self._ceiling.stopped,
            "past": None if self._past is None else self._past.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; call after ``attach``, when the past is what it was, so that its batches go on where they were.

        Raises:
            SessionError: where it is of another algorithm, or of other tables.
        """
        if state.get("for") != self._fingerprint():
            raise SessionError(
                f"this state is of a stream by {state.get('for', ['?'])[0]!r} on other tables or with other settings.\n"
                "  Possible solution: prepare the model as it was prepared when the state was saved."
            )
        for table, each in zip(self.tables, state["tables"], strict=True):
            table.load_state_dict(each)
        self.algorithm.load_state_dict(state["algorithm"])
        self.step_count, self.search_steps = state["step_count"], state["search_steps"]
        self._ceiling.stopped = state["stopped"]
        if self._past is not None and state["past"] is not None:
            with suppress(AttachError):  # nothing is past in this process
                self._past.load_state_dict(state["past"])

    def _fingerprint(self) -> list[str]:
        return [self.config.name, repr(self.config), *(f"{spec} x {spec.dim}" for spec in self.specs)]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A session belongs to one model; a copy of the model has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model has no session either."""
        return (type(None), ())


def _collections_of(model: nn.Module) -> list[FoundCollection]:
    """Return the model's collections.

    Raises:
        UnsupportedCollection: where they are not plain ones of float32, or the model is distributed.
    """
    for module in model.modules():
        if isinstance(module, DistributedModelParallel):
            raise UnsupportedCollection(
                "growing tables live in one process, and this model is in DistributedModelParallel.\n"
                "  Possible solution: train the stream without it; the compact model can be sharded."
            )
    found = find_collections(model)
    for each in found:
        for table in each.tables:
            if table.dtype != torch.float32 or not isinstance(each.module, EmbeddingBagCollection):
                raise UnsupportedCollection(
                    f"growing rows are float32, in an EmbeddingBagCollection; table {table} is {table.dtype} in a "
                    f"{type(each.module).__name__}."
                )
    return found


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Tell the model's session, if it has one: copies of a model keep this hook but have no session."""
    session = model.__dict__.get(ATTRIBUTE)
    if isinstance(session, StreamSession):
        session._scored(output)
