"""``embsearch run`` on streams, in small: what it writes, that it can be killed and resumed, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import embsearch_plugin as es
from embsearch_plugin.cli import main
from embsearch_plugin.data import movielens_csv
from embsearch_plugin.data.stream import MovieLensCsvStream, Past
from embsearch_plugin.errors import RecipeError, RunFolderError
from embsearch_plugin.models.stream_mlp import StreamMlp
from embsearch_plugin.randomness import private_random
from embsearch_plugin.recipe_files import read_content
from embsearch_plugin.streaming.prequential import FREQUENT
from embsearch_plugin.streaming.recipe import StreamRecipe, StreamSearch, StreamTrain, parse_stream_recipe
from embsearch_plugin.streaming.report import headline, markdown
from embsearch_plugin.streaming.run import run_stream

RECIPES = Path(__file__).parents[2] / "recipes"
CANDIDATES = (2, 4)
SMALL = [
    "model.embedding_dim=8",
    "model.layers=[8]",
    "train.batch_size=100",
    "train.last=300",
    "search.algorithm.candidates=[2, 4]",
    "search.algorithm.hidden=8",
    "search.baselines=[fixed, {name: darts, candidates: [2, 4]}, {name: autoemb, candidates: [2, 4], hidden: 8}]",
]


def small(folder: Path, ratings: int = 701, **more: Any) -> StreamRecipe:
    """A recipe whose last batch is one transaction."""
    movielens_csv.write_sample(folder, users=40, movies=30, ratings=ratings)
    esapn = es.Esapn(candidates=CANDIDATES, hidden=8, lr=0.01)
    soft = es.Darts(candidates=CANDIDATES), es.AutoEmb(candidates=CANDIDATES, hidden=8)
    recipe = StreamRecipe(
        data=MovieLensCsvStream(str(folder)),
        search=StreamSearch(esapn, (es.Fixed(), *soft)),
        model=StreamMlp(8, (8,)),
        train=StreamTrain(batch_size=100, last=250, checkpoint=3),
    )
    return replace(recipe, **more)


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


class Balanced(HTMLParser):
    """Fails where a tag is not closed, or closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("stream_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs_in_a_small_form(recipe: Path, tmp_path: Path) -> None:
    task = "stars" if "ml1m" in recipe.stem else "preference"
    movielens_csv.write_sample(tmp_path / "data", users=40, movies=30, ratings=501)
    lines = (tmp_path / "data" / "ratings.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    dat = "".join(f"{user}::{movie}::{-int(-float(stars) // 1)}::{time}\n" for user, movie, stars, time in rows)
    (tmp_path / "data" / "ratings.dat").write_text(dat)
    overrides = [*SMALL, f"data.path={tmp_path / 'data'}", f"data.task={task}", "seeds=[0, 1]"]
    result = invoke("run", recipe, *overrides, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Accuracy over the last 300 of 501 transactions" in result.output
    assert re.search(r"esapn seed 1 +501  accuracy 0\.\d{4}, loss \d\.\d{4}, ", result.output)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in metrics["cells"]] == [
        (method, seed) for seed in (0, 1) for method in ("fixed", "darts", "autoemb", "esapn")
    ]
    assert metrics["loss"] == ("mse" if task == "preference" else "log_loss")
    page = (tmp_path / "out" / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and {"svg", "table", "figure"} <= parser.seen
    assert "nan" not in page.lower().replace("&nan", "")
    assert not list((tmp_path / "out").glob("cells/**/checkpoint*"))
    (tmp_path / "out" / "report.html").unlink()
    assert invoke("report", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "report.html").read_text() == page
    printed = invoke("report", tmp_path / "out", "--markdown").output
    assert headline(metrics) in printed and markdown(metrics) in printed
    assert printed.count("| fixed |") == 1 + 2  # results, and the sizes of two tables


def slow_run(recipe: StreamRecipe, config: Any, seed: int) -> dict[str, Any]:
    """The same by an own loop, with every figure counted a transaction at a time."""
    stream, size = recipe.data.load(), recipe.train.batch_size
    with private_random(seed):
        model = recipe.model.build(stream.schema)
    session = es.prepare(model, algorithm=config, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.train.lr, fused=True)
    past = Past(stream, size, seed)
    session.attach(optimizer, validation=past)
    rows: list[tuple[float, float]] = []
    by_frequency = torch.zeros(2, FREQUENT + 1, 4, dtype=torch.float64)
    for first in range(0, len(stream), size):
        positions = torch.arange(first, min(first + size, len(stream)))
        batch = stream.batch(positions)
        with torch.no_grad():
            logits = model.eval()(batch)[1][1]
        for position, logit, label in zip(positions.tolist(), logits, batch.labels.tolist(), strict=True):
            if logits.dim() == 2:
                right, loss = float(logit.argmax() == int(label)), -float(logit.log_softmax(0)[int(label)])
            else:
                right, loss = float((logit > 0) == bool(label)), float((logit.sigmoid() - label) ** 2)
            rows.append((right, loss))
            for feature in range(2):
                frequency = min(int(stream.frequencies[position, feature]), FREQUENT)
                by_frequency[feature, frequency, :3] += torch.tensor([1, right, loss], dtype=torch.float64)
        past.seen = first + len(positions)
        if len(positions) == 1:
            continue
        optimizer.zero_grad()
        model.train()(batch)[0].backward()
        ids = batch.sparse_features.to_dict()
        for feature, table in enumerate(session.tables):
            values = ids[table.spec.features[0]].values()
            widths = [table.rows.widths[size] for size in table.rows.sizes(table.find(values)).tolist()]
            for position, width in zip(positions.tolist(), widths, strict=True):
                by_frequency[feature, min(int(stream.frequencies[position, feature]), FREQUENT), 3] += width
        optimizer.step()
    parts = {"whole": rows, "last": rows[-recipe.train.last :]}
    means = {name: [sum(column) / len(part) for column in zip(*part, strict=True)] for name, part in parts.items()}
    return {"means": means, "by_frequency": by_frequency, "held": session.held_bytes, "tables": session.tables}


@pytest.mark.parametrize("task", ["preference", "stars"])
def test_figures_agree_with_a_slow_recomputation(task: str, tmp_path: Path) -> None:
    recipe = small(tmp_path / "data", 501, seeds=(3,))
    recipe = replace(recipe, data=replace(recipe.data, task=task))
    metrics = run_stream(recipe, tmp_path / "out")
    for cell, config in zip(metrics["cells"], recipe.search.methods.values(), strict=True):
        slow = slow_run(recipe, config, 3)
        for part, count in (("whole", 501), ("last", 250)):
            accuracy, loss = slow["means"][part]
            assert cell[part]["transactions"] == count
            assert cell[part]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
            assert cell[part][metrics["loss"]] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(torch.tensor(cell["by_frequency"]).double(), slow["by_frequency"], rtol=1e-4, atol=1e-4)
        assert cell["held_bytes"] == slow["held"] == cell["points"][-1]["held_bytes"]
        assert cell["points"][-1]["transactions"] == 501
        assert sum(point["accuracy"] is not None for point in cell["points"]) == len(cell["points"])
        for row, table in zip(cell["tables"], slow["tables"], strict=True):
            assert row["ids"] == len(table) == sum(row["rows"].values())
            assert row["weights"] == sum(int(width) * count for width, count in row["rows"].items()) == table.weights


def timeless(folder: Path) -> Any:
    """What a run found, without how long it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for cell in metrics["cells"]:
        cell.pop("seconds")
    return metrics


class Stopped(Exception):
    pass


def after(batches: int, stop: Callable[[], object]) -> Callable[..., None]:
    """Stop after so many batches, over all methods."""
    left = [batches]

    def stepped(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            stop()

    return stepped


def raise_stopped() -> None:
    raise Stopped


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Killed for good in one method, and stopped in another: between two checkpoints, with a cap that is reached."""
    recipe = small(tmp_path / "data")
    recipe = replace(recipe, search=replace(recipe.search, cap="9kB"))
    run_stream(recipe, tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, __file__, str(tmp_path)], timeout=120, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    killed = tmp_path / "killed"
    assert len(list(killed.glob("cells/**/cell.json"))) == 1  # FIXED was done, and DARTS on its way
    assert len(list(killed.glob("cells/**/checkpoint.safetensors"))) == 1
    for batches in (8, 9):
        with pytest.raises(Stopped):
            run_stream(recipe, killed, resume=True, progress=after(batches, raise_stopped))
    rest: list[str] = []
    run_stream(recipe, killed, resume=True, progress=lambda method, *_: rest.append(method))
    assert set(rest) == {"esapn"}
    assert timeless(killed) == timeless(tmp_path / "whole")
    assert all(cell["stopped"] for cell in timeless(killed)["cells"])


def killed_run(folder: Path) -> None:
    """The other process of the test above."""
    torch.set_num_threads(1)
    recipe = small(folder / "data")
    recipe = replace(recipe, search=replace(recipe.search, cap="9kB"))
    kill = after(8 + 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_stream(recipe, folder / "killed", progress=kill)


def test_a_finished_run_that_is_resumed_runs_nothing(tmp_path: Path) -> None:
    recipe = small(tmp_path / "data", 301, search=StreamSearch(es.Esapn(candidates=CANDIDATES, hidden=8)))
    metrics = run_stream(recipe, tmp_path / "out")
    (left,) = {path.parent for path in tmp_path.glob("out/cells/seed-0/esapn/cell.json")}
    (left / "checkpoint.safetensors").write_text("of a run killed when it had written its results")
    assert run_stream(recipe, tmp_path / "out", resume=True, progress=after(1, raise_stopped)) == metrics
    assert [path.name for path in left.iterdir()] == ["cell.json"]
    with pytest.raises(RunFolderError, match="another recipe"):
        run_stream(replace(recipe, seeds=(7,)), tmp_path / "out", resume=True)
    with pytest.raises(RunFolderError, match="not empty"):
        run_stream(recipe, tmp_path / "out")


@pytest.mark.parametrize("ratings", [300, 302, 99, 1])
def test_a_stream_may_end_anywhere(ratings: int, tmp_path: Path) -> None:
    """At the end of a batch, in the middle of one with two transactions of one user, or before the first is full."""
    recipe = small(tmp_path / "data", ratings)
    lines = (tmp_path / "data" / "ratings.csv").read_text().splitlines()
    if ratings == 302:
        lines[-1] = ",".join([lines[-2].split(",")[0], *lines[-1].split(",")[1:]])
        (tmp_path / "data" / "ratings.csv").write_text("\n".join(lines) + "\n")
    metrics = run_stream(recipe, tmp_path / "out")
    assert {cell["whole"]["transactions"] for cell in metrics["cells"]} == {float(ratings)}
    assert (tmp_path / "out" / "report.html").exists()


def test_times_out_of_order_are_said_and_processed_as_they_come(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = small(tmp_path / "data", 300, search=StreamSearch(es.Fixed()))
    lines = (tmp_path / "data" / "ratings.csv").read_text().splitlines()
    (tmp_path / "data" / "ratings.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    as_they_come = run_stream(recipe, tmp_path / "out")
    assert sum("older than the one before" in record.message for record in caplog.records) == 1
    in_order = run_stream(replace(recipe, data=replace(recipe.data, sort=True)), tmp_path / "sorted")
    assert sum("older than the one before" in record.message for record in caplog.records) == 1
    assert as_they_come["cells"][0]["whole"] != in_order["cells"][0]["whole"]


def content(folder: Path, **search: Any) -> Mapping[str, Any]:
    return {"data": {"name": "movielens-csv-stream", "path": str(folder)}, "search": {"algorithm": "esapn", **search}}


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"algorithm": "dnis"}, "'dnis' does not work on streams; autoemb, darts, esapn, fixed do"),
        ({"baselines": ["uniform"]}, "'uniform' does not work on streams"),
        ({"baselines": []}, "baselines must hold at least one"),
        ({"cap": "1 parrot"}, "cannot read the budget"),
        ({"cap": "100 params"}, "is in bytes"),
        ({"algorithm": {"name": "esapn", "candidates": [4, 2]}}, "ascending"),
    ],
)
def test_what_cannot_work_on_a_stream_is_refused(search: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_stream_recipe(content(tmp_path, **search), "here.yaml")


def test_settings_of_a_stream_are_checked(tmp_path: Path) -> None:
    for wrong, message in (
        ({"seeds": [1, 1]}, "no one twice"),
        ({"train": {"batch_size": 0}}, "must be at least 1"),
        ({"train": {"lr": 0}}, "lr must be above 0; got 0"),
        ({"tune": {}}, "extra field"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_stream_recipe({**content(tmp_path), **wrong}, "here.yaml")


def test_a_stream_algorithm_in_an_ordinary_recipe_is_refused() -> None:
    result = invoke("run", RECIPES / "demo.yaml", "search.algorithm=esapn")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "esapn works on streams only, such as data: movielens-csv-stream" in " ".join(result.output.split())


@pytest.mark.parametrize("command", [("study",), ("apply", RECIPES / "demo.yaml")])
def test_what_does_not_take_streams_says_so(command: tuple[object, ...]) -> None:
    result = invoke(*command, RECIPES / "stream_ml1m_esapn.yaml")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "is the recipe of a stream, which embsearch run takes" in " ".join(result.output.split())


def test_recipes_are_written_as_they_are_read(tmp_path: Path) -> None:
    recipe = small(tmp_path / "data", 200)
    run_stream(recipe, tmp_path / "out")
    again = parse_stream_recipe(read_content(tmp_path / "out" / "recipe.yaml"), "recipe.yaml")
    assert again == recipe


if __name__ == "__main__":
    killed_run(Path(sys.argv[1]))
