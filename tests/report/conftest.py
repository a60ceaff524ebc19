"""A small run, as plain data, and a way to write it down."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Data = dict[str, Any]


@pytest.fixture
def metrics() -> Data:
    stages = {
        stage: [
            {"epoch": epoch, "seconds": 3.0, "train_loss": 0.6 / epoch, "auc": 0.7 + 0.01 * epoch, "log_loss": 0.5}
            for epoch in range(1, 4)
        ]
        for stage in ("dense", "search", "fine-tune")
    }
    return {
        "recipe": {"search": {"algorithm": "dnis", "budget": "10%"}, "seed": 0},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpus": 2, "platform": "Linux"},
        "budget": {"text": "10%", "bytes": 1_258_291},
        "models": [_model("dense", 12_582_912, 40.0, 0.8034), _model("compact", 1_258_291, 80.0, 0.8012)],
        "stages": stages,
        "search": {
            "algorithm": "dnis",
            "course": [{"step": 100 * k, "loss": 0.5, "alpha_mean": 1 / k} for k in (1, 2)],
        },
    }


def _model(name: str, size: int, seconds: float, auc: float) -> Data:
    score = {"auc": auc, "log_loss": 0.5}
    return {
        "name": name,
        "bytes": size,
        "params": 1,
        "epochs": 3,
        "seconds": seconds,
        "validation": score,
        "test": score,
    }


@pytest.fixture
def make_plan() -> Callable[[int], Data]:
    def plan(tables: int) -> Data:
        entries = [_table(number) for number in range(tables)]
        original, size = (sum(entry[key] for entry in entries) for key in ("original_bytes", "size_bytes"))
        head = {"format": "embsearch-plan", "version": 1, "align": 4, "n_params": size // 4}
        return {**head, "original_bytes": original, "size_bytes": size, "tables": entries}

    return plan


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


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[[Data, Data], Path]:
    def write(metrics: Data, plan: Data) -> Path:
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        return tmp_path

    return write
