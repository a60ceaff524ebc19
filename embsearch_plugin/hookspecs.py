"""Every hook: when it runs, with what, what is returned, and who may implement it.

An implementation is a function (or a method of a plugin object) of the same name, marked with :data:`hookimpl`. It may
take fewer arguments than the hook offers. The classes are protocols only so that a specification needs no body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from embsearch_plugin.algorithms.base import AlgorithmConfig
    from embsearch_plugin.budget import Budget
    from embsearch_plugin.collection import FoundCollection
    from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
    from embsearch_plugin.compact.fold import Fold
    from embsearch_plugin.plan import SizePlan, TablePlan
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.supernet.forms import Form
    from embsearch_plugin.supernet.searchable import SearchableEmbeddingBagCollection

PROJECT = "embsearch"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class GlobalHooks(Protocol):
    """Hooks of the whole process, for built-in plugins and packages with an entry point in the group ``embsearch``."""

    @hookspec
    def embsearch_register_algorithms(self) -> Sequence[type[AlgorithmConfig]]:
        """Name algorithms. Runs once per process, when an algorithm is first asked for by name. For anyone.

        Return config classes; each has a ``name`` of its own and builds its algorithm.
        """

    @hookspec
    def embsearch_find_collections(self, model: nn.Module) -> Sequence[FoundCollection]:
        """Find the collections in ``model`` that an adapter can search. Runs when a model is prepared or rewritten.

        For adapters. Must not change the model. Raise ``UnsupportedCollection`` for one that is recognised but cannot
        be searched. Two collections that hold the same table are an error.
        """

    @hookspec
    def embsearch_build_supernet(
        self, collection: FoundCollection, forms: Sequence[Form]
    ) -> SearchableEmbeddingBagCollection | None:
        """Build the searchable form of a collection. Runs once per collection, when a model is prepared.

        For the adapter that found it; every other adapter returns ``None``. ``forms`` are what the algorithm wants to
        follow the lookup of each table, or empty. The result keeps the collection's own parameters, unless forms look up
        other widths.
        """

    @hookspec
    def embsearch_build_compact(
        self, collection: FoundCollection, plan: Sequence[TablePlan]
    ) -> CompactEmbeddingBagCollection | None:
        """Build the compact form of a collection, its weights not yet filled in. Runs when a plan is applied.

        For the adapter that found it; every other adapter returns ``None``.
        """

    @hookspec
    def embsearch_report_rows(self, plan: SizePlan) -> Mapping[str, str]:
        """Add rows, label to text, to the report of a run. Runs when a report is written. For anyone."""

    @hookspec
    def embsearch_register_observers(self, session: Session) -> Sequence[object]:
        """Return plugin objects that are to watch ``session``. Runs when a session starts. For anyone."""


class SessionHooks(Protocol):
    """Hooks of one search. The algorithm is a plugin like the observers beside it, and answers first."""

    @hookspec
    def embsearch_search_start(self, session: Session) -> None:
        """The rows are ranked and cut for the first time; gates are at one. Once, before the first search step."""

    @hookspec
    def embsearch_before_forward(self, session: Session, step: int) -> None:
        """A training forward is about to run; ``step`` weight steps were taken.

        An algorithm may write gates here: for good by ``session.set_gates``, or for this forward by ``session.use_gates``.
        Where a loop calls a part of the model instead, this is called before the first lookup of each step.
        """

    @hookspec(firstresult=True)
    def embsearch_search_step(self, session: Session, step: int, batch: Any) -> Mapping[str, float]:
        """Take one search step on a validation batch and return its metrics. For the algorithm.

        Must write gates through ``session.set_gates``, or leave out single weights by ``session.keep_weights``, and touch
        nothing else of the model.
        """

    @hookspec
    def embsearch_after_step(self, session: Session, step: int, metrics: Mapping[str, float]) -> None:
        """A search step that has metrics was taken after weight step ``step``. For observers."""

    @hookspec(firstresult=True)
    def embsearch_derive(self, session: Session, budget: Budget | None) -> SizePlan:
        """Turn what was learned into a plan within ``budget``; ``None`` asks for the paper's own rule.

        For the algorithm. Must change nothing: not the model, not the algorithm's state.
        """

    @hookspec(firstresult=True)
    def embsearch_fold(self, session: Session, plan: SizePlan) -> Sequence[Fold] | None:
        """Say what the columns that ``plan`` stores are, per table. Runs when the model is compacted.

        For an algorithm whose tables have forms, or whose plans have projections; without it the stored columns are the
        plan's own, and projections start as the identity. Must change nothing.
        """

    @hookspec
    def embsearch_plan_changed(self, session: Session, step: int, previous: SizePlan | None, current: SizePlan) -> None:
        """``derive`` gave another plan than the last time. For observers."""

    @hookspec
    def embsearch_validation_end(self, session: Session, step: int, metrics: Mapping[str, float]) -> None:
        """The owner of the loop validated the model and reported it by ``session.validated``. For anyone."""

    @hookspec
    def embsearch_search_end(self, session: Session, plan: SizePlan) -> None:
        """The model was rewritten as ``plan`` says; the session is over. For observers."""

    @hookspec
    def embsearch_exception(self, session: Session, error: Exception) -> None:
        """A search step failed; ``error`` is raised next. For observers."""
