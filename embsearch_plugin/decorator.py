"""``@searchable`` and ``prepare``: from a model to a search."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, overload

from torch import nn

from embsearch_plugin.algorithms.base import AlgorithmConfig, SearchConfig
from embsearch_plugin.budget import Budget
from embsearch_plugin.errors import SessionError, UnknownAlgorithm
from embsearch_plugin.plugins import algorithm_config
from embsearch_plugin.search.frequencies import Frequencies
from embsearch_plugin.search.objective import Objective, train_task
from embsearch_plugin.search.session import ATTRIBUTE, Session
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.streaming.session import StreamSession

T = TypeVar("T", bound=Callable[..., nn.Module])
_depth: ContextVar[int] = ContextVar("embsearch_construction_depth", default=0)


@overload
def prepare(  # type: ignore[overload-overlap]  # a literal is a text, too
    model: nn.Module,
    *,
    algorithm: StreamConfig | Literal["esapn", "autoemb", "darts", "fixed"],
    budget: Budget | str | None = None,
    objective: Objective = train_task,
    seed: int = 0,
) -> StreamSession: ...


@overload
def prepare(
    model: nn.Module,
    *,
    algorithm: str | SearchConfig = "spectral",
    budget: Budget | str | None = None,
    space: SearchSpace | None = None,
    objective: Objective = train_task,
    frequencies: Frequencies | None = None,
    fused: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Session: ...


def prepare(
    model: nn.Module,
    *,
    algorithm: str | AlgorithmConfig = "spectral",
    budget: Budget | str | None = None,
    space: SearchSpace | None = None,
    objective: Objective = train_task,
    frequencies: Frequencies | None = None,
    fused: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Session | StreamSession:
    """Make every embedding collection in ``model`` searchable, in place.

    Args:
        model: any module that holds a TorchRec EmbeddingBagCollection; its inputs and outputs stay the same.
        algorithm: a name, or a config object such as ``es.Dnis(lr=0.005)``; by default :class:`es.Spectral
            <embsearch_plugin.algorithms.spectral.Spectral>`, which adds a fifth to one training; where others are better,
            docs/results.md says.
        budget: ``"10%"`` of the original tables' weight bytes, ``es.Budget(bytes="2GiB")``, or ``es.Budget(params=n)``; by
            default 10 %. For a stream it is a cap on the bytes that are held, and there is none by default.
        space: how rows and columns are cut; by default as suits the algorithm.
        objective: ``(model, batch) -> loss, logits, labels``; needed where the model does not follow TorchRec's
            train-task convention ``loss, (loss, logits, labels) = model(batch)``.
        frequencies: counts per table name, or batches to count. By default ids are counted while the model trains.
        fused: TorchRec's ``fused_params``, to train the tables with FBGEMM's fused optimizers on one device.
        seed: of every random number the search draws.

    Returns:
        The session; ``session(model)`` finds it again. For an algorithm on streams (``esapn``, ``autoemb``, ``darts``,
        ``fixed``) it is a :class:`~embsearch_plugin.streaming.session.StreamSession`, and the tables' rows are the plugin's.

    Raises:
        UnknownAlgorithm: where no algorithm has that name.
        NoCollectionFound, UnsupportedCollection: where the model has no tables, or some that cannot be searched.
        SpaceError: where these tables cannot be cut as asked.
        BudgetError: where a budget cannot be read.
        SessionError: where an option does not go with the algorithm.
        AdapterConflict: where two adapters take the same table.
    """
    _check_is_module(model, "prepare takes")
    config = algorithm_config(algorithm)
    if isinstance(config, StreamConfig):
        _refuse_for_streams(config, space=space, frequencies=frequencies, fused=fused)
        return StreamSession(model, config, None if budget is None else Budget.of(budget), objective, seed)
    if not isinstance(config, SearchConfig):
        raise UnknownAlgorithm(f"{config.name!r} must derive from SearchConfig or StreamConfig.")
    return Session(model, config, Budget.of("10%" if budget is None else budget), space, objective, frequencies, fused, seed)


def _refuse_for_streams(config: StreamConfig, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise SessionError(
            f"{config.name} works on streams, where rows come as they are needed: {', '.join(given)} cannot be given.\n"
            f"  Possible solution: leave {'it' if len(given) == 1 else 'them'} out."
        )


def session(model: nn.Module) -> Session | Any:
    """Return the search on ``model``; sees through DDP, DistributedModelParallel, ``torch.compile`` and wrappers.

    For an algorithm on streams it is a :class:`~embsearch_plugin.streaming.session.StreamSession`, which the type leaves open.

    Raises:
        SessionError: where there is none, or more than one.
    """
    _check_is_module(model, "session takes")
    attributes = (module.__dict__.get(ATTRIBUTE) for module in model.modules())
    found = [attribute for attribute in attributes if attribute is not None]  # None in a copy of a searched model
    if len(found) > 1:
        raise SessionError(
            f"{len(found)} parts of this {type(model).__name__} are searched, each on its own.\n  Possible solutions: "
            "1) es.session(part)  2) prepare the whole model instead, so that its tables share one budget."
        )
    if not found:
        raise SessionError(
            f"no search on this {type(model).__name__}.\n  Possible solutions: 1) build it with the decorated function "
            "or class, not .original  2) es.prepare(model, ...)  3) build anew: after compact() the search is over."
        )
    return found[0]


def searchable(**options: Any) -> Callable[[T], T]:
    """Make the models that a function returns, or that a class constructs, searchable.

    Takes the keyword arguments of :func:`prepare`. The decorated function or class gets ``original(*args, **kwargs)``,
    which builds the model without a search. A decorated class stays the class it is; its subclasses are searchable too.
    Where decorated constructions nest, only the outermost prepares.

    Example::

        @es.searchable(budget="10%")
        def build_model():
            return DLRMTrain(DLRM(...))
    """
    inspect.signature(prepare).bind(None, **options)  # a misspelt option fails here, not when the first model is built

    def decorate(target: T) -> T:
        if isinstance(target, type):
            return _searchable_class(target, options)
        return _searchable_function(target, options)

    return decorate


def _searchable_function(build: T, options: Mapping[str, Any]) -> T:
    @functools.wraps(build)
    def built(*args: Any, **kwargs: Any) -> nn.Module:
        with _construction() as outermost:
            model = build(*args, **kwargs)
        if outermost:
            _check_is_module(model, f"{getattr(build, '__name__', build)} must return")
            prepare(model, **options)
        return model

    built.original = functools.update_wrapper(functools.partial(_original, build), build)  # type: ignore[attr-defined]
    return built  # type: ignore[return-value]


def _original(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a model without a search, whatever decorated things are constructed on the way."""
    with _construction():
        return build(*args, **kwargs)


def _searchable_class(cls: Any, options: Mapping[str, Any]) -> Any:
    """Make constructing ``cls``, or a subclass of it, prepare the instance.

    The class object itself is kept, so ``isinstance``, ``super()`` and pickling by name go on working.
    """
    if not issubclass(cls, nn.Module):
        raise SessionError(f"searchable takes a function or an nn.Module class; got the class {cls.__name__}.")
    if not hasattr(cls, "_embsearch_options"):  # a base that is decorated already has seen to it
        _prepare_after_init(cls)
        _prepare_subclasses(cls)
        cls.original = classmethod(_original)
    cls._embsearch_options = options
    return cls


def _prepare_after_init(cls: Any) -> None:
    """Make the outermost ``__init__`` prepare the instance when it is through.

    Each class of a hierarchy gets an ``__init__`` that counts its depth, also one that inherits its own: a mixin may
    still add collections after the ``__init__`` of the decorated class has returned to it.
    """
    own = vars(cls).get("__init__")

    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with _construction() as outermost:
            if own is None:
                super(cls, self).__init__(*args, **kwargs)
            else:
                own(self, *args, **kwargs)
        if outermost:
            prepare(self, **self._embsearch_options)

    cls.__init__ = init


def _prepare_subclasses(cls: Any) -> None:
    own = vars(cls).get("__init_subclass__")

    def init_subclass(sub: Any, /, **kwargs: Any) -> None:
        if own is None:
            super(cls, sub).__init_subclass__(**kwargs)
        else:
            own.__get__(None, sub)(**kwargs)
        _prepare_after_init(sub)

    cls.__init_subclass__ = classmethod(init_subclass)


@contextmanager
def _construction() -> Iterator[bool]:
    """Yield whether no other decorated construction is going on."""
    depth = _depth.get()
    token = _depth.set(depth + 1)
    try:
        yield depth == 0
    finally:
        _depth.reset(token)


def _check_is_module(model: object, must: str) -> None:
    if not isinstance(model, nn.Module):
        raise SessionError(f"{must} an nn.Module; got {type(model).__name__}.")
