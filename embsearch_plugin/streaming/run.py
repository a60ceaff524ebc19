"""``embsearch run`` on a recipe of a stream: every method from every seed, one after the other, with a report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from embsearch_plugin.cells import CELL, slug
from embsearch_plugin.data.stream import Stream
from embsearch_plugin.files import read_json, write_json
from embsearch_plugin.machine import machine, versions
from embsearch_plugin.plain import to_plain
from embsearch_plugin.run_folder import check_folder, opened
from embsearch_plugin.streaming.prequential import Run
from embsearch_plugin.streaming.recipe import StreamRecipe
from embsearch_plugin.streaming.report import write_stream_report

CHECKPOINT = "checkpoint.safetensors"
Progress = Callable[[str, int, Run], Any]
"""Called after every batch, with the method, the seed and the run."""


def run_stream(recipe: StreamRecipe, folder: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recipe and write its results into ``folder``; return what ``metrics.json`` holds.

    A run that was killed goes on at its last checkpoint, to the same result.

    Raises:
        RunFolderError: as for :func:`embsearch_plugin.run.run`.
    """
    check_folder(recipe, folder, resume)
    data = recipe.data.load()
    with opened(recipe, folder, data):
        cells = [
            {"method": method, "seed": seed} | _cell(recipe, data, method, seed, folder, progress)
            for seed in recipe.seeds
            for method in recipe.search.methods
        ]
        metrics = {
            "recipe": to_plain(recipe),
            "versions": versions(),
            "machine": machine(),
            "algorithm": list(recipe.search.methods)[-1],
            "task": data.schema.task.name,
            "loss": data.schema.task.loss.key,
            "transactions": len(data),
            "cells": cells,
        }
        write_json(folder / "metrics.json", metrics)
        write_stream_report(folder)
    return metrics


def _cell(
    recipe: StreamRecipe, data: Stream, method: str, seed: int, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    """Return the results of one method from one seed; run it, if that was not done."""
    place = folder / "cells" / f"seed-{seed}" / slug(method)
    if not (place / CELL).exists():
        run = Run(recipe, data, recipe.search.methods[method], seed, place / CHECKPOINT)
        write_json(place / CELL, run.finish(lambda run: progress(method, seed, run) if progress else None))
    (place / CHECKPOINT).unlink(missing_ok=True)  # that of a finished method, which may have been killed in between
    found: dict[str, Any] = read_json(place / CELL)
    return found
