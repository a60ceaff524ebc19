"""Writing down the plan of one trial of a study."""

from pathlib import Path
from typing import Any

from embsearch_plugin.errors import StudyError
from embsearch_plugin.plan import SizePlan
from embsearch_plugin.saving import PLAN
from embsearch_plugin.study.workshop import RECIPE


def write_plan(folder: Path, content: dict[str, Any], path: Path, number: int | None = None) -> Path:
    """Write the plan of a trial to a file; return the recipe that its model is built from.

    Args:
        folder: the study's run folder.
        content: of its ``study.json``.
        path: where the plan goes; its row orders go beside it.
        number: of the trial; by default the suggested one.

    Raises:
        StudyError: where there is no such trial, it has no plan, or its cell lies on another machine.
    """
    wanted = content["chosen"] if number is None else number
    trial = next((trial for trial in content["trials"] if trial["number"] == wanted), None)
    if trial is None or trial["values"] is None:
        complete = [trial["number"] for trial in content["trials"] if trial["values"] is not None]
        raise StudyError(f"there is no complete trial {wanted}. Complete: {', '.join(map(str, complete)) or 'none'}.")
    cell = folder / trial["cell"]
    if not (cell / PLAN).exists():
        raise StudyError(
            f"the plan of trial {wanted} is not in {cell}: another machine made it, or it was deleted.\n"
            "  Possible solution: the same command on the machine that made it."
        )
    SizePlan.load(cell / PLAN).save(path)
    return cell / RECIPE
