"""Runs as plain data: what a ``metrics.json`` and a ``plan.json`` hold."""

from collections.abc import Iterable
from typing import Any

Data = dict[str, Any]

ORIGINAL = 1_729_152
SHARES = {"50%": 0.5, "25%": 0.25, "10%": 0.1, "5%": 0.05}
TRIALS = [{"l2": 0.001}, {"l2": 0.003}]

# Test AUC by method and budget: the mean over seeds, and their standard deviation.
AUCS = {
    "dense": {None: (0.8206, 0.0003)},
    "dnis": {"50%": (0.8190, 0.0004), "25%": (0.8195, 0.0003), "10%": (0.8076, 0.0005), "5%": (0.7877, 0.0010)},
    "uniform": {"50%": (0.8193, 0.0003), "25%": (0.8185, 0.0002), "10%": (0.8132, 0.0004), "5%": None},
    "magnitude": {"50%": (0.8180, 0.0006), "25%": (0.8184, 0.0005), "10%": (0.8116, 0.0005), "5%": (0.7993, 0.0007)},
}
SECONDS = {"dense": 100.0, "dnis": 440.0, "uniform": 120.0, "magnitude": 150.0}
STAGES = {"dense": ["dense"], "dnis": ["search", "fine-tune"], "uniform": ["uniform"], "magnitude": ["dense", "fine-tune"]}
REASON = "no uniform dim fits 84.4 KiB: the smallest possible model needs 168.0 KiB"


def full_run(*budgets: str) -> Data:
    """Four methods at four budgets or those given, two trials, three seeds; uniform dims do not fit the smallest budget.

    The first seed runs both trials; the other seeds run the chosen one only.
    """
    texts = list(budgets or SHARES)
    cells = [
        _cell(method, budget, seed, trial, chosen=trial == TRIALS[1])
        for seed in range(3)
        for trial in TRIALS
        for method in AUCS
        for budget in (texts if method != "dense" else [None])
        if seed == 0 or trial == TRIALS[1]
    ]
    return _metrics(texts, cells)


def small_run() -> Data:
    """One seed, one budget, nothing tuned, nothing to compare with but the dense model."""
    return _metrics(["10%"], [_cell("dense", None, 0, {}), _cell("dnis", "10%", 0, {})])


def cells_of(metrics: Data, method: str, budget: str | None, *, chosen: bool = True) -> list[Data]:
    """Return a method's cells at a budget: the chosen ones, or all."""
    cells = [cell for cell in metrics["cells"] if (cell["method"], cell["budget"]) == (method, budget)]
    return [cell for cell in cells if cell["chosen"] or not chosen]


def set_test(
    metrics: Data, method: str, budget: str | None, aucs: Iterable[float | None], log_loss: float | None = 0.5
) -> None:
    """Give a method at a budget a test AUC per seed."""
    for cell, auc in zip(cells_of(metrics, method, budget), aucs, strict=True):
        cell["test"] = {"auc": auc, "log_loss": log_loss}


def make_infeasible(metrics: Data, method: str, budget: str, reason: str = REASON) -> None:
    """Let none of a method's models fit a budget."""
    for cell in cells_of(metrics, method, budget, chosen=False):
        cell.update(_infeasible(reason))


def _metrics(budgets: list[str], cells: list[Data]) -> Data:
    return {
        "recipe": {"search": {"algorithm": {"name": "dnis"}, "budgets": budgets}},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpus": 2, "platform": "Linux"},
        "algorithm": "dnis",
        "original_bytes": ORIGINAL,
        "budgets": [{"text": text, "bytes": int(SHARES[text] * ORIGINAL)} for text in budgets],
        "cells": cells,
        "course": [{"step": 100 * k, "loss": 0.5, "alpha_mean": 1 / k} for k in (1, 2)],
        "rows": {},
    }


def _cell(method: str, budget: str | None, seed: int, trial: Data, *, chosen: bool = True) -> Data:
    folder = "/".join(
        ["cells", f"seed-{seed}", f"trial-{TRIALS.index(trial) if trial else 0}", method, *filter(None, [budget])]
    )
    cell = {"method": method, "budget": budget, "seed": seed, "trial": trial, "folder": folder}
    known = AUCS[method][budget]
    if known is None:
        return cell | _infeasible(REASON)
    mean, spread = known
    auc = mean + (0, -1, 1)[seed] * spread  # three seeds have exactly this mean and standard deviation
    size = int((SHARES[budget] if budget else 1) * ORIGINAL) - (64 * seed if budget else 0)
    return cell | {
        "status": "done",
        "reason": None,
        "bytes": size,
        "params": size // 4,
        "epochs": 3,
        "seconds": SECONDS[method] + seed,
        "validation": {"auc": auc + 0.001, "log_loss": 0.52 + (0 if chosen else 0.01)},
        "chosen": chosen,
        "test": {"auc": auc, "log_loss": 1.3 - auc} if chosen else None,
        "stages": {stage: _epochs(auc) for stage in STAGES[method]},
    }


def _infeasible(reason: str) -> Data:
    nothing = dict.fromkeys(("bytes", "params", "epochs", "seconds", "validation", "test"))
    return {"status": "infeasible", "reason": reason, **nothing, "chosen": False, "stages": {}}


def _epochs(auc: float) -> list[Data]:
    first = {"epoch": 0, "seconds": 0.0, "steps": 0, "train_loss": None, "auc": 0.5, "log_loss": 0.69}
    later = [
        {"epoch": k, "seconds": 3.0, "steps": 9, "train_loss": 0.6 / k, "auc": auc - 0.01 / k, "log_loss": 0.5 + 0.1 / k}
        for k in (1, 2, 3)
    ]
    return [first, *later]


def plan_of(tables: int) -> Data:
    entries = [_table(number) for number in range(tables)]
    original, size = (sum(entry[key] for entry in entries) for key in ("original_bytes", "size_bytes"))
    head = {"format": "embsearch-plan", "version": 1, "align": 4, "n_params": size // 4}
    return {**head, "original_bytes": original, "size_bytes": size, "tables": entries}


def _table(number: int) -> Data:
    """Return a table of 20 rows or of millions, its most frequent rows kept best and its rarest dropped."""
    rows = 20 * 10 ** (number % 6)
    blocks = [
        {"rows": rows // 20, "dim": 16},
        {"rows": rows // 4, "dim": 4},
        {"rows": rows - rows // 20 - rows // 4, "dim": 0},
    ]
    return {
        "collection": "model.ebc",
        "name": f"t_cat_{number}",
        "rows": rows,
        "dim": 32,
        "dtype": "float32",
        "features": [f"cat_{number}"],
        "kind": "blocks",
        "blocks": blocks,
        "size_bytes": sum(4 * block["rows"] * block["dim"] for block in blocks) + 4 * rows,
        "original_bytes": 4 * rows * 32,
    }
