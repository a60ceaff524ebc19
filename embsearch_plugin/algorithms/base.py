"""What every algorithm's config shares, and what an algorithm is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

from embsearch_plugin.budget import Budget
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SettingsError
from embsearch_plugin.limits import Limits, at_least, check_limits
from embsearch_plugin.ranges import Ranges
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.supernet.forms import Form


class Algorithm(Protocol):
    """A plugin of one session: implements ``embsearch_search_start``, ``_search_step`` and ``_derive``, perhaps more.

    Its state survives in checkpoints through ``state_dict``, which holds tensors and plain values only.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept to go on later."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""


class _Kind(NamedTuple):
    """What a setting holds: whole numbers, any numbers, or True and False; one or several, or nothing."""

    type: type
    several: bool
    optional: bool

    def check(self, name: str, value: object) -> None:
        """Raise a SettingsError where ``value`` is something else, or NaN, which every comparison would let through."""
        if not self._holds(value):
            one, many = _WORDS[self.type]
            raise SettingsError(f"{name} must be {many if self.several else one}; got {value!r}. Leave it out for the default")

    def _holds(self, value: object) -> bool:
        if value is None and self.optional:
            return True
        if self.several:
            return isinstance(value, tuple | list) and all(map(self._is_one, value))
        return self._is_one(value)

    def _is_one(self, value: object) -> bool:
        if isinstance(value, bool) or self.type is bool:
            return isinstance(value, bool) and self.type is bool
        return isinstance(value, Integral) or (self.type is float and isinstance(value, Real) and not math.isnan(value))


_WORDS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), bool: ("True or False",) * 2}


def _kinds_of(config: type["AlgorithmConfig"]) -> dict[str, _Kind]:
    """Return what the settings hold that are numbers, or True and False, and nothing else besides, by name."""
    try:
        hints = get_type_hints(config)
    except NameError:  # of a class whose annotations are known to a type checker only
        return {}
    return {field.name: kind for field in fields(config) if (kind := _kind_of(hints[field.name])) is not None}


def _kind_of(hint: Any) -> _Kind | None:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    others = [part for part in parts if part is not NoneType]
    several = len(others) == 1 and get_origin(others[0]) is tuple and get_args(others[0])[1:] == (...,)
    types = set(get_args(others[0])[:1] if several else others)
    if types not in ({int}, {float}, {int, float}, {bool}):
        return None
    return _Kind(float if float in types else types.pop(), several, NoneType in parts)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Settings of an algorithm. A subclass has a ``name`` and builds the algorithm; its class is the registry's key.

    It is one of two kinds: a :class:`SearchConfig`, or a :class:`~embsearch_plugin.streaming.base.StreamConfig`, whose rows
    are made as ids come.

    What it declares of its fields:
        ``ranges``: what is sensible for those that are worth tuning, for studies; a recipe may say otherwise.
        ``limits``: what those that are numbers must be; a class adds those of its own fields.

    Args:
        warm_up: weight steps before the first search step. Ids are counted meanwhile (and after it: ranks are refreshed
            whenever the number of steps has doubled), so the default serves a run of 200 steps and one of 200,000.
        every: a search step follows every ``every``-th weight step.
    """

    name: ClassVar[str]
    ranges: ClassVar[Ranges] = {}
    limits: ClassVar[Limits] = {"warm_up": at_least(0), "every": at_least(1)}
    warm_up: int = 50
    every: int = 1

    def __post_init__(self) -> None:
        for name, kind in _kinds_of(type(self)).items():
            kind.check(name, getattr(self, name))
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(AlgorithmConfig):
    """Settings of an algorithm that decides how many rows and columns each table gets.

    What a reference run needs to know, so that no training is done twice:
        ``starts_from``: the model as it is built, or the dense model once it is trained.
        :attr:`trains`: whether the model trains while sizes are searched.
        :attr:`searches_within_budget`: whether one search serves one budget only.
        :attr:`search_batch`: how many validation examples a search step is given.
        ``examples_apart``: whether it estimates example by example, and needs validation batches whose examples share no bag.
        :attr:`least_search_steps`: a plan may be derived after so many.
        :meth:`allocations`: those it tries, each by a training of its own.
        :attr:`same_at_every_budget`: whether it is one and the same model for all budgets.
        :meth:`fine_tuning_epochs`: how long the rewritten model is trained on at most.

    What a rewrite needs to know:
        ``folds_gates``: whether gates are part of the weights, which are multiplied by them when they are stored. Otherwise
        gates only say what takes part, and the plan says that again.

    What a study needs to know, besides ``ranges``:
        :attr:`cuts_rows`, :attr:`cuts_columns`: whether row blocks and column chunks make a difference.

    Args:
        retrains: a reference run applies the plan to a model built anew and trains that from scratch; otherwise the
            searched model's compacted weights are trained on.
    """

    starts_from: ClassVar[Literal["scratch", "dense"]] = "scratch"
    examples_apart: ClassVar[bool] = False
    folds_gates: ClassVar[bool] = True
    retrains: bool = False

    @property
    def trains(self) -> bool:
        """Whether the model trains while sizes are searched; otherwise one search step says it all."""
        return True

    @property
    def cuts_rows(self) -> bool:
        """Whether the row blocks of the space make a difference."""
        return True

    @property
    def cuts_columns(self) -> bool:
        """Whether the column chunks of the space make a difference."""
        return True

    @property
    def searches_within_budget(self) -> bool:
        """Whether the search itself depends on the budget; otherwise plans for many budgets come of one search."""
        return False

    @property
    def search_batch(self) -> int | None:
        """How many examples the validation batches of a search hold, in steps and ``derive``; ``None``: as in training."""
        return None

    @property
    def same_at_every_budget(self) -> bool:
        """Whether its plan, and so the trained model, is the same at every budget that it fits."""
        return False

    @property
    def least_search_steps(self) -> int:
        """How many search steps it takes until a plan is what it is meant to be."""
        return 1

    @property
    def least_weight_steps(self) -> int:
        """How many weight steps it takes until then: the warm-up, and those between search steps."""
        return self.first_search_step + self.every * (self.least_search_steps - 1)

    @property
    def first_search_step(self) -> int:
        """The weight step that the first search step follows."""
        return self.warm_up or self.every

    def space(self, given: SearchSpace | None) -> SearchSpace:
        """Return how tables are cut, given what the user asked for, if anything."""
        return given or SearchSpace()

    def check(self, tables: Sequence[Table], space: SearchSpace) -> None:
        """Make sure that these tables can be searched, before anything is trained.

        Raises:
            SpaceError: where they cannot.
        """
        space.check(tables)

    def form(self, table: Table, space: SearchSpace) -> Form | None:
        """Return what is to follow a table's lookup, the same kind for every table; ``None`` for its gated rows."""
        return None

    def allocations(self, tables: Sequence[Table], budget: Budget, space: SearchSpace) -> Sequence["SearchConfig"]:
        """Return the allocations that are tried within a budget, at least one; by default itself alone.

        A reference run trains a model for each and keeps the one that is best on validation. One session is one allocation:
        :meth:`build` must serve for a config with several allocations too, and take one of them.

        Raises:
            BudgetError: where none is within the budget.
        """
        return [self]

    def fine_tuning_epochs(self, dense_epochs: int) -> float | None:
        """Return after how many epochs fine-tuning ends, converged or not; ``None`` for when it has converged.

        Below one it is a part of an epoch; above one the whole ones count.

        Args:
            dense_epochs: how many the training of the dense model took; only asked where the search starts from that.
        """
        return None

    def build(self) -> Algorithm:
        """Return a new algorithm for one session."""
        raise NotImplementedError
