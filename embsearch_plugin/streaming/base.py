"""What an algorithm for streams is: its config, and what it decides while data flows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.collection import Table
from embsearch_plugin.errors import SettingsError
from embsearch_plugin.limits import Limits, above, at_least
from embsearch_plugin.streaming.collection import Lookup
from embsearch_plugin.streaming.forms import RowForm
from embsearch_plugin.streaming.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from embsearch_plugin.streaming.table import GrowingTable

if TYPE_CHECKING:
    from embsearch_plugin.streaming.session import StreamSession


@dataclass(frozen=True, kw_only=True)
class StreamConfig(AlgorithmConfig):
    """Settings of an algorithm whose tables grow while data flows.

    Args:
        warm_up: weight steps before the first search step.
        rows: what trains the rows, ``adam`` or ``rowwise_adagrad``; the loop's optimizer trains the rest of the model.
        row_lr: its learning rate. A row moves only where it is looked up; Adam on a whole table goes on moving it afterwards,
            about ten times as far in all, so this is larger than what that would have.
        init_std: standard deviation of the normal numbers that new rows hold.
    """

    limits: ClassVar[Limits] = {"row_lr": above(0), "init_std": at_least(0)}
    warm_up: int = 1
    rows: Literal["adam", "rowwise_adagrad"] = "adam"
    row_lr: float = 0.01
    init_std: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in ROW_OPTIMIZERS:
            raise SettingsError(f"rows must be one of {', '.join(ROW_OPTIMIZERS)}; got {self.rows!r}")

    @property
    def row_optimizer(self) -> RowOptimizer:
        """What trains the rows."""
        made: RowOptimizer = ROW_OPTIMIZERS[self.rows](self.row_lr)
        return made

    def extras(self, table: Table) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is kept for each id of a table, float32, by name; they start at zero and count as bytes."""
        return {}

    def row_form(self, table: Table) -> RowForm:
        """Return what makes a table's outputs of its rows."""
        raise NotImplementedError

    def build(self) -> "StreamAlgorithm":
        """Return the algorithm of one session."""
        return StreamAlgorithm()


class StreamAlgorithm:
    """What decides while data flows. This one leaves everything as it is; others override what they need."""

    def start(self, session: "StreamSession") -> None:
        """The model is prepared; nothing has been trained."""

    def grows(self, table: GrowingTable, entries: Tensor) -> Tensor:
        """Return which entries (n,) of a batch get rows of the next width, bool (n,). Asked before they are read."""
        return torch.zeros(len(entries), dtype=torch.bool)

    def scored(self, table: GrowingTable, lookup: Lookup, losses: Tensor) -> None:
        """The model was run on a batch to be trained: its examples had these losses, (B,)."""

    @property
    def searches(self) -> bool:
        """Whether it learns from past batches: otherwise ``attach`` needs none."""
        return False

    def search_step(self, session: "StreamSession", batch: Any) -> Mapping[str, float]:
        """Learn from a batch of the past; return metrics. Must not change the model or its tables."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept to go on later."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
