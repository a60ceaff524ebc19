"""One method on one stream: each batch is predicted first, scored, then learned from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torchrec.datasets.utils import Batch

from embsearch_plugin.budget import Budget
from embsearch_plugin.data.stream import Past, Stream
from embsearch_plugin.decorator import prepare
from embsearch_plugin.files import read_state, write_state
from embsearch_plugin.machine import clock
from embsearch_plugin.randomness import private_random
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.streaming.collection import Lookup
from embsearch_plugin.streaming.recipe import StreamRecipe
from embsearch_plugin.streaming.session import StreamSession
from embsearch_plugin.tasks import example_losses, is_right

POINTS = 100  # of the curves over time
FREQUENT = 100  # frequencies from here on are counted as one, as in the paper's Fig. 4


@dataclass
class Score:
    """What was predicted how well, so far.

    Attributes:
        whole, last: number of transactions, how many were predicted right, and the sum of their losses; over the whole stream,
            and over its last part.
        by_frequency: the same and the sum of the widths of rows after learning, for each feature and frequency, float64
            (2, FREQUENT + 1, 4).
        points: the same as ``whole`` between two points in time, with sizes and bytes at that point.
    """

    whole: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    last: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    by_frequency: Tensor = field(default_factory=lambda: torch.zeros(2, FREQUENT + 1, 4, dtype=torch.float64))
    since: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    points: list[dict[str, Any]] = field(default_factory=list)

    def predicted(self, right: Tensor, losses: Tensor, frequencies: Tensor, in_last: Tensor) -> None:
        """Add a batch's transactions.

        Args:
            right: bool (B,).
            losses: (B,).
            frequencies: int64 (B, 2).
            in_last: which of them are of the stream's last part, bool (B,).
        """
        figures = torch.stack([torch.ones(len(right)), right, losses], 1).double()
        self.whole += figures.sum(0)
        self.since += figures.sum(0)
        self.last += figures[in_last].sum(0)
        for feature, column in enumerate(frequencies.clamp(max=FREQUENT).unbind(1)):
            self.by_frequency[feature, :, :3].index_add_(0, column, figures)

    def learned(self, widths: Tensor, frequencies: Tensor) -> None:
        """Add the widths (B, 2) of the rows that a batch's transactions had when they were learned from."""
        for feature, column in enumerate(frequencies.clamp(max=FREQUENT).unbind(1)):
            self.by_frequency[feature, :, 3].index_add_(0, column, widths[:, feature].double())

    def point(self, seen: int, session: StreamSession) -> None:
        """Note how things are after ``seen`` transactions."""
        count, right, loss = self.since.tolist()
        rows = [dict(zip(table.rows.widths, table.rows.row_counts, strict=True)) for table in session.tables]
        self.points.append(
            {
                "transactions": seen,
                "accuracy": right / count if count else None,
                "loss": loss / count if count else None,
                "used_bytes": session.used_bytes,
                "held_bytes": session.held_bytes,
                "weights": [table.weights for table in session.tables],
                "rows": [{str(width): number for width, number in each.items()} for each in rows],
            }
        )
        self.since.zero_()


@dataclass
class Run:
    """One method on its way through a stream, from one seed.

    Args:
        recipe: what is run.
        stream: its data.
        config: the method.
        seed: of weights and draws.
        checkpoint: where everything is written from time to time.
    """

    recipe: StreamRecipe
    stream: Stream
    config: StreamConfig
    seed: int
    checkpoint: Path

    def __post_init__(self) -> None:
        train = self.recipe.train
        with private_random(self.seed):
            self.model: nn.Module = self.recipe.model.build(self.stream.schema)
        cap = self.recipe.search.cap
        self.session = prepare(
            self.model, algorithm=self.config, budget=None if cap is None else Budget.of(cap), seed=self.seed
        )
        self.optimizer: Optimizer = Adam(self.model.parameters(), lr=train.lr, fused=True)
        self.past = Past(self.stream, train.batch_size, self.seed)
        self.session.attach(self.optimizer, validation=self.past)
        self.score, self.seconds, self.seen = Score(), 0.0, 0

    def finish(self, stepped: Callable[["Run"], None] = lambda run: None) -> dict[str, Any]:
        """Process what is left of the stream; return the results. ``stepped`` is called after every batch."""
        if self.checkpoint.exists():
            self._load(read_state(self.checkpoint))
        train, total = self.recipe.train, len(self.stream)
        while self.seen < total:
            started = clock()
            positions = torch.arange(self.seen, min(self.seen + train.batch_size, total))
            self._process(positions)
            self.seconds += clock() - started
            if self.seen * POINTS // total > (self.seen - len(positions)) * POINTS // total:
                self.score.point(self.seen, self.session)
            if self.seen // train.batch_size % train.checkpoint == 0:
                write_state(self.checkpoint, self._state())
            stepped(self)
        return self._results()

    def _process(self, positions: Tensor) -> None:
        batch, frequencies = self.stream.batch(positions), self.stream.frequencies[positions]
        self.model.eval()
        with torch.no_grad():
            _, (_, logits, labels) = self.model(batch)
        in_last = positions >= len(self.stream) - self.recipe.train.last
        self.score.predicted(is_right(logits, labels), example_losses(logits, labels), frequencies, in_last)
        self.seen += len(positions)
        self.past.seen = self.seen
        if len(positions) > 1:  # batch norm has nothing to learn from one
            self.score.learned(self._widths(self._learn(batch)), frequencies)

    def _learn(self, batch: Batch) -> list[Lookup]:
        """Take a step; return what it looked up."""
        self.model.train()
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        lookups = self.session.lookups
        loss.backward()
        self.optimizer.step()
        return lookups

    def _widths(self, lookups: Sequence[Lookup]) -> Tensor:
        """Return the widths of the rows that were looked up, (B, 2); 0 where an id was refused."""
        columns = []
        for table, lookup in zip(self.session.tables, lookups, strict=True):
            widths, known = torch.tensor(table.rows.widths), lookup.entries >= 0
            column = torch.zeros(len(known), dtype=torch.int64)
            column[known] = widths[table.rows.sizes(lookup.entries[known])]
            columns.append(column)
        return torch.stack(columns, 1)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": self.session.state_dict(),
            "score": vars(self.score),
            "seconds": self.seconds,
            "seen": self.seen,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.seen = self.past.seen = state["seen"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])
        self.score, self.seconds = Score(**state["score"]), state["seconds"]

    def _results(self) -> dict[str, Any]:
        loss = self.stream.schema.task.loss.key
        return {
            "whole": _means(self.score.whole, loss),
            "last": _means(self.score.last, loss),
            "by_frequency": self.score.by_frequency.tolist(),
            "points": self.score.points,
            "seconds": self.seconds,
            "stopped": self.session.stopped,
            "used_bytes": self.session.used_bytes,
            "held_bytes": self.session.held_bytes,
            "tables": [
                {
                    "name": table.spec.name,
                    "ids": len(table),
                    "weights": table.weights,
                    "rows": {str(width): count for width, count in zip(table.rows.widths, table.rows.row_counts, strict=True)},
                }
                for table in self.session.tables
            ],
        }


def _means(sums: Tensor, loss: str) -> dict[str, float]:
    count, right, total = sums.tolist()
    return {"transactions": count, "accuracy": right / max(count, 1), loss: total / max(count, 1)}
