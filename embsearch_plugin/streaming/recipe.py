"""Recipes of streams: which data flows by, through which model, with which algorithms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from embsearch_plugin.algorithms.fixed import Fixed
from embsearch_plugin.budget import Budget
from embsearch_plugin.data import stream
from embsearch_plugin.errors import SettingsError
from embsearch_plugin.limits import Limits, above, at_least, check_limits
from embsearch_plugin.models.stream_mlp import StreamMlp
from embsearch_plugin.plain import structured
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.recipes import methods_of
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.streaming.table import cap_in_bytes


@dataclass(frozen=True)
class StreamTrain:
    """How a model learns from a stream: each batch is predicted first, scored, then learned from.

    Args:
        batch_size: transactions per batch (esapn.txt, 3.2).
        lr: learning rate of Adam for the model; rows have one of their own.
        last: the report's main figures are over so many transactions at the end.
        checkpoint: batches from one checkpoint to the next.
    """

    limits: ClassVar[Limits] = {"batch_size": at_least(1), "lr": above(0), "last": at_least(1), "checkpoint": at_least(1)}
    batch_size: int = 500
    lr: float = 0.001
    last: int = 100_000
    checkpoint: int = 500

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class StreamSearch:
    """What is compared.

    Args:
        algorithm: the algorithm's name and settings.
        baselines: those it is compared with; the first is what times and sizes are ratios to.
        cap: how many bytes all tables of an algorithm may hold, as text: "200MB", say; none by default.
    """

    algorithm: StreamConfig
    baselines: tuple[StreamConfig, ...] = (Fixed(),)
    cap: str | None = None

    def __post_init__(self) -> None:
        if self.cap is not None:
            cap_in_bytes(Budget.of(self.cap), 1)
        if not self.baselines:
            raise SettingsError("baselines must hold at least one algorithm, to compare with")
        for config in (self.algorithm, *self.baselines):
            if not isinstance(config, StreamConfig):
                raise SettingsError(f"{config.name!r} does not work on streams; {', '.join(_of_streams())} do")

    @property
    def methods(self) -> dict[str, StreamConfig]:
        """The baselines and the algorithm by name; where two share a name, their settings tell them apart."""
        return methods_of((*self.baselines, self.algorithm))


def _of_streams() -> list[str]:
    return sorted(name for name, config in algorithms().items() if issubclass(config, StreamConfig))


@dataclass(frozen=True)
class StreamRecipe:
    """A stream that every method is run on, from every seed.

    Args:
        data: the stream.
        search: the methods.
        model: the model.
        train: how it learns.
        seeds: of weights and of what algorithms draw; results are means over them.
    """

    data: stream.StreamData
    search: StreamSearch
    model: StreamMlp = field(default_factory=StreamMlp)
    train: StreamTrain = field(default_factory=StreamTrain)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SettingsError(f"seeds must hold at least one, no one twice, each 0 or more; got {list(self.seeds)}")


def parse_stream_recipe(content: Mapping[str, Any], source: str) -> StreamRecipe:
    """Turn plain data into a recipe; ``source`` is named in errors.

    Raises:
        RecipeError: where something in it is wrong; lists all problems.
    """
    recipe: StreamRecipe = structured(content, StreamRecipe, source)
    return recipe
