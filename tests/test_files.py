"""Files that are there whole or not at all, and states that come back as they were."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from embsearch_plugin.files import atomic, read_state, write_json, write_state, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    former = os.umask(0o027)
    yield
    os.umask(former)


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic(path) as temporary:
        temporary.write_text("text")
        assert not path.exists()
        assert temporary.parent == path.parent  # else it could not be moved in one step
    assert path.read_text() == "text"
    assert names(path.parent) == ["file.txt"]


def test_the_former_file_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("former")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "former"  # whoever has it open reads it to its end
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [False, True])
def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path: Path, error: type[BaseException], written: bool) -> None:
    path = tmp_path / "file.txt"
    path.write_text("former")
    with pytest.raises(error), atomic(path) as temporary:
        if written:
            temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "former"
    assert names(tmp_path) == ["file.txt"]


def test_an_error_before_there_was_a_file_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        1 / 0
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic(path) as first, atomic(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whose block ends last
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.usefixtures("umask")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    write_text(tmp_path / "text", "")
    write_state(tmp_path / "state", {})
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"any": "0o640", "text": "0o640", "state": "0o640"}


def test_json_is_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"Größe": [1, None]})
    assert (tmp_path / "a.json").read_bytes() == '{\n "Größe": [\n  1,\n  null\n ]\n}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        write_json(tmp_path / "a.json", {"value": value})
    assert names(tmp_path) == []


# States.

DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.tuples(st.integers(), st.text(max_size=2)))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        st.one_of(PLAIN, TENSORS),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.tuples(inner, inner), st.just(()), st.dictionaries(KEYS, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal in values, types and order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


@given(STATES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_state_is_read_back_equal(tmp_path: Path, state: dict[Any, Any]) -> None:
    write_state(tmp_path / "state", state)
    assert same(read_state(tmp_path / "state"), state)


def test_keys_that_look_like_the_markers_are_keys(tmp_path: Path) -> None:
    state = {"tensor": "0", "tuple": [1], "dict": {"tensor": torch.ones(1)}, "structure": None}
    write_state(tmp_path / "state", state)
    assert same(read_state(tmp_path / "state"), state)


def test_tensors_that_are_views_parameters_or_the_same_one_twice(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    state = {"all": whole, "turned": whole.t(), "column": whole[:, 1], "again": whole, "weight": nn.Parameter(whole)}
    write_state(tmp_path / "state", state)
    back = read_state(tmp_path / "state")
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value)
        assert not back[key].requires_grad
    back["all"].zero_()
    assert torch.equal(back["again"], whole)
    assert (tmp_path / "state").stat().st_size < 5 * whole.nbytes + 1000


def test_an_optimizer_goes_on_from_its_state(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1, amsgrad=True)
    (weight * torch.arange(3)).sum().backward()
    optimizer.step()
    write_state(tmp_path / "state", optimizer.state_dict())
    assert same(read_state(tmp_path / "state"), optimizer.state_dict())


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", lambda: None])
def test_what_a_state_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="a state holds tensors and plain values only; got"):
        write_state(tmp_path / "state", {"a": [{"b": value}]})
    assert names(tmp_path) == []


def test_a_state_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"a": torch.arange(20), "b": [1, 2.5, "text"]})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole state file"):
            read_state(path)


@pytest.mark.parametrize(
    "structure", [None, "", "{", "{}", '{"dict": [[1]]}', '{"dict": 5}', '{"dict": [[[], 1]]}', '{"tensor": "0"}']
)
def test_files_of_another_form(tmp_path: Path, structure: str | None) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "state", None if structure is None else {"structure": structure})
    with pytest.raises(ValueError, match="is not a whole state file"):
        read_state(tmp_path / "state")


def test_a_missing_state_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "state")
