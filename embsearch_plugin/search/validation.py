"""Validation batches for search steps: a loader that never ends and draws from no random state but its own."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from embsearch_plugin.errors import AttachError
from embsearch_plugin.randomness import private_random
from embsearch_plugin.search.loaders import generators_of, unshared

_EMPTY = (
    "the loader gave no batch; the search needs at least one.\n"
    "  Possible solutions: 1) drop_last=False  2) a smaller batch size  3) a larger validation split."
)

NO_EXAMPLES = (
    "the first validation batches hold no examples; the search needs some.\n"
    "  Possible solution: a loader that gives no empty batches."
)


class ValidationStream:
    """Cycles over a loader.

    Args:
        loader: any iterable that can be iterated again.
        seed: for the order of a shuffling loader.

    Raises:
        AttachError: where the loader can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise AttachError(
                f"a loader of batches must start anew when it ends; got a {type(loader).__name__}.\n"
                "  Possible solution: give the DataLoader (or a list of batches) itself, not iter(loader)."
            )
        self.loader, self.seed = unshared(loader), seed
        self.passes, self.taken = 0, 0
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        """Return the next batch; start anew at the end.

        Raises:
            AttachError: where the loader is empty.
        """
        for _ in range(2):
            with private_random(self.seed + 1_000_003 * self.passes + self.taken, generators_of(self.loader)):
                if self._iterator is None:
                    self._iterator = self._new_pass()
                for batch in self._iterator:
                    self.taken += 1
                    return batch
            self._iterator, self.taken, self.passes = None, 0, self.passes + 1
        raise AttachError(_EMPTY)

    def first(self, count: int) -> list[Any]:
        """Return the first ``count`` batches of the first pass, or all there are; the position stays.

        Raises:
            AttachError: where the loader is empty.
        """
        with private_random(self.seed, generators_of(self.loader)):
            batches = list(islice(unshared(self.loader), count))
        if not batches:
            raise AttachError(_EMPTY)
        return batches

    def _new_pass(self) -> Iterator[Any]:
        """Start anew; loaders and samplers that shuffle by epoch (as DistributedSampler) are told which it is."""
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.passes)
        return iter(self.loader)

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"passes": self.passes, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: the pass is replayed up to it."""
        self.passes, self.taken, self._iterator = state["passes"], 0, None
        for _ in range(state["taken"]):
            self.next()
