"""The benchmark, in small: it measures what it says."""

import json
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner

from embsearch_plugin.bench.memory import stored_bytes
from embsearch_plugin.bench.timing import growth, lookups, medians, model_steps
from embsearch_plugin.bench.workload import FOUR_WIDTHS, TBE, TWO_WIDTHS, Kernels, Workload
from embsearch_plugin.cli import main

KERNELS = get_args(Kernels)
SMALL = Workload(tables=3, rows=500, dim=32, batch=32)


@pytest.mark.parametrize("bag", [1, 4])
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_kind_of_step_is_measured(bag: int, kernels: str) -> None:
    rows = model_steps(SMALL.alike(bag=bag, kernels=kernels), repeats=2)
    assert [row.measured for row in rows] == ["weight step", "search step", "compact training step"]
    assert all(row.bag == bag and 0 < row.ratio < 1000 for row in rows)
    optimizer = "row-wise Adagrad" if kernels == TBE else "SGD"
    assert {row.baseline for row in rows} == {f"plain step: {kernels}, {optimizer}"}


@pytest.mark.parametrize("kernels", KERNELS)
def test_lookups_are_measured_both_ways(kernels: str) -> None:
    rows = lookups(SMALL.alike(kernels=kernels), repeats=2)
    assert [(row.measured, row.baseline) for row in rows] == [
        (f"compact lookup, {widths} widths, {kind}", f"uniform {kernels}, {kind}")
        for kind in ("forward", "training")
        for widths in ("two", "four")
    ]


def test_what_grows_is_measured() -> None:
    assert set(growth(SMALL, repeats=2)) == {"plain step", "added to a weight step", "search step", "ranking"}


def test_steps_are_taken_in_turn() -> None:
    taken: list[str] = []
    batches = SMALL.batches(2)
    found = medians({"a": lambda _: taken.append("a"), "b": lambda _: taken.append("b")}, batches, repeats=3)
    assert taken == ["a", "b"] * 5
    assert set(found) == {"a", "b"}


def test_plans_keep_the_frequent_rows() -> None:
    for widths, dims in ((TWO_WIDTHS, [32, 8]), (FOUR_WIDTHS, [32, 16, 8, 4])):
        (plan, *_) = SMALL.plan(widths).tables
        assert [block.dim for block in plan.blocks] == dims
        assert plan.order is not None
        hot = set(plan.order[: plan.blocks[0].rows].tolist())
        ids = SMALL.batches(1)[0].sparse_features["f0"].values().tolist()
        assert sum(i in hot for i in ids) > 0.5 * len(ids)


def test_bytes_are_those_stored() -> None:
    found = stored_bytes(SMALL)
    assert found["uniform"] == {"tables": 3 * 500 * 32 * 4, "optimizer": 3 * 500 * 4}
    assert found["compact, two widths"]["tables"] == SMALL.plan(TWO_WIDTHS).size_bytes


@pytest.mark.slow
def test_the_command_prints_every_table_and_writes_the_numbers(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    small = ["--rows", "300", "--batch", "16", "--repeats", "1", "--sweep", "100,300", "--json", str(file)]
    result = CliRunner().invoke(main, ["bench", *small])
    assert result.exit_code == 0, result.output
    for title in ("Times, taken in turn", "Bytes stored", "Peak memory of training", "What grows with the rows"):
        assert title in result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["times"]) == 2 * (2 * 3 + 3 * 4)
    assert all(peak["plain"] > 0 and peak["search"] > 0 for peak in found["peak_bytes"].values())
    assert list(found["rows"]) == ["100", "300"]
