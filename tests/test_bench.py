"""The benchmark, in small: it measures what it says."""

from click.testing import CliRunner

from embsearch_plugin.bench import Bench, ratios
from embsearch_plugin.cli import main


def test_every_kind_of_step_is_measured() -> None:
    found = ratios(Bench(tables=3, rows=500, dim=8, batch=32, repeats=2), bag=4)
    assert set(found) == {"weight step", "search step", "compact step"}
    assert all(0 < ratio < 1000 for ratio in found.values())


def test_the_command_prints_a_line_per_kind_of_bag() -> None:
    result = CliRunner().invoke(main, ["bench", "--rows", "100", "--batch", "16", "--repeats", "2"])
    assert result.exit_code == 0, result.output
    assert "bags of 1 " in result.output
    assert "bags of 10" in result.output
