"""Two studies at equal training compute: their fronts on the test split, over several seeds.

    python -m embsearch_plugin.study.compare recipes/study_ml1m_dlrm.yaml recipes/study_ml1m_dlrm_per_table.yaml \
        --plain-runs 30 --seeds 0,1,2 --out runs/compare data.path=ml-1m

Each study ends once the dense model and its trials have taken as many training steps as so many plain runs; the trial that goes
beyond that is finished. Both have two objectives, a metric and bytes. The front is chosen on the validation split; then the
test split is read, once for each model on it.
"""

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from embsearch_plugin import stack
from embsearch_plugin.cells import DENSE_MODEL
from embsearch_plugin.cli import Explained
from embsearch_plugin.costs import human_bytes
from embsearch_plugin.errors import StudyError
from embsearch_plugin.files import write_json
from embsearch_plugin.progress import ProgressWatcher
from embsearch_plugin.recipes import Recipe, load_recipe
from embsearch_plugin.report.numbers import UNDEFINED, measure
from embsearch_plugin.study.conduct import Conductor
from embsearch_plugin.study.config import BYTES
from embsearch_plugin.study.front import hypervolume
from embsearch_plugin.study.parameters import study_of
from embsearch_plugin.study.trial import objectives_of
from embsearch_plugin.study.workshop import Workshop
from embsearch_plugin.tasks import Metric
from embsearch_plugin.training import Watcher

MOST = 50  # trials per plain training run: in a small space those that were made before cost nothing, and would never end
CLOSE = 0.001
SHARES = (0.05, 0.1, 0.25, 0.5)  # of the dense model's bytes, that the table has columns for


@dataclass(frozen=True)
class Outcome:
    """A study's front on the test split.

    Args:
        points: (metric, bytes) of each model on it; the metric negative where less of it is better.
        dense: the dense model's.
        trials: how many it had.
        plain_runs: what the dense model and they took, by time.
    """

    points: list[tuple[float, float]]
    dense: tuple[float, float]
    trials: int
    plain_runs: float

    @property
    def bytes_needed(self) -> float | None:
        """The fewest bytes within 0.001 of the dense model's metric; None where no model is."""
        return min((size for quality, size in self.points if quality >= self.dense[0] - CLOSE), default=None)

    def within(self, share: float) -> float | None:
        """The metric of the largest model within a share of the dense model's bytes: the best of them on validation."""
        fitting = [(size, quality) for quality, size in self.points if size <= share * self.dense[1]]
        return max(fitting)[1] if fitting else None


def outcome(recipe: Recipe, folder: Path, plain_runs: float, watcher: Watcher) -> Outcome:
    """Conduct a study, and test its front.

    Raises:
        StudyError: where its objectives are not a metric and bytes.
    """
    if len(study_of(recipe).objectives) != 2 or study_of(recipe).objectives[1] != BYTES:
        raise StudyError(f"the objectives must be a metric and bytes; got {list(study_of(recipe).objectives)}.")
    content = Conductor(recipe, folder, watcher).run(math.ceil(MOST * plain_runs), plain_runs)
    workshop = Workshop(recipe.data.load(), folder)
    metric = objectives_of(recipe, workshop.data.schema.task)[0]
    best = [trial for trial in content["trials"] if trial["front"]]
    points = [(_quality(metric, workshop.test(trial["cell"])), trial["values"][1]) for trial in best]
    dense = workshop.cells(recipe, recipe.seeds[0], Watcher())
    row = dense.get(DENSE_MODEL)
    tested, taken = (_quality(metric, dense.test(row)), row["bytes"]), 1 + content["cost"]["trials"]
    return Outcome(points, tested, len(content["trials"]), taken)


def _quality(metric: Metric, score: Any) -> float:
    value = metric.of(score)
    if value is None:
        raise StudyError(f"the test {metric.name} of a model is undefined.")
    return metric.sign * value


def compared(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Return both hypervolumes, their ratio, and the bytes each needs to be as good as the dense model.

    The corner of the worst is the dense model's bytes, and the worst metric on either front.
    """
    reference = (min(quality for quality, _ in ours.points + theirs.points), ours.dense[1])
    volumes = [hypervolume(each.points, reference) for each in (ours, theirs)]
    return {
        "hypervolumes": volumes,
        "ratio": volumes[0] / volumes[1] if volumes[1] else None,
        "bytes_needed": [each.bytes_needed for each in (ours, theirs)],
        "within": {f"{share:.0%}": [each.within(share) for each in (ours, theirs)] for share in SHARES},
        "trials": [each.trials for each in (ours, theirs)],
        "plain_runs_by_time": [each.plain_runs for each in (ours, theirs)],
        "fronts": [sorted(each.points, key=lambda point: point[1]) for each in (ours, theirs)],
        "dense": ours.dense,
    }


def table(found: list[dict[str, Any]], names: list[str]) -> str:
    """Return a row per seed and study, as Markdown."""
    head = ["seed", "study", "trials", "plain trainings, by time", "hypervolume", *found[0]["within"], "bytes needed", "dense"]
    rows = [head, ["---"] * len(head)]
    for each in found:
        for n, name in enumerate(names):
            needed = each["bytes_needed"][n]
            metrics = [UNDEFINED if pair[n] is None else measure(pair[n]) for pair in each["within"].values()]
            counts = [str(each["trials"][n]), f"{each['plain_runs_by_time'][n]:.1f}", f"{each['hypervolumes'][n]:.6g}"]
            last = [UNDEFINED if needed is None else human_bytes(int(needed)), measure(each["dense"][0])]
            rows.append([str(each["seed"]), name, *counts, *metrics, *last])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(found: list[dict[str, Any]]) -> str:
    """Return what came out over seeds, in a sentence or two."""
    ratios = [each["ratio"] for each in found if each["ratio"] is not None]
    spread = f" ± {statistics.stdev(ratios):.3f}" if len(ratios) > 1 else ""
    ratio = f"{statistics.fmean(ratios):.3f}{spread}" if ratios else "undefined"
    needed = [
        " and ".join(human_bytes(int(size)) if size else "more than any" for size in each["bytes_needed"]) for each in found
    ]
    return f"Hypervolume, first to second: {ratio}. Bytes to be within {CLOSE} of the dense model: {'; '.join(needed)}."


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    numbers = value.split(",")
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"whole numbers with commas between them, no one twice, such as 0,1,2; got {value!r}")
    return list(map(int, numbers))


@click.command(cls=Explained, help="Conduct the studies of two recipes at equal training compute, and compare their fronts.")
@click.argument("recipes", nargs=2, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--plain-runs", type=click.FloatRange(min=1), required=True, help="How many plain training runs each study may take."
)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers, help="A study of each recipe per seed.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/compare"), show_default=True)
def main(recipes: tuple[Path, Path], overrides: tuple[str, ...], plain_runs: float, seeds: list[int], out: Path) -> None:
    """Compare two studies; what was finished before is not done again."""
    stack.require()
    console, found = Console(), []
    with ProgressWatcher(console) as watcher:
        for seed in seeds:
            both = [
                outcome(replace(load_recipe(path, overrides), seeds=(seed,)), out / f"{path.stem}-{seed}", plain_runs, watcher)
                for path in recipes
            ]
            found.append({"seed": seed, **compared(*both)})
            write_json(out / "compare.json", {"recipes": [str(path) for path in recipes], "seeds": found})
    console.print(table(found, [path.stem for path in recipes]), highlight=False, markup=False, soft_wrap=True)
    console.print(summary(found), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
