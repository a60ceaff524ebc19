"""Random numbers of our own: the caller's random states are never moved."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def shared_generators() -> list[torch.Generator]:
    """Return those that everybody draws from; a GPU's is there once CUDA is in use, and using it is not for us to begin."""
    return [torch.default_generator, *torch.cuda.default_generators]


@contextmanager
def private_random(seed: int, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Draw random numbers (torch, NumPy, Python) from ``seed`` inside; restore every random state afterwards.

    Args:
        seed: of the numbers drawn inside.
        generators: others to draw from ``seed`` and to restore.
    """
    seed %= 2**32  # as NumPy wants it
    python_state, numpy_state = random.getstate(), np.random.get_state()
    states = [(g, g.get_state()) for g in (*shared_generators(), *generators)]
    try:
        random.seed(seed)
        np.random.seed(seed)
        for generator, _ in states:
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)
