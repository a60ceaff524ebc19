"""What a run shows on a terminal while it works."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from embsearch_plugin.costs import human_bytes
from embsearch_plugin.streaming.prequential import Run
from embsearch_plugin.tasks import CLICK, Task
from embsearch_plugin.training import Epoch, Watcher


class ProgressWatcher(Watcher):
    """A bar per epoch, and a line for each epoch that ended. Where there is no terminal, only the lines."""

    def __init__(self, console: Console) -> None:
        self._progress = _bars(console)
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


class StreamProgress:
    """A bar per method and seed of a stream, with figures beside it. Where there is no terminal, a line at every tenth."""

    def __init__(self, console: Console) -> None:
        self._progress, self._console = _bars(console), console
        self._shown: tuple[str, int] | None = None
        self._task = TaskID(0)
        self._tenth = 0

    def __enter__(self) -> "StreamProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, method: str, seed: int, run: Run) -> None:
        """Take note of a batch."""
        total, name = len(run.stream), f"{method} seed {seed}"
        if self._shown != (method, seed):
            self._shown, self._tenth = (method, seed), run.seen * 10 // total
            self._task = self._progress.add_task(name, total=total)
        self._progress.update(self._task, completed=run.seen)
        if run.seen * 10 // total > self._tenth:
            self._tenth = run.seen * 10 // total
            count, right, loss = run.score.whole.tolist()
            figures = f"accuracy {right / count:.4f}, loss {loss / count:.4f}, {human_bytes(run.session.held_bytes)}"
            self._console.print(f"{name:<20} {run.seen:>10,}  {figures}  {run.seconds:.1f} s", highlight=False, soft_wrap=True)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
