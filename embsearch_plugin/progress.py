"""What a run shows on a terminal while it works."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from embsearch_plugin.tasks import CLICK, Task
from embsearch_plugin.training import Epoch, Watcher


class ProgressWatcher(Watcher):
    """A bar per epoch, and a line for each epoch that ended. Where there is no terminal, only the lines."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None
        self._asked: Task = CLICK

    def __enter__(self) -> "ProgressWatcher":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, steps: int | None, task: Task) -> None:
        """Begin a bar."""
        self._clear()
        self._asked = task
        self._task = self._progress.add_task(name, total=steps)

    def step(self) -> None:
        """Advance the bar."""
        if self._task is not None:
            self._progress.advance(self._task)

    def epoch(self, name: str, row: Epoch) -> None:
        """Print the epoch's line and start its bar anew."""
        shown = dict.fromkeys([self._asked.loss, self._asked.metrics[0]])
        figures = ", ".join(f"{metric.name} {value:.4f}" for metric in shown if (value := metric.of(row)) is not None)
        line = f"{name:<10} epoch {row['epoch']:>2}  validation {figures}  {row['seconds']:.1f} s"
        self._console.print(line, highlight=False, soft_wrap=True)
        if self._task is not None:
            self._progress.reset(self._task)

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
