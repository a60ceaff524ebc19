"""The README's loops, run as they stand."""

import re
from pathlib import Path

import pytest
from support import stored_bytes

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    first, trained, second, third = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    assert (tmp_path / "out" / "plan.json").exists()
    assert stored_bytes(names["model"]) == names["plan"].size_bytes <= 0.1 * names["plan"].original_bytes
    assert "of 500.0 KiB" in capsys.readouterr().out
    exec(trained, names)
    assert 0 < stored_bytes(names["smaller"]) <= 0.1 * names["plan"].original_bytes
    exec(second, names)
    assert 0 < stored_bytes(names["model"]) <= 100 * 1024
    exec(third, names)
    assert re.search(r"[\d,]{7,} bytes: rows", capsys.readouterr().out)
    assert stored_bytes(names["model"]) > 0


def test_every_file_the_readme_links_to_exists() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        assert link.startswith("#") or (README.parent / link).exists(), link
