"""The user's own loaders, iterated by the search: in the middle of the user's own pass, and without a trace in it."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader


def unshared(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of the same batches whose passes are not the given one's.

    With persistent workers a DataLoader has one iterator for all passes, and a new pass ends the one that is under way.
    """
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    own = copy.copy(loader)
    own._iterator = None
    return own


def generators_of(loader: Iterable[Any]) -> set[torch.Generator]:
    """Return the generators that a DataLoader and its sampler were given: training may draw from the same ones."""
    given = (getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None)))
    return {generator for generator in given if isinstance(generator, torch.Generator)}
