"""Every error the plugin raises.

A message says what must hold, what was got, and what to try. All derive from :class:`EmbsearchError`, so a caller can
catch everything of ours with one name.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class EmbsearchError(Exception):
    """The base of every error raised by the plugin."""


class StackError(EmbsearchError, ImportError):
    """torch, torchrec and fbgemm-gpu are missing, do not belong together, or cannot be loaded."""


class NoCollectionFound(EmbsearchError):
    """The model holds no embedding collection that an adapter can take."""


class UnsupportedCollection(EmbsearchError):
    """A collection was recognised but cannot be searched; the message says what to do instead."""


class AdapterConflict(EmbsearchError):
    """Two adapters, or two algorithms, answer for the same thing."""


class UnknownAlgorithm(EmbsearchError):
    """No algorithm of that name is registered."""


class BudgetError(EmbsearchError):
    """A budget cannot be read, or no size plan fits it."""


class AllocationError(EmbsearchError):
    """The allocation of dims could not be solved, or was asked with worths that are no numbers."""


class SpaceError(EmbsearchError):
    """A search space does not make sense: fractions that do not add up, chunks wider than the table."""


class SettingsError(EmbsearchError, ValueError):
    """A setting of an algorithm, a recipe, data or a study does not make sense by itself."""


class AttachError(EmbsearchError):
    """An optimizer or a validation loader cannot be used for a search."""


class SessionError(EmbsearchError):
    """A session was asked for something it cannot do now."""


class ObjectiveError(EmbsearchError):
    """The model, or the objective, does not return ``loss, (loss, logits, labels)``."""


class QualityError(EmbsearchError):
    """A quality to search by is no number, or does not fit what the model returns."""


class NonFiniteLoss(EmbsearchError):
    """The loss of a search step is NaN or infinite. Nothing was updated with it."""


class InputError(EmbsearchError):
    """A batch holds ids that no row answers for, or has a form that is not supported."""


class PlanError(EmbsearchError):
    """A size plan cannot be read, or belongs to another model."""


class RecipeError(EmbsearchError):
    """A recipe cannot be read; all its problems are listed at once."""


class StudyError(EmbsearchError):
    """A study cannot be opened or go on: its storage, its sampler, or what it was begun with."""


class DataError(EmbsearchError):
    """A data file is missing or malformed; file, line and column are named."""


class ModelError(EmbsearchError):
    """A recipe's model cannot be built for its data."""


class StateError(EmbsearchError, ValueError):
    """A file of saved state is not whole."""


class RunFolderError(EmbsearchError):
    """A run folder exists already, or holds something else than the run it should."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'? Available: ..."``, the usual ending of an error about an unknown name."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Available: {', '.join(names) or 'none'}."
