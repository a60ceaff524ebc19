"""Find how many rows and columns each embedding table of a TorchRec model deserves, and rewrite the model.

Importing this package is light: names are loaded on first use, after a check that the stack fits together.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from embsearch_plugin import stack

if TYPE_CHECKING:
    from embsearch_plugin.algorithms.autodim import AutoDim
    from embsearch_plugin.algorithms.autoemb import AutoEmb
    from embsearch_plugin.algorithms.darts import Darts
    from embsearch_plugin.algorithms.dnis import Dnis
    from embsearch_plugin.algorithms.esapn import Esapn
    from embsearch_plugin.algorithms.fixed import Fixed
    from embsearch_plugin.algorithms.given import Given
    from embsearch_plugin.algorithms.grid import Grid
    from embsearch_plugin.algorithms.magnitude import Magnitude
    from embsearch_plugin.algorithms.mde import Mde
    from embsearch_plugin.algorithms.nis import Nis
    from embsearch_plugin.algorithms.random import Random
    from embsearch_plugin.algorithms.sam import Sam
    from embsearch_plugin.algorithms.spectral import Spectral
    from embsearch_plugin.algorithms.uniform import Uniform
    from embsearch_plugin.budget import Budget
    from embsearch_plugin.decorator import prepare, searchable, session
    from embsearch_plugin.errors import EmbsearchError
    from embsearch_plugin.hookspecs import hookimpl
    from embsearch_plugin.plan import SizePlan
    from embsearch_plugin.saving import apply, load, save
    from embsearch_plugin.search.session import Session
    from embsearch_plugin.space import SearchSpace
    from embsearch_plugin.streaming.replay import Replay
    from embsearch_plugin.streaming.session import StreamSession
    from embsearch_plugin.study.drawing import suggest
    from embsearch_plugin.study.pruning import OptunaPruning

_HOMES = {
    "AutoDim": "algorithms.autodim",
    "AutoEmb": "algorithms.autoemb",
    "Budget": "budget",
    "Darts": "algorithms.darts",
    "Dnis": "algorithms.dnis",
    "EmbsearchError": "errors",
    "Esapn": "algorithms.esapn",
    "Fixed": "algorithms.fixed",
    "Given": "algorithms.given",
    "Grid": "algorithms.grid",
    "Magnitude": "algorithms.magnitude",
    "Mde": "algorithms.mde",
    "Nis": "algorithms.nis",
    "OptunaPruning": "study.pruning",
    "Random": "algorithms.random",
    "Replay": "streaming.replay",
    "Sam": "algorithms.sam",
    "SearchSpace": "space",
    "Session": "search.session",
    "SizePlan": "plan",
    "Spectral": "algorithms.spectral",
    "StreamSession": "streaming.session",
    "Uniform": "algorithms.uniform",
    "apply": "saving",
    "hookimpl": "hookspecs",
    "load": "saving",
    "prepare": "decorator",
    "save": "saving",
    "searchable": "decorator",
    "session": "decorator",
    "suggest": "study.drawing",
}

__all__ = [
    "AutoDim",
    "AutoEmb",
    "Budget",
    "Darts",
    "Dnis",
    "EmbsearchError",
    "Esapn",
    "Fixed",
    "Given",
    "Grid",
    "Magnitude",
    "Mde",
    "Nis",
    "OptunaPruning",
    "Random",
    "Replay",
    "Sam",
    "SearchSpace",
    "Session",
    "SizePlan",
    "Spectral",
    "StreamSession",
    "Uniform",
    "apply",
    "hookimpl",
    "load",
    "prepare",
    "save",
    "searchable",
    "session",
    "suggest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "EmbsearchError":
        stack.require()
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if stack.check_versions():
    warnings.warn(str(stack.describe()), RuntimeWarning, stacklevel=2)
