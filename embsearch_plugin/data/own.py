"""Loaders of the user's own, named in a recipe as ``my_package.my_module:loaders``."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, get_args

import numpy as np
from torchrec.datasets.utils import Batch

from embsearch_plugin.data.dataset import Batches, Dataset, Schema, Split
from embsearch_plugin.errors import DataError, SettingsError
from embsearch_plugin.tasks import TASKS
from embsearch_plugin.user_code import accepted, imported, misfit


@dataclass(frozen=True)
class OwnData:
    """A function that returns a loader for each split: ``{"train": ..., "validation": ..., "test": ...}``.

    Loaders yield batches of the form of TorchRec's ``Batch``, with ``sparse_features`` and ``labels``, and can be iterated
    again and again. They decide the batch size and the order. A function may return a ``Dataset`` instead.

    Args:
        name: ``package.module:function``.
        options: its arguments by name.
        task: what the model is asked: ``click``, ``rating`` or ``top-k``.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str = "click"

    def __post_init__(self) -> None:
        imported(self.name)
        if self.task not in TASKS:
            raise SettingsError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}")

    def load(self) -> Dataset:
        """Call the function.

        Raises:
            DataError: where it does not take the options, or does not return the three loaders.
        """
        function = imported(self.name)
        if problem := misfit(function, options := accepted(function, self.options)):
            raise DataError(f"the loaders {self.name!r} cannot be made with {dict(self.options)}: {problem}")
        found = function(**options)
        if isinstance(found, Dataset):
            return found
        if not isinstance(found, Mapping) or set(found) != set(get_args(Split)):
            raise DataError(f"{self.name!r} must return a loader for each of {', '.join(get_args(Split))}; got {found!r}.")
        return OwnDataset(f"{self.name} {dict(self.options)}", found, Schema((), (), task=TASKS[self.task]))


class OwnDataset(Dataset):
    """Loaders as a data set. Its schema names no fields: the user's own model knows them."""

    def __init__(self, described: str, loaders: Mapping[str, Iterable[Batch]], schema: Schema) -> None:
        self.schema, self._described, self._loaders = schema, described, loaders

    def fingerprint(self) -> str:
        """Return a hash of the function's name, its options and the labels of the validation split."""
        digest = sha256(self._described.encode())
        for batch in self._loaders["validation"]:
            digest.update(np.ascontiguousarray(batch.labels.numpy()).data)
        return digest.hexdigest()

    def batches(self, split: Split, batch_size: int, *, seed: int | None = None) -> "LoaderBatches":
        """Return a loader's batches; their size and their order are its own."""
        loader = self._loaders[split]
        return SizedLoaderBatches(loader) if isinstance(loader, Sized) else LoaderBatches(loader)


class LoaderBatches(Batches):
    """A loader's batches. A sampler that has ``set_epoch`` is told the epoch."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        super().__init__(None)
        self._loader = loader

    def _cut(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        sampler = getattr(self._loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        yield from self._loader


class SizedLoaderBatches(LoaderBatches):
    """A loader whose length is known."""

    def __len__(self) -> int:
        assert isinstance(self._loader, Sized)
        return len(self._loader)
