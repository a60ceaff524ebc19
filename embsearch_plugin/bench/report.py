"""The benchmark as a whole: what is run, in which order, and how it is printed."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from embsearch_plugin.bench.memory import peak_bytes, stored_bytes
from embsearch_plugin.bench.timing import Row, growth, lookups, model_steps
from embsearch_plugin.bench.workload import DENSE, SPARSE, TBE, Workload
from embsearch_plugin.costs import human_bytes
from embsearch_plugin.machine import begin_to_use, machine, versions

BAGS = (1, 10)
SWEEP = {"tables": 8, "batch": 1024}
MEMORY_TARGET = 1.15


def run(work: Workload, repeats: int, sweep: tuple[int, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; return it as plain data.

    Args:
        work: the size of the model and of its batches.
        repeats: steps of each kind; their median counts.
        sweep: rows per table, for what is measured against the number of rows.
        say: told what is being measured.
    """
    begin_to_use(work.device)
    times = []
    for bag in BAGS:
        for kernels in (TBE, SPARSE):
            say(f"whole steps, bags of {bag}, {kernels}")
            times += model_steps(work.alike(bag=bag, kernels=kernels), repeats)
        for kernels in (TBE, SPARSE, DENSE):
            say(f"lookups, bags of {bag}, {kernels}")
            times += lookups(work.alike(bag=bag, kernels=kernels), repeats)
    say("peak memory, in processes of their own")
    peaks = {str(bag): {k: peak_bytes(work.alike(bag=bag), search=k == "search") for k in ("plain", "search")} for bag in BAGS}
    rows = {}
    for number in sweep:
        say(f"{number:,} rows per table")
        rows[str(number)] = growth(work.alike(rows=number, **SWEEP), repeats)
    return {
        "machine": machine(),
        "versions": versions(),
        "workload": asdict(work),
        "times": [row.to_json() for row in times],
        "bytes": stored_bytes(work),
        "peak_bytes": peaks,
        "rows": rows,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print what :func:`run` returned."""
    console.print(_head(found), highlight=False)
    console.print(Group(_times(found["times"]), _bytes(found["bytes"]), _peaks(found["peak_bytes"]), _rows(found["rows"])))


def _head(found: dict[str, Any]) -> str:
    work, on = found["workload"], found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"DLRM, {work['tables']} tables of {work['rows']:,} x {work['dim']}, batch {work['batch']}\n"
        f"{on['gpu'] or on['processor']}, {on['threads']} thread(s); {packages}; times: {on['clock']}"
    )


def _times(rows: list[dict[str, Any]]) -> Table:
    table = _table("Times, taken in turn", "what", "baseline", "ids/bag", "ms", "baseline", "ratio", "target")
    for _, group in groupby(rows, key=lambda row: (row["bag"], row["baseline"])):
        for row in group:
            entry = Row(**{key: value for key, value in row.items() if key != "ratio"})
            target = f"<= {entry.target:g}" if entry.target else ""
            numbers = f"{entry.milliseconds:.1f}", f"{entry.baseline_milliseconds:.1f}", f"{entry.ratio:.2f}"
            table.add_row(entry.measured, entry.baseline, f"{entry.bag}", *numbers, target)
        table.add_section()
    return table


def _bytes(forms: dict[str, dict[str, int]]) -> Table:
    table = _table("Bytes stored", "tables", "weights and indices", "optimizer state", "ratio to uniform")
    whole = sum(forms["uniform"].values())
    for name, stored in forms.items():
        sizes = human_bytes(stored["tables"]), human_bytes(stored["optimizer"])
        table.add_row(name, *sizes, f"{sum(stored.values()) / whole:.2f}")
    return table


def _peaks(peaks: dict[str, dict[str, int]]) -> Table:
    table = _table("Peak memory of training", "ids/bag", "plain", "with a search", "ratio", "target")
    for bag, peak in peaks.items():
        ratio = f"{peak['search'] / peak['plain']:.2f}"
        table.add_row(bag, human_bytes(peak["plain"]), human_bytes(peak["search"]), ratio, f"<= {MEMORY_TARGET}")
    return table


def _rows(sweep: dict[str, dict[str, float]]) -> Table:
    title = f"What grows with the rows: ms, {SWEEP['tables']} tables, batch {SWEEP['batch']}"
    table = _table(title, "rows per table", *next(iter(sweep.values()), {}))
    for rows, found in sweep.items():
        table.add_row(f"{int(rows):,}", *(f"{value:.1f}" for value in found.values()))
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if (number, column) == (0, "baseline") else "right", no_wrap=True)
    return table
