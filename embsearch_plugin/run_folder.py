"""The folder of a run, of whatever kind: new, or gone on with, by one process at a time, with one recipe, data and clock."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import ndiff
from pathlib import Path
from typing import Protocol

import yaml

from embsearch_plugin.errors import RecipeError, RunFolderError
from embsearch_plugin.files import write_json, write_text
from embsearch_plugin.machine import clock_name
from embsearch_plugin.plain import structured
from embsearch_plugin.recipes import to_yaml

RECIPE, DATA = "recipe.yaml", "cells/data.json"


class Fingerprinted(Protocol):
    """Data that can be told from other data."""

    def fingerprint(self) -> str:
        """Return a text that changes when the data does."""


def check_folder(recipe: object, folder: Path, resume: bool) -> None:
    """Make sure that ``folder`` is new, or holds a run of ``recipe``, of whatever kind, that is to go on.

    Raises:
        RunFolderError: saying what is there.
    """
    written = folder / RECIPE
    if resume and not written.exists():
        raise RunFolderError(f"{folder} holds no run to go on with.\n  Possible solution: leave out --resume, or mend --out.")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise RunFolderError(
            f"the run folder {folder} exists already and is not empty; nothing in it was touched.\n  Possible solutions: "
            "1) --resume, to go on with a run that was stopped  2) another --out  3) remove the folder."
        )
    if resume and (difference := differing(_with_defaults(written.read_text(encoding="utf-8"), recipe), to_yaml(recipe))):
        raise RunFolderError(
            f"{folder} holds a run of another recipe or other overrides, so it cannot be resumed with this one; there "
            f"and here: {difference}.\n  Possible solution: give the same recipe and overrides, or another --out."
        )


def _with_defaults(written: str, recipe: object) -> str:
    """Return a recipe as it was written, with the defaults of what recipes could not say yet when it was."""
    try:
        return to_yaml(structured(yaml.safe_load(written), type(recipe), RECIPE))
    except (RecipeError, yaml.YAMLError):
        return written


def differing(there: str, here: str) -> str:
    """Return the first lines in which two texts differ, with - and + before them; empty where they do not."""
    lines = [line for line in ndiff(there.splitlines(), here.splitlines()) if line[:1] in "+-"]
    return "; ".join(" ".join(line.split()) for line in lines[:6])


@contextmanager
def opened(recipe: object, folder: Path, data: Fingerprinted) -> Iterator[None]:
    """Write down what is run, on which data and by which clock, and keep other processes out.

    Raises:
        RunFolderError: where another process runs in the folder, or data or clock are not what they were.
    """
    written, fingerprint, clock = folder / RECIPE, data.fingerprint(), clock_name()
    if not written.exists():
        write_json(folder / DATA, {"fingerprint": fingerprint, "clock": clock})
        write_text(written, to_yaml(recipe))
    with written.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends, however it does
        except BlockingIOError:
            raise RunFolderError(f"another process is running in {folder}; wait for it, or give another --out.") from None
        there = json.loads((folder / DATA).read_text(encoding="utf-8"))
        if there["fingerprint"] != fingerprint:
            raise RunFolderError(
                f"the data is not what it was when the run in {folder} began, so results could not be compared.\n"
                "  Possible solution: give another --out, or put the data back."
            )
        if there.get("clock", clock) != clock:
            raise RunFolderError(
                f"the run in {folder} was timed by another clock, so times could not be compared; there {there['clock']}, here "
                f"{clock}.\n  Possible solution: one thread (OMP_NUM_THREADS=1) where it had one, several where it had several."
            )
        yield
