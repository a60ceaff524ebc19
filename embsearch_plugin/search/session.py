"""Session: one search on one model."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, cast

import pluggy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from embsearch_plugin import distributed
from embsearch_plugin.algorithms.base import Algorithm, SearchConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.compact.rewrite import rewrite
from embsearch_plugin.errors import AttachError, PlanError, SessionError
from embsearch_plugin.hookspecs import PROJECT, SessionHooks
from embsearch_plugin.lookup.tracing import is_traced
from embsearch_plugin.optimizers import check_hook_fires, exchange, join, takers_of_dense
from embsearch_plugin.plan import SizePlan, mismatch
from embsearch_plugin.plugins import manager
from embsearch_plugin.randomness import private_random
from embsearch_plugin.search.frequencies import Frequencies, Ranking, check_frequencies
from embsearch_plugin.search.objective import Objective, move, train_task
from embsearch_plugin.search.probe import Probe
from embsearch_plugin.search.tables import SearchedTables, SearchTable
from embsearch_plugin.search.validation import ValidationStream
from embsearch_plugin.search.weight_steps import WeightSteps
from embsearch_plugin.space import RowBlocks, SearchSpace
from embsearch_plugin.supernet.forms import Form
from embsearch_plugin.supernet.searchable import TooSmallBatch

log = logging.getLogger(__name__)
ATTRIBUTE = "_embsearch_session"  # where a model keeps its session
SEARCHED_BY = "_embsearch_searched_by"  # and where its collections do


class Session:
    """One search on one model. Made by :func:`embsearch_plugin.prepare`, which documents the arguments, or the decorator.

    Attributes:
        model: the model.
        config, budget, space: what was asked for.
        seed: of the random numbers that the search draws.
        algorithm: the plugin that searches.
        step_count: weight steps since ``attach``, and those between steps by hand where none is attached.
        search_steps: search steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: SearchConfig,
        budget: Budget,
        space: SearchSpace | None = None,
        objective: Objective = train_task,
        frequencies: Frequencies | None = None,
        fused: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.config, self.budget, self.space = model, algorithm, budget, algorithm.space(space)
        self.step_count = self.search_steps = 0
        self.algorithm: Algorithm = algorithm.build()
        self.seed = seed
        self._observers = [o for some in manager().hook.embsearch_register_observers(session=self) for o in some]
        self._plugins = _plugins_of(self.algorithm, self._observers)  # before the model is touched: it may fail
        # None once the search is over
        self._searched: SearchedTables | None
        form = partial(algorithm.form, space=self.space)
        with private_random(seed):  # of which forms draw their parameters
            check = partial(self._check, frequencies)
            self._searched = SearchedTables(model, self.space, fused, form, check=check, folds_gates=algorithm.folds_gates)
        self._probe: Probe | None = Probe(
            model,
            self._searched,
            objective,
            seed,
            search_steps=lambda: self.search_steps,
            train_batch=self._next_train_batch,
        )
        self._ranking = Ranking(self._tables, self.space, frequencies, self._probe.look_up, seed)
        model.__dict__[ATTRIBUTE] = self
        self._pre_hooks = [model.register_forward_pre_hook(_before_forward, with_kwargs=True)]
        for supernet in self._searched.supernets:
            supernet.__dict__[SEARCHED_BY] = self
            self._pre_hooks.append(supernet.register_forward_pre_hook(_before_lookup))
        self._optimizers: list[Optimizer] = []
        self._weight_steps = WeightSteps(self._forwards, self._after_weight_step)
        self._announced = False  # whether plugins were told of a weight forward since the last step
        self._validation: ValidationStream | None = None
        self._training: ValidationStream | None = None
        self._train_batch: Any = None
        self._started = False  # whether the algorithm was told that the search starts
        self._last_plan: SizePlan | None = None

    def _check(self, frequencies: Frequencies | None, tables: Sequence[Table]) -> None:
        """Make sure that these tables can be searched as asked: a later error would leave the model changed."""
        self.config.check(tables, self.space)
        check_frequencies(frequencies, tables)

    # What algorithms and observers read and write.

    @property
    def probe(self) -> Probe:
        """Runs the model for the search, under any gates, and leaves no trace in it."""
        self._check_not_over()
        assert self._probe is not None
        return self._probe

    @property
    def specs(self) -> list[Table]:
        """The original tables, over all collections."""
        return self._tables.specs

    @property
    def tables(self) -> list[SearchTable]:
        """The tables and how their rows are cut; known from the first search step on, and a SessionError before it."""
        if self._tables.blocks is None:
            raise SessionError(
                f"rows are ranked after {self.config.first_search_step} weight steps; {self.step_count} were taken."
            )
        return [SearchTable(s, b) for s, b in zip(self._tables.specs, self._tables.blocks, strict=True)]

    @property
    def gates(self) -> list[Tensor]:
        """The gates of the next weight steps, per table float32 (S, C); C is the table's width, or what its form weighs."""
        return self._tables.gates

    @property
    def original_bytes(self) -> int:
        """Weight bytes of the original tables."""
        return self._tables.original_bytes

    def set_gates(self, gates: Sequence[Tensor]) -> None:
        """Write the gates of the next weight steps, and of evaluation, per table (S, C)."""
        self._tables.set_gates(gates)

    def use_gates(self, gates: Sequence[Tensor] | None, group: int = 1) -> None:
        """Use other gates in training forwards until told otherwise; ``None`` for those that were written.

        Args:
            gates: per table (S, C), or (N, S, C) with gates for each group of examples: example b reads those of group
                ``b // group`` modulo N. They may carry a graph: then ``loss.backward()`` of the loop reaches what they
                are made of.
            group: how many examples share gates.
        """
        self._tables.use_gates(gates, group)

    def keep_weights(self, kept: Sequence[Tensor]) -> None:
        """Let only these single weights take part from now on, per table bool (V, W); the others are zero, and do not train.

        Raises:
            UnsupportedCollection: where tables are fused or sharded.
        """
        self._tables.keep_weights(kept)

    def form(self, table: int) -> Form:
        """Return what follows a table's lookup, as the config's ``form`` made it."""
        return self._tables.form(table)

    def merged_weight(self, table: int) -> Tensor:
        """Return a table's weights times the gates that are part of them, float32 (V, W): before its form, if it has one."""
        return self._tables.merged_weight(table)

    @property
    def frequencies(self) -> list[Tensor]:
        """How often each row occurred, per table (V,): as given, or as counted until now, over all processes."""
        return self._ranking.counts()

    def block_energy(self, table: int) -> Tensor:
        """Return the sum of squares of the merged weights, per row block and column: float64 (S, W)."""
        return self._tables.block_energy(table)

    def validation_batches(self, count: int) -> list[Any]:
        """Return the validation loader's first ``count`` batches, or all it has; search steps do not miss them.

        Raises:
            SessionError: where no loader was attached.
            AttachError: where it is empty.
        """
        self._check_not_over()
        if self._validation is None:
            raise SessionError(f"{self.config.name} needs validation batches here: attach(optimizer, validation=...) first.")
        return [move(batch, self._tables.device) for batch in self._validation.first(count)]

    # The loop.

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        validation: Iterable[Any],
        training: Iterable[Any] | None = None,
    ) -> None:
        """Let a search step follow ``optimizer.step()``.

        Args:
            optimizer: the loop's optimizer, or several: a search step follows when each of them has stepped.
            validation: a loader of batches as the model takes them; starts anew when it ends.
            training: batches for the virtual step of second-order gradients, where the model is not called with the
                batch itself; by default the batch of the last training forward.

        Raises:
            AttachError: where a step hook cannot fire, a loader is an iterator, or no optimizer takes what the search added.
        """
        self._check_not_over()
        optimizers = list(dict.fromkeys(optimizer)) if isinstance(optimizer, Sequence) else [optimizer]
        if self._weight_steps.attached:
            raise AttachError("this session is attached already; call detach() first.")
        for each in optimizers:
            check_hook_fires(each)
        self._validation = ValidationStream(validation, self.seed)
        self._training = None if training is None else ValidationStream(training, self.seed)
        self._optimizers = optimizers
        self._train_forms()  # which may refuse them
        self._weight_steps.attach(optimizers)

    def _train_forms(self) -> None:
        """Let the optimizers train what the search added to the model, where they were made before."""
        held = {id(p) for each in self._optimizers for group in each.param_groups for p in group["params"]}
        tables = [(original, table) for original, table in self._tables.added_tables() if id(table) not in held]
        forms = [parameter for parameter in self._tables.form_parameters() if id(parameter) not in held]
        dense = takers_of_dense(self._optimizers)
        if forms and not dense:
            raise AttachError(
                "what the search adds has dense gradients and any shape, and no attached optimizer takes that (SparseAdam and "
                "RowWiseAdagrad do not).\n"
                "  Possible solution: attach the optimizer of the other layers too: attach([sparse, dense], ...)."
            )
        for original, table in tables:
            if not any(exchange(optimizer, original, [table]) for optimizer in self._optimizers):
                join(self._optimizers[0], [table])
        if forms:
            join(dense[0], forms)
        if tables or forms:
            added = len(tables) + len(forms)
            log.info("the optimizer was made before the search: %d parameters of the search were added to it", added)

    def detach(self) -> None:
        """Take no more search steps by themselves; ``attach`` may be called again.

        The optimizers are remembered: ``compact`` rewrites their state.
        """
        self._weight_steps.detach()

    def register(self, observer: object) -> None:
        """Add an observer: an object with hooks of :class:`embsearch_plugin.hookspecs.SessionHooks`.

        Raises:
            SessionError: where it has a hook that does not exist, or asks one for what it does not offer.
        """
        self._plugins = _plugins_of(self.algorithm, [*self._observers, observer])
        self._observers.append(observer)

    def step(self, batch: Any) -> Mapping[str, float]:
        """Take one search step by hand on a validation batch; return its metrics.

        Where no optimizer is attached, what the loop did since the last one counts as one weight step.

        Raises:
            AttachError: where the batch has too few examples.
            SessionError: where nothing was trained yet, so that rows cannot be ranked; or the search is over.
        """
        self._check_not_over()
        if not self._weight_steps.attached and self._weight_steps.advance():
            self._count_weight_step()
        return self._search_step(lambda: batch, tries=1)

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Tell the algorithm and the observers what a validation of the model gave."""
        self._plugins.hook.embsearch_validation_end(session=self, step=self.step_count, metrics=metrics)

    def _forwards(self) -> int:
        return self._tables.forwards()

    def _after_weight_step(self) -> None:
        self._count_weight_step()
        since = self.step_count - self.config.warm_up
        if since >= 0 and since % self.config.every == 0:
            assert self._validation is not None
            self._search_step(self._validation.next)

    def _count_weight_step(self) -> None:
        self._announced = False
        self.step_count += 1

    def _search_step(self, next_batch: Callable[[], Any], tries: int = 1000) -> Mapping[str, float]:
        try:
            self._rank()
            metrics = self._on_first_usable(next_batch, tries)
        except Exception as error:
            self._plugins.hook.embsearch_exception(session=self, error=error)
            raise
        self.search_steps += 1
        if metrics:
            self._plugins.hook.embsearch_after_step(session=self, step=self.step_count, metrics=metrics)
        return metrics

    def _rank(self) -> None:
        self._ranking.rank(max(self.step_count, self.search_steps))
        if not self._started:
            self._plugins.hook.embsearch_search_start(session=self)
            self._started = True

    def _on_first_usable(self, next_batch: Callable[[], Any], tries: int) -> Mapping[str, float]:
        """Take a search step on the first batch with enough examples (two, where the model has batch norm).

        No batch is drawn for an algorithm whose step takes none.
        """
        search_step = self._plugins.hook.embsearch_search_step
        if not any("batch" in implementation.argnames for implementation in search_step.get_hookimpls()):
            return cast(Mapping[str, float], search_step(session=self, step=self.step_count, batch=None))
        smallest = 2 if _has_batch_norm(self.model) else 1
        for _ in range(tries):
            batch = move(next_batch(), self._tables.device)
            try:
                with self._tables.at_least(smallest):
                    return cast(Mapping[str, float], search_step(session=self, step=self.step_count, batch=batch))
            except TooSmallBatch:
                log.info("skipped a validation batch of fewer than %d examples", smallest)
        what = f"{tries} in turn were" if tries > 1 else "this one is"
        raise AttachError(f"a search step needs a validation batch of at least {smallest} examples; {what} smaller.")

    # Forward passes.

    def _weight_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to be run by its owner."""
        if not self.probe.running and self.model.training and torch.is_grad_enabled():
            self._train_batch = args[0] if len(args) == 1 and not kwargs else None
            self._announce()

    def _weight_lookup(self, supernet: nn.Module) -> None:
        """A collection is about to be run: the model's owner may call a part of the model, and not the model itself.

        Then the first lookup of each step counts as the model's forward: others may belong to it, or repeat a part of it for a
        checkpoint.
        """
        if not self._announced and not self.probe.running and supernet.training and torch.is_grad_enabled():
            self._announce()

    def _announce(self) -> None:
        self._announced = True
        self._plugins.hook.embsearch_before_forward(session=self, step=self.step_count)

    def _next_train_batch(self) -> Any:
        """Return the batch of a virtual weight step."""
        if self._training is not None:
            return move(self._training.next(), self._tables.device)
        if self._train_batch is None:
            raise SessionError(
                "second-order gradients need a training batch, and the model was not called with just a batch.\n"
                "  Possible solutions: 1) attach(..., training=train_loader)  2) first order (xi=0)."
            )
        return self._train_batch

    # The result.

    def derive(self, budget: Budget | str | None = None, *, strict: bool = True) -> SizePlan:
        """Turn what was learned so far into a plan; changes nothing, and may be called again with other budgets.

        An algorithm for which one search step says it all (``spectral``, one-shot ``magnitude``, sizes that are known before
        any training) takes it here, where none was taken yet.

        Args:
            budget: the ceiling; by default the session's.
            strict: keep the budget, to the byte. Otherwise the paper's own rule decides, and the size is what it gives; then no
                budget is taken.

        Raises:
            SessionError: before the first search step, and for a budget that would not be kept.
            BudgetError: where no plan fits.
            AllocationError: where weights are no numbers, or no allocation was found.
            NonFiniteLoss: where a candidate's loss on the shared weights is no number.
        """
        self._tables.check_dtypes()
        if budget is not None and not strict:
            raise SessionError(f"derive(strict=False) keeps no budget; leave out {budget!r}, or strict=False.")
        self._take_only_step()
        if not self.search_steps:
            raise SessionError(
                f"derive needs at least one search step; {self.step_count} weight steps were taken, and the first search step "
                f"follows {self.config.first_search_step}.\n  Possible solutions: 1) attach(optimizer, "
                "validation=...) before the loop  2) train longer  3) a smaller warm_up, or every."
            )
        ceiling = (self.budget if budget is None else Budget.of(budget)) if strict else None
        plan = cast(SizePlan, self._plugins.hook.embsearch_derive(session=self, budget=ceiling))
        if self._last_plan is None or plan.to_json() != self._last_plan.to_json():
            previous, self._last_plan = self._last_plan, plan
            self._plugins.hook.embsearch_plan_changed(session=self, step=self.step_count, previous=previous, current=plan)
        return plan

    def _take_only_step(self) -> None:
        """Take the search step of an algorithm for which one says it all, where none was taken yet."""
        if not self.search_steps and not self.config.trains and self._validation is not None:
            self._search_step(self._validation.next)

    def folds(self, plan: SizePlan) -> Sequence[Fold]:
        """Return, per table, what the columns that ``plan`` stores are in the searched model, and what follows them."""
        if any(table.projection for table in plan.tables):  # which is made of what was learned
            self._take_only_step()
        folds: Sequence[Fold] | None = self._plugins.hook.embsearch_fold(session=self, plan=plan)
        return [UNFOLDED] * len(plan.tables) if folds is None else folds

    def compact(self, plan: SizePlan, optimizer: Optimizer | Sequence[Optimizer] = ()) -> nn.Module:
        """Rewrite the model in place with compact tables, and the optimizers' state with them; return the model.

        The model then computes what it computed with the gates under the plan, and nothing of the search is left in it. The
        session is over. What holds the old tables must be made anew: a DDP wrapper around the model, a TorchRec wrapper
        (KeyedOptimizerWrapper) around an optimizer.

        Args:
            plan: of this model.
            optimizer: further optimizers that hold tables, besides those that were attached.

        Raises:
            PlanError: where the plan is for another model.
            SessionError: where the model is sharded, or was rewritten already.
        """
        self._tables.check_dtypes()
        if [p.table for p in plan.tables] != self._tables.specs:
            raise PlanError(mismatch(self._tables.specs, plan))
        if torch.is_inference_mode_enabled():
            raise SessionError("compact makes new parameters, which could not be trained if made in inference mode.")
        if not all(supernet.is_local for supernet in self._tables.supernets):
            raise SessionError(
                "a sharded model cannot be rewritten in place.\n  Possible solution: plan = session.derive() on every rank, "
                "then es.apply(build_model.original(), plan), then DistributedModelParallel again."
            )
        for supernet in self._tables.supernets:
            supernet.fuse()  # where no forward has run yet
        more = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        self._tables.remove_pruned()
        orphans = rewrite(self.model, self._tables, plan, self.folds(plan), list(dict.fromkeys([*self._optimizers, *more])))
        if orphans:
            log.warning(
                "no optimizer holds the compact tables of %s: pass theirs to compact(plan, optimizer), or make a new one",
                ", ".join(orphans),
            )
        if distributed.world_size() > 1:
            log.warning("the model has new parameters: wrap it in DistributedDataParallel anew")
        try:
            self._plugins.hook.embsearch_search_end(session=self, plan=plan)
        finally:  # whatever an observer raises, the model is compact
            self._leave()
        return self.model

    def _leave(self) -> None:
        """Remove what is left of the search in the model, and let go of the old tables."""
        self.detach()
        for handle in self._pre_hooks:
            handle.remove()
        self.model.__dict__.pop(ATTRIBUTE, None)
        self._searched = self._probe = self._train_batch = self._validation = self._training = None
        self._optimizers = []
        del self._ranking

    def _check_not_over(self) -> SearchedTables:
        if self._searched is None:
            raise SessionError("this search is over: its model was compacted. Search a model built anew.")
        return self._searched

    @property
    def _tables(self) -> SearchedTables:
        """The searched tables; an error where the search is over."""
        return self._check_not_over()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return what a search needs to go on in a new process: tensors and plain values only."""
        blocks = self._tables.blocks
        return {
            "for": self._fingerprint(),
            "kernels": self._tables.kernel_states(),
            "algorithm": self.algorithm.state_dict(),
            "step_count": self.step_count,
            "search_steps": self.search_steps,
            "ranking": self._ranking.state_dict(),
            "blocks": None if blocks is None else [{"sizes": b.sizes, "order": b.order} for b in blocks],
            "gates": None if blocks is None else self.gates,
            "kept": self._tables.kept,
            "validation": None if self._validation is None else self._validation.state_dict(),
            "training": None if self._training is None else self._training.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; call after ``attach``, so that the loaders take up their places.

        Raises:
            SessionError: where the state is of a search on another model, by another algorithm, or with other settings; nothing
                is changed then.
        """
        there, here = state.get("for", []), self._fingerprint()
        if there != here:
            theirs, ours = ([part for part in one if part not in other] for one, other in ((there, here), (here, there)))
            raise SessionError(
                f"this state is of another search: there {', '.join(theirs[:3])}; here {', '.join(ours[:3])}.\n"
                "  Possible solution: prepare the model as it was prepared when the state was saved."
            )
        self._ranking.check_state(state["ranking"])
        self._tables.load_kernel_states(state["kernels"])
        self.step_count, self.search_steps = state["step_count"], state["search_steps"]
        self._ranking.load_state_dict(state["ranking"])
        if state["blocks"] is not None:
            self._tables.cut([RowBlocks(tuple(b["sizes"]), b["order"]) for b in state["blocks"]])
            self.set_gates(state["gates"])
        self.keep_weights(state.get("kept", []))
        self._started = state["blocks"] is not None
        self.algorithm.load_state_dict(move(state["algorithm"], self._tables.device))
        for name, stream in (("validation", self._validation), ("training", self._training)):
            place = state.get(name)
            if stream is not None and place is not None:
                stream.load_state_dict(place)

    def _fingerprint(self) -> list[str]:
        """Say what is searched, how and where: a state fits only the same."""
        settings = [f"{f.name}={_text_of(getattr(self.config, f.name))}" for f in fields(self.config)]
        tables = [f"{spec} {spec.rows} x {spec.dim} {spec.dtype}" for spec in self.specs]
        return [self.config.name, *settings, repr(self.space), *tables]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A session belongs to one model; a copy of the model has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model has no session either."""
        return (type(None), ())


def _plugins_of(algorithm: Algorithm, observers: Sequence[object]) -> pluggy.PluginManager:
    """Return a manager of one session's plugins, checked; the algorithm is asked first, then observers as they came.

    Raises:
        SessionError: where a plugin implements a hook that does not exist, or the algorithm lacks one it must have.
    """
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(SessionHooks)
    try:
        for plugin in (*reversed(observers), algorithm):  # pluggy calls the last registered first
            plugins.register(plugin)
        plugins.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise SessionError(f"a plugin does not fit a session: {error}") from error
    implemented = {caller.name for caller in plugins.get_hookcallers(algorithm) or ()}
    missing = {"embsearch_search_step", "embsearch_derive"} - implemented
    if missing:
        raise SessionError(f"an algorithm must implement {', '.join(sorted(missing))}; {type(algorithm).__name__} does not.")
    return plugins


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the model's session, if it has one: copies of a model keep this hook but have no session."""
    session = model.__dict__.get(ATTRIBUTE)
    if session is not None and not any(is_traced(each) for each in (*args, *kwargs.values())):
        session._weight_forward(args, kwargs)


def _before_lookup(supernet: nn.Module, args: tuple[Any, ...]) -> None:
    """Tell a collection's session, if it has one, as above."""
    session = supernet.__dict__.get(SEARCHED_BY)
    if session is not None and not any(is_traced(each) for each in args):
        session._weight_lookup(supernet)


def _text_of(value: object) -> str:
    """Return a setting as text that is the same in every process: that of a function would hold its address."""
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
