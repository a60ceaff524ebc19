"""The command line: ``embsearch run``, ``study``, ``apply``, ``report``, ``bench``, ``list``, ``doctor``."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from embsearch_plugin import stack
from embsearch_plugin.errors import EmbsearchError


class Explained(click.Command):
    """Shows an error of ours as its message, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except (EmbsearchError, OSError) as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(1)


class _Commands(Explained, click.Group):
    """All commands."""


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="embsearch-plugin")
def main() -> None:
    """Find how many rows and columns each embedding table deserves, and rewrite the model."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. Default: a new one under runs/.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped; needs --out.")
def run(recipe: Path, overrides: tuple[str, ...], out: Path | None, resume: bool) -> None:
    """Run the algorithm of RECIPE and its baselines at every budget and from every seed, and say who wins.

    KEY=VALUE overrides a field of the recipe, such as train.epochs=3 or data.path=ml-1m.
    """
    stack.require()
    from rich.console import Console

    from embsearch_plugin.progress import ProgressWatcher
    from embsearch_plugin.recipe_files import read_content
    from embsearch_plugin.recipes import is_stream, parse_recipe
    from embsearch_plugin.report.headline import headline
    from embsearch_plugin.report.text import results_table
    from embsearch_plugin.run import run as run_recipe
    from embsearch_plugin.streaming.recipe import parse_stream_recipe

    if resume and out is None:
        raise click.UsageError("--resume needs --out, the folder of the run to go on with.")
    content = read_content(recipe, overrides)
    folder, console = out or _new_folder(recipe.stem), Console()
    begins = f"run folder: {folder} (if stopped: the same command with --resume --out {folder})"
    if is_stream(content):
        streamed = parse_stream_recipe(content, str(recipe))
        _say(console, begins)
        _run_stream(streamed, folder, resume, console)
        return
    loaded = parse_recipe(content, str(recipe))
    _say(console, begins)
    with ProgressWatcher(console) as watcher:
        metrics = run_recipe(loaded, folder, resume=resume, watcher=watcher)
    console.print(headline(metrics), highlight=False, markup=False)
    console.print(results_table(metrics))
    _say(console, f"written to {folder}: report.html, metrics.json, and under cells/ every plan and model")


def _run_stream(recipe: Any, folder: Path, resume: bool, console: Any) -> None:
    from embsearch_plugin.progress import StreamProgress
    from embsearch_plugin.streaming.report import headline, terminal_table
    from embsearch_plugin.streaming.run import run_stream

    with StreamProgress(console) as progress:
        metrics = run_stream(recipe, folder, resume=resume, progress=progress)
    console.print(headline(metrics), highlight=False, markup=False)
    console.print(terminal_table(metrics))
    _say(console, f"written to {folder}: report.html and metrics.json")


def _say(console: Any, text: str) -> None:
    """Print a line as it is, however narrow the terminal: paths in it are to be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _new_folder(name: str) -> Path:
    numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, sys.maxsize))
    return next(folder for folder in numbered if not folder.exists())


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--trials", type=click.IntRange(min=0), default=0, help="How many the study is to have. Default: no more.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. Default: runs/ and the recipe's name.")
@click.option("--best", type=click.Path(path_type=Path), help="Write the plan of the suggested trial to this file.")
@click.option("--trial", type=int, help="With --best: write the plan of this trial.")
def study(
    recipe: Path, overrides: tuple[str, ...], trials: int, out: Path | None, best: Path | None, trial: int | None
) -> None:
    """Let Optuna vary what the section study of RECIPE names.

    The same command joins a study that runs, and goes on with one that was stopped.
    """
    stack.require()
    import optuna
    from rich.console import Console

    from embsearch_plugin.progress import ProgressWatcher
    from embsearch_plugin.recipes import load_recipe
    from embsearch_plugin.report.study import cost, sentences
    from embsearch_plugin.study.best import write_plan
    from embsearch_plugin.study.conduct import Conductor

    if trial is not None and best is None:
        raise click.UsageError("--trial needs --best, the file to write the plan to.")
    loaded, folder, console = load_recipe(recipe, overrides), out or Path("runs") / recipe.stem, Console()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # results are shown here

    say = partial(_say, console)
    with ProgressWatcher(console) as watcher:
        found = Conductor(loaded, folder, watcher, say).run(trials)
    say(" ".join([*sentences(found), cost(found)]))
    say(f"written to {folder}: report.html, study.json, and under models/ every plan and model")
    if best is not None:
        written_by = write_plan(folder, found, best, trial)
        say(f"written: {best}. To see it: embsearch apply {best} {written_by}")


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def apply(plan: Path, recipe: Path, overrides: tuple[str, ...]) -> None:
    """Show what PLAN makes of the model of RECIPE: its tables, and their bytes measured in the rewritten model."""
    stack.require()
    from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
    from embsearch_plugin.plan import SizePlan
    from embsearch_plugin.recipes import load_recipe
    from embsearch_plugin.saving import apply as apply_plan

    loaded, sizes = load_recipe(recipe, overrides), SizePlan.load(plan)
    model = apply_plan(loaded.model.build(loaded.data.load().schema), sizes)
    compact = [m for m in model.modules() if isinstance(m, CompactEmbeddingBagCollection)]
    measured = sum(t.nbytes for m in compact for t in [*m.parameters(), *m.buffers()])
    click.echo(str(sizes))
    click.echo(f"measured in the rewritten model: {measured:,} bytes")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Write no page: print the headline, and the results as a Markdown table.")
def report(folder: Path, markdown: bool) -> None:
    """Write FOLDER/report.html anew, of a run, a stream or a study, from what the folder holds."""
    from embsearch_plugin.files import read_json
    from embsearch_plugin.report.headline import headline
    from embsearch_plugin.report.inputs import Metrics, read
    from embsearch_plugin.report.page import write_report
    from embsearch_plugin.report.study import study_markdown, write_study_report
    from embsearch_plugin.report.text import results_markdown
    from embsearch_plugin.streaming import report as of_stream

    content = read_json(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
    if (folder / "study.json").exists():
        click.echo(study_markdown(folder) if markdown else f"written: {write_study_report(folder)}")
    elif "transactions" in content:
        shown = f"{of_stream.headline(content)}\n\n{of_stream.markdown(content)}"
        click.echo(shown if markdown else f"written: {of_stream.write_stream_report(folder)}")
    elif markdown:
        metrics = read(folder / "metrics.json", Metrics)
        click.echo(f"{headline(metrics)}\n\n{results_markdown(metrics)}")
    else:
        click.echo(f"written: {write_report(folder)}")


@main.command()
@click.option("--rows", type=click.IntRange(min=1), default=100_000, show_default=True, help="Rows of each of the 26 tables.")
@click.option("--batch", type=click.IntRange(min=1), default=4096, show_default=True, help="Examples per step.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=12, show_default=True, help="Steps of each kind; the median counts."
)
@click.option("--device", default="cpu", show_default=True, help="Where models and batches are: cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of torch.")
@click.option("--sweep", default="10000,100000,1000000", show_default=True, help="Rows per table to compare.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all numbers to this file, too.")
def bench(rows: int, batch: int, repeats: int, device: str, threads: int, sweep: str, file: Path | None) -> None:
    """Measure what a search and a compact model cost, beside plain training on the same kernels. Takes some minutes."""
    stack.require()
    import torch
    from rich.console import Console

    from embsearch_plugin.bench.report import run as measure
    from embsearch_plugin.bench.report import show
    from embsearch_plugin.bench.workload import Workload
    from embsearch_plugin.files import write_json
    from embsearch_plugin.machine import check_device

    try:
        check_device(device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error
    try:
        numbers = tuple(int(number) for number in sweep.split(",") if number)
    except ValueError as error:
        raise click.BadParameter(
            f"must be whole numbers, with commas between them; got {sweep!r}", param_hint="--sweep"
        ) from error
    torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    with console.status("") as status:
        found = measure(Workload(rows=rows, batch=batch, device=device), repeats, numbers, status.update)
    show(found, console)
    if file:
        write_json(file, found)


@main.command("leave-one-out")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the movies that are drawn.")
def leave_one_out(folder: Path, seed: int) -> None:
    """Write the test split of top-k beside MovieLens-1M's ratings in FOLDER: each user's last, and 99 to rank it among."""
    stack.require()
    from embsearch_plugin.data.leave_one_out import write_for_movielens

    click.echo(f"written: {write_for_movielens(folder, seed)}")


@main.command("list")
@click.argument("what", type=click.Choice(["algorithms", "adapters", "recipes"]))
def list_(what: str) -> None:
    """List the algorithms, the adapters, or the recipes in the folder recipes/."""
    if what == "recipes":
        paths = sorted(Path("recipes").glob("*.yaml"))
        click.echo("\n".join(f"{path}\n    {_first_comment(path)}" for path in paths) or "no recipes/*.yaml in this folder")
        return
    stack.require()
    from embsearch_plugin.plugins import adapters, algorithms

    if what == "adapters":
        click.echo("\n".join(adapters()))
        return
    for name, config in sorted(algorithms().items()):
        described = (sys.modules[config.__module__].__doc__ or "").partition("\n")[0]
        click.echo(f"{name:<16}{described}")


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return " ".join(comment) or "(no comment)"


@main.command()
def doctor() -> None:
    """Say which torch, torchrec and fbgemm-gpu are here, whether they fit together, and what to type if not."""
    found = stack.describe()
    click.echo(str(found))
    sys.exit(1 if found.problems else 0)
