"""When the user's loop has taken a weight step: each of its optimizers has stepped, and the model was run in between."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class WeightSteps:
    """Follows the optimizers of a loop by their step hooks.

    Args:
        forwards: returns how often the loop has run the tables to train them, until now.
        taken: called when a weight step was taken.
    """

    def __init__(self, forwards: Callable[[], int], taken: Callable[[], None]) -> None:
        self._forwards, self._taken = forwards, taken
        self._handles: list[Any] = []
        self._waited_for: set[int] = set()  # optimizers that have not stepped yet
        self._all: set[int] = set()
        self._seen = 0  # forwards up to the last weight step

    @property
    def attached(self) -> bool:
        """Whether optimizers are followed."""
        return bool(self._handles)

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow these optimizers."""
        self._all = {id(each) for each in optimizers}
        self._waited_for = set(self._all)
        self._handles = [each.register_step_post_hook(self._stepped) for each in optimizers]

    def detach(self) -> None:
        """Follow none."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _stepped(self, optimizer: Optimizer, *_: object) -> None:
        if self._forwards() == self._seen:  # a step that calls its parent's step fires the hook twice
            return
        self._waited_for.discard(id(optimizer))
        if not self._waited_for and self.advance():
            self._waited_for = set(self._all)
            self._taken()

    def advance(self) -> bool:
        """Take what the loop has run until now for done; return whether it has run the tables since the last time."""
        seen, self._seen = self._seen, self._forwards()
        return self._seen > seen
