"""Validation batches for search steps: a loader that never ends and draws from no random state but its own."""

from collections.abc import Iterable, Iterator
from typing import Any

from embsearch_plugin.errors import AttachError
from embsearch_plugin.search.objective import private_random


class ValidationStream:
    """Cycles over a validation loader.

    Args:
        loader: any iterable that can be iterated again.
        seed: for the order of a shuffling loader.

    Raises:
        AttachError: where the loader is empty, or can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        if iter(loader) is loader:
            raise AttachError(
                "the validation loader must start anew when it ends; got an iterator, which ends for good.\n"
                "  Possible solution: give the DataLoader (or a list of batches) itself, not iter(loader)."
            )
        self.loader, self.seed = loader, seed
        self.passes, self.taken = 0, 0
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        """Return the next batch; start anew at the end."""
        for _ in range(2):
            with private_random(self.seed + self.passes):
                if self._iterator is None:
                    self._iterator = iter(self.loader)
                for batch in self._iterator:
                    self.taken += 1
                    return batch
            self._iterator, self.taken, self.passes = None, 0, self.passes + 1
        raise AttachError(
            "the validation loader gave no batch; a search step needs at least one.\n"
            "  Possible solutions: 1) drop_last=False  2) a smaller batch size  3) a larger validation split."
        )

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"passes": self.passes, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: the pass is replayed up to it."""
        self.passes, self.taken, self._iterator = state["passes"], 0, None
        for _ in range(state["taken"]):
            self.next()
