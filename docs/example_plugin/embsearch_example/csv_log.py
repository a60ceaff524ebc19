"""Write the metrics of every search step to the CSV file that ``EMBSEARCH_CSV`` names, if it names one."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import embsearch_plugin as es


class CsvLog:
    """One line per search step, below a line of names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @es.hookimpl
    def embsearch_after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, ["step", *metrics])
            if is_new:
                writer.writeheader()
            writer.writerow({"step": step, **metrics})


@es.hookimpl
def embsearch_register_observers() -> Sequence[object]:
    """Watch every session of the process."""
    path = os.environ.get("EMBSEARCH_CSV")
    return [CsvLog(Path(path))] if path else []
