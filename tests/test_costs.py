"""What is counted: bytes as tensors have them, and parameters without indices."""

import pytest
import torch
from support import WORLDS, searched, stored_bytes

from embsearch_plugin.collection import Table
from embsearch_plugin.costs import Unit, human_bytes

TABLE = Table("c", "t", 300, 8, torch.float16, ("f",))


def test_parameters_know_no_indices() -> None:
    bytes_, parameters = Unit.BYTES, Unit.PARAMETERS
    assert (bytes_.weights(TABLE, 10), parameters.weights(TABLE, 10)) == (20, 10)
    assert (bytes_.remap(TABLE), parameters.remap(TABLE)) == (1200, 0)
    assert (bytes_.placement(TABLE), parameters.placement(TABLE)) == (32, 0)
    assert (bytes_.fine_index(TABLE, 7), parameters.fine_index(TABLE, 7)) == (301 * 4 + 7, 0)
    assert (bytes_.projected_column(TABLE), parameters.projected_column(TABLE)) == (32, 8)  # float32
    assert (bytes_.text(2048), parameters.text(2048)) == ("2.0 KiB", "2,048 parameters")


@pytest.mark.parametrize("world", ["bags", "half"])
def test_a_plan_costs_what_its_tensors_take(world: str) -> None:
    model, session, _ = searched(WORLDS[world])
    plan = session.derive()
    compact = session.compact(plan)
    weights = sum(p.numel() for p in compact.collection.parameters())
    assert (Unit.BYTES.of(plan), Unit.PARAMETERS.of(plan)) == (stored_bytes(model), weights)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.6, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (1023.94 * 1024, "1023.9 KiB"),
        (1023.99 * 1024, "1.0 MiB"),
        (3.14 * 2**20, "3.1 MiB"),
        (2**30, "1.0 GiB"),
        (2**40, "1.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_as_people_read_them(count: float, text: str) -> None:
    assert human_bytes(count) == text
