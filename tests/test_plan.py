"""Size plans: what they keep, what it costs, and that a file is either read back equal or refused."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from embsearch_plugin.collection import Table
from embsearch_plugin.errors import PlanError
from embsearch_plugin.plan import Block, Chunk, SizePlan, TablePlan, mismatch, pack_bits, unpack_bits


def table(rows: int = 6, dim: int = 8, name: str = "t", collection: str = "ebc", dtype: torch.dtype = torch.float32) -> Table:
    return Table(collection, name, rows, dim, dtype, (f"f_{name}",))


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def plan_of_every_kind() -> SizePlan:
    """One table of each form that a plan can give it."""
    mask = torch.arange(5 * 3).view(5, 3) % 2 == 0
    return SizePlan(
        (
            TablePlan.nested(table(name="whole"), [8], [rows(5, 4, 3, 2, 1, 0)]),
            TablePlan.nested(table(name="narrow"), [4], [rows(5, 4, 3, 2, 1, 0)], [7, 6, 5, 4, 3, 2, 1, 0]),
            TablePlan.nested(table(name="dropped"), [0], [rows(5, 4, 3, 2, 1, 0)]),
            TablePlan.nested(table(name="blocks"), [8, 0, 4], [rows(5, 1), rows(3), rows(0, 2, 4)]),
            TablePlan.nested(table(name="ranked", dtype=torch.float16), [8, 4], [rows(0, 1), rows(2, 3, 4, 5)]),
            TablePlan.fine(table(5, 3, name="fine"), mask, [rows(0, 1), rows(2, 3, 4)]),
            TablePlan.nested(
                table(name="projected"),
                [4, 2],
                [rows(0, 1), rows(2, 3, 4, 5)],
                [7, 6, 5, 4, 3, 2, 1, 0],
                projection=True,
                bias=True,
            ),
        ),
        align=2,
    )


def assert_equal(got: SizePlan, expected: SizePlan) -> None:
    assert got.to_json() == expected.to_json()
    for one, other in zip(got.tables, expected.tables, strict=True):
        assert one.table == other.table
        assert (one.blocks, one.columns) == (other.blocks, other.columns)
        assert (one.projection, one.bias) == (other.projection, other.bias)
        for a, b in ((one.order, other.order), (one.mask, other.mask)):
            assert (a is None) == (b is None)
            assert a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b))


# What one table keeps.


@st.composite
def nested_cases(draw: st.DrawFn) -> tuple[Table, list[int], list[list[int]], list[int] | None]:
    """A table, and each row block's dim and rows; blocks may be empty, columns unordered."""
    dim = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any))
    dims = draw(st.lists(st.integers(0, dim), min_size=len(sizes), max_size=len(sizes)))
    numbers = draw(st.one_of(st.just(list(range(sum(sizes)))), st.permutations(range(sum(sizes)))))
    blocks = [numbers[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    columns = draw(st.one_of(st.none(), st.just(list(range(dim))), st.permutations(range(dim))))
    return table(sum(sizes), dim, dtype=draw(st.sampled_from([torch.float32, torch.float16]))), dims, blocks, columns


@given(nested_cases())
def test_a_nested_plan_keeps_the_leading_columns_of_every_row(
    case: tuple[Table, list[int], list[list[int]], list[int] | None],
) -> None:
    spec, dims, blocks, columns = case
    plan = TablePlan.nested(spec, dims, [rows(*block) for block in blocks], columns)

    kept_of_row = {row: dim for dim, block in zip(dims, blocks, strict=True) for row in block}
    expected = torch.zeros(spec.rows, spec.dim, dtype=torch.bool)
    for row, kept in kept_of_row.items():
        expected[row, (columns or list(range(spec.dim)))[:kept]] = True

    order = range(spec.rows) if plan.order is None else plan.order.tolist()
    placed = range(spec.dim) if plan.columns is None else plan.columns
    stored = torch.zeros(spec.rows, spec.dim, dtype=torch.int32)
    for chunk in plan.chunks:
        for place in range(chunk.rows):
            stored[order[place], list(placed[chunk.start : chunk.start + chunk.width])] += 1
    assert torch.equal(stored, expected.int())  # every kept weight once, no other

    assert plan.n_params == int(expected.sum())
    assert plan.width == max(kept_of_row.values())
    distinct = sorted(set(kept_of_row.values()) - {0})
    assert [chunk.start + chunk.width for chunk in plan.chunks] == distinct
    assert [block.dim for block in plan.blocks] == sorted((block.dim for block in plan.blocks), reverse=True)
    indices = (spec.rows if plan.order is not None else 0) + (spec.dim if plan.columns is not None else 0)
    assert plan.size_bytes == plan.n_params * spec.dtype.itemsize + 4 * indices


def test_blocks_stand_by_falling_dim_and_within_one_dim_as_they_came() -> None:
    plan = TablePlan.nested(table(7), [4, 0, 8, 4], [rows(6, 2), rows(0), rows(5), rows(1, 4, 3)])
    assert plan.blocks == (Block(1, 8), Block(2, 4), Block(3, 4), Block(1, 0))
    assert plan.order is not None
    assert plan.order.tolist() == [5, 6, 2, 1, 4, 3]
    assert plan.order.dtype == torch.int32
    assert plan.chunks == (Chunk(0, 4, 6), Chunk(4, 4, 1))


@pytest.mark.parametrize("dim", [0, 4, 8])
def test_a_table_of_one_dim_needs_no_row_order(dim: int) -> None:
    plan = TablePlan.nested(table(), [dim, dim, 4], [rows(5, 4), rows(3, 2, 1, 0), rows()])
    assert plan.order is None
    assert plan.blocks == (Block(6, dim),)
    assert plan.size_bytes == 6 * dim * 4


def test_rows_that_are_ranked_already_need_no_row_order() -> None:
    assert TablePlan.nested(table(), [8, 4, 0], [rows(0, 1), rows(2, 3), rows(5, 4)]).order is None
    assert TablePlan.nested(table(), [4, 8, 0], [rows(0, 1), rows(2, 3), rows(5, 4)]).order is not None


@pytest.mark.parametrize(
    ("dims", "columns", "kept"),
    [
        ([8, 4], None, None),
        ([8, 4], [0, 1, 2, 3, 4, 5, 6, 7], None),
        ([8, 4], [7, 1, 2, 3, 4, 5, 6, 0], (7, 1, 2, 3, 4, 5, 6, 0)),
        ([8, 0], [7, 1, 2, 3, 4, 5, 6, 0], None),  # rows are whole or gone: any order of columns does
        ([0, 0], [7, 1, 2, 3, 4, 5, 6, 0], None),
    ],
)
def test_a_column_order_is_kept_only_where_it_matters(
    dims: Sequence[int], columns: Sequence[int] | None, kept: tuple[int, ...] | None
) -> None:
    assert TablePlan.nested(table(), dims, [rows(0, 1), rows(2, 3, 4, 5)], columns).columns == kept


def test_numbers_from_torch_become_plain() -> None:
    dims, columns = torch.tensor([8, 4]), torch.arange(8).flip(0)
    plan = TablePlan.nested(table(), list(dims), [torch.tensor([3, 4]), torch.tensor([0, 1, 2, 5])], list(columns))
    assert json.dumps(SizePlan((plan,)).to_json())
    assert plan.order is not None
    assert plan.order.dtype == torch.int32


def test_a_fine_plan_keeps_single_weights() -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]])
    plan = TablePlan.fine(table(4, 3, dtype=torch.float16), mask, [rows(1, 0), rows(), rows(2), rows(3)])
    assert plan.blocks == (Block(2, 2.0), Block(1, 0.0), Block(1, 1.0))
    assert plan.mask is not None
    assert plan.mask.dtype == torch.bool
    assert (plan.n_params, plan.width, plan.chunks) == (5, 3, ())
    assert plan.size_bytes == 5 * 2 + 5 * 1 + (4 + 1) * 4  # values, column numbers, row starts


@pytest.mark.parametrize(("dim", "itemsize"), [(256, 1), (257, 2), (2**15, 2), (2**15 + 1, 4)])
def test_column_numbers_are_as_small_as_the_dim_allows(dim: int, itemsize: int) -> None:
    plan = TablePlan.fine(table(1, dim), torch.ones(1, dim), [rows(0)])
    assert plan.size_bytes == dim * (4 + itemsize) + 2 * 4


@given(st.integers(0, 9), st.integers(1, 9), st.randoms())
def test_bits_are_packed_and_unpacked(n: int, columns: int, random: Random) -> None:
    mask = torch.tensor([[random.random() < 0.5 for _ in range(columns)] for _ in range(n)]).view(n, columns).bool()
    packed = pack_bits(mask)
    flat = mask.flatten().tolist()
    assert packed.tolist() == [sum(1 << i for i, bit in enumerate(flat[k : k + 8]) if bit) for k in range(0, len(flat), 8)]
    assert torch.equal(unpack_bits(packed, n, columns), mask)


@pytest.mark.parametrize("packed", [torch.zeros(1, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), torch.zeros(2)])
def test_bits_of_another_size_are_refused(packed: Tensor) -> None:
    with pytest.raises(ValueError, match="a packed mask of 3 x 4 bits has another size"):
        unpack_bits(packed, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ()}, "hold one row or more each, and the table's 6 together"),
        ({"blocks": (Block(5, 8),)}, "hold one row or more each, and the table's 6 together"),
        ({"blocks": (Block(7, 8), Block(-1, 4))}, "hold one row or more each"),
        ({"blocks": (Block(6, 9),)}, r"dims must lie between 0 and the table's 8; got \[9\]"),
        ({"blocks": (Block(6, -1),)}, "dims must lie between 0 and the table's 8"),
        ({"blocks": (Block(6, float("nan")),), "mask": torch.ones(6, 8).bool()}, "dims must lie between 0"),
        ({"blocks": (Block(2, 4), Block(4, 8))}, r"blocks must stand by falling dim; got \[4, 8\]"),
        ({"order": rows(0, 1, 2, 3)}, "row order must list, as int32, every row that is kept once"),
        ({"order": rows(0, 1, 2, 3, 3)}, "row order must list"),
        ({"order": rows(0, 1, 2, 3, 6)}, "row order must list"),
        ({"order": rows(-1, 1, 2, 3, 0)}, "row order must list"),
        ({"order": rows(0, 1, 2, 3, 4).long()}, "row order must list"),
        ({"columns": (0, 1, 2)}, "column order must be a permutation of 8 columns"),
        ({"columns": (0, 1, 2, 3, 4, 5, 6, 6)}, "column order must be a permutation of 8 columns"),
        ({"mask": torch.ones(8, 6).bool()}, r"mask must be bool \(6, 8\); got torch.bool \(8, 6\)"),
        ({"mask": torch.ones(6, 8)}, r"mask must be bool \(6, 8\); got torch.float32 \(6, 8\)"),
    ],
)
def test_parts_that_do_not_fit_the_table(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"the plan of table 'ebc.t' is malformed: .*{message}"):
        TablePlan(table(), **{"blocks": (Block(2, 8), Block(3, 4), Block(1, 0)), **options})


def test_rows_that_stand_in_two_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match="row order must list"):
        TablePlan.nested(table(), [8, 4], [rows(5, 1), rows(1, 2, 3, 4)])


# The whole plan.


def test_sums_over_tables() -> None:
    plan = plan_of_every_kind()
    projection, bias = 4 * 8, 8
    assert plan.n_params == 48 + 24 + 0 + (2 * 8 + 3 * 4) + (2 * 8 + 4 * 4) + 8 + (2 * 4 + 4 * 2) + projection + bias
    assert plan.original_bytes == 5 * 48 * 4 + 48 * 2 + 15 * 4
    placement, remap, starts = 8 * 4, 6 * 4, 6 * 4  # a projection's rows stand in the columns' order, which is not stored
    weights = (48 + 24 + 28 + 16) * 4 + 32 * 2 + 8 * (4 + 1)
    assert plan.size_bytes == weights + placement + remap + starts + (projection + bias) * 4


def test_tables_of_one_collection() -> None:
    plans = [TablePlan.nested(table(collection=c, name=n), [8], [rows(0, 1, 2, 3, 4, 5)]) for c, n in ["ax", "by", "az"]]
    assert [p.table.name for p in SizePlan(tuple(plans)).for_collection("a")] == ["x", "z"]


def test_as_text() -> None:
    lines = str(plan_of_every_kind()).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "ebc.whole",
        "ebc.narrow",
        "ebc.dropped",
        "ebc.blocks",
        "ebc.ranked",
        "ebc.fine",
        "ebc.projected",
    ]
    assert lines[4].split() == ["ebc.blocks", "6", "192", "B", "136", "B", "2", "x", "8", "3", "x", "4", "1", "x", "0"]
    assert lines[6].split() == ["ebc.fine", "5", "60", "B", "64", "B", "2", "x", "1.5", "3", "x", "1.667", "fine"]
    assert lines[7].split()[-8:] == ["2", "x", "4", "4", "x", "2", "projected", "bias"]
    assert lines[-1] == "808 B of 1.1 KiB (72.40%), 196 parameters"


def test_a_long_name_keeps_its_end() -> None:
    plan = TablePlan.nested(table(name="table_" + "x" * 40 + "_end"), [8], [rows(0, 1, 2, 3, 4, 5)])
    line = str(SizePlan((plan,))).splitlines()[1]
    assert line.startswith("x" * 27 + "_end ")


def test_align_is_at_least_one() -> None:
    with pytest.raises(PlanError, match="align must be at least 1; got 0"):
        SizePlan((), align=0)


# On disk.


def save_plan(plan: SizePlan, folder: Path, name: str = "plan.json") -> Path:
    plan.save(folder / name)
    return folder / name


def test_a_plan_is_read_back_equal(tmp_path: Path) -> None:
    plan = plan_of_every_kind()
    path = save_plan(plan, tmp_path)
    assert_equal(SizePlan.load(path), plan)
    assert_equal(SizePlan.load(str(path)), plan)
    sidecar = tmp_path / json.loads(path.read_text())["sidecar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, sidecar.name])
    assert sidecar.name == f"plan-{hashlib.sha256(sidecar.read_bytes()).hexdigest()[:16]}.safetensors"


@given(st.lists(nested_cases(), min_size=1, max_size=4))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_nested_plan_is_read_back_equal(tmp_path: Path, cases: list[Any]) -> None:
    plan = SizePlan(tuple(TablePlan.nested(t, dims, [rows(*b) for b in blocks], c) for t, dims, blocks, c in cases))
    assert_equal(SizePlan.load(save_plan(plan, tmp_path)), plan)


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_plan(plan_of_every_kind(), folder)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in "ab")
    assert first == second


def test_a_plan_that_needs_no_sidecar_has_none(tmp_path: Path) -> None:
    plan = SizePlan((TablePlan.nested(table(), [4], [rows(0, 1, 2, 3, 4, 5)]),))
    path = save_plan(plan, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert_equal(SizePlan.load(path), plan)


def test_the_json_can_be_read_by_a_person(tmp_path: Path) -> None:
    plan = SizePlan((TablePlan.nested(table(name="Größe"), [8, 4], [rows(5, 1), rows(0, 2, 3, 4)]),), align=4)
    text = save_plan(plan, tmp_path).read_text(encoding="utf-8")
    data = json.loads(text)
    assert '"name": "Größe"' in text
    assert re.fullmatch(r"plan-[0-9a-f]{16}\.safetensors", data.pop("sidecar"))
    assert data == {
        "format": "embsearch-plan",
        "version": 1,
        "align": 4,
        "original_bytes": 192,
        "size_bytes": 152,
        "n_params": 32,
        "tables": [
            {
                "collection": "ebc",
                "name": "Größe",
                "rows": 6,
                "dim": 8,
                "dtype": "float32",
                "features": ["f_Größe"],
                "kind": "blocks",
                "blocks": [{"rows": 2, "dim": 8}, {"rows": 4, "dim": 4}],
                "columns": None,
                "ordered": True,
                "projection": False,
                "bias": False,
                "size_bytes": 152,
                "original_bytes": 192,
            }
        ],
    }


def test_tables_of_odd_spelling(tmp_path: Path) -> None:
    spellings = [("", "a/b"), ("", "ü"), ("x.y", "#"), ("x.y", "0/order"), ("", "two  words\n"), ("a", "b.c"), ("a.b", "c")]
    blocks = [rows(5, 1), rows(0, 2, 3, 4)]
    plans = [
        TablePlan.nested(table(name=name, collection=c), [8, 4], [b.roll(n) for b in blocks])
        for n, (c, name) in enumerate(spellings)  # each with an order of its own; "a.b.c" is there twice
    ]
    assert_equal(SizePlan.load(save_plan(SizePlan(tuple(plans)), tmp_path)), SizePlan(tuple(plans)))


def test_a_plan_that_cannot_be_written_leaves_the_former_one(tmp_path: Path) -> None:
    path = save_plan(plan_of_every_kind(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    broken = SizePlan((TablePlan.nested(table(name=object()), [8], [rows(0, 1, 2, 3, 4, 5)]),))
    with pytest.raises(TypeError):
        broken.save(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the size plan .*none.json: No such file"):
        SizePlan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot read the size plan"):
        SizePlan.load(tmp_path)


def test_a_plan_that_was_cut_short(tmp_path: Path) -> None:
    path = save_plan(plan_of_every_kind(), tmp_path)
    whole = path.read_bytes().rstrip()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(PlanError, match="it may have been cut short"):
            SizePlan.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not a whole size plan"),
        (b"[" * 100_000, "is not a whole size plan"),
        (b"[]", "is not a size plan: it must hold an object with format 'embsearch-plan'"),
        (b'{"format": "other", "version": 1}', "is not a size plan"),
        (b'{"format": "embsearch-plan", "version": 2}', "has format version 2; this version of the plugin reads 1"),
        (b'{"format": "embsearch-plan"}', "has format version None"),
        (b'{"format": "embsearch-plan", "version": 1}', "'tables' is missing"),
    ],
)
def test_files_that_are_no_plan_of_this_version(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        SizePlan.load(tmp_path / "plan.json")


def test_lists_nested_however_deep(tmp_path: Path) -> None:
    for depth in range(1, 1200):
        nested = "[" * depth + "]" * depth
        text = f'{{"format": "embsearch-plan", "version": 1, "align": 1, "sidecar": null, "tables": [], "more": {nested}}}'
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanError):
            SizePlan.load(tmp_path / "plan.json")


def test_the_sidecar_must_be_the_one_that_was_written(tmp_path: Path) -> None:
    path = save_plan(plan_of_every_kind(), tmp_path)
    sidecar = tmp_path / json.loads(path.read_text())["sidecar"]
    content = sidecar.read_bytes()
    for damaged in (b"", content[:-1], content[:-1] + b"\xff"):
        sidecar.write_bytes(damaged)
        with pytest.raises(PlanError, match="is damaged: its content is not what its name says"):
            SizePlan.load(path)
    sidecar.unlink()
    with pytest.raises(PlanError, match=f"needs '{sidecar.name}' beside it: .*No such file.* Copy both files"):
        SizePlan.load(path)


def test_the_sidecar_is_sought_beside_the_plan_only(tmp_path: Path) -> None:
    path = save_plan(plan_of_every_kind(), tmp_path)
    data = json.loads(path.read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / data["sidecar"]).rename(tmp_path / "other" / data["sidecar"])
    path.write_text(json.dumps(data | {"sidecar": "other/" + data["sidecar"]}))
    with pytest.raises(PlanError, match="beside it"):
        SizePlan.load(path)


def test_a_sidecar_of_another_format(tmp_path: Path) -> None:
    path = save_plan(plan_of_every_kind(), tmp_path)
    rename_sidecar(path, b"not safetensors")
    with pytest.raises(PlanError, match="is not a safetensors file"):
        SizePlan.load(path)


def rename_sidecar(path: Path, content: bytes) -> None:
    """Put another sidecar beside a plan, under the name that its content asks for."""
    name = f"plan-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (path.parent / name).write_bytes(content)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sidecar": name}))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("3/order", rows(5, 1, 0, 2), "row order must list"),
        ("3/order", rows(5, 1, 0, 2, 2), "row order must list"),
        ("3/order", rows(5, 1, 0, 2, 6), "row order must list"),
        ("3/order", rows(5, 1, 0, 2, -1), "row order must list"),
        ("3/order", rows(5, 1, 0, 2, 4).float(), "row order must list"),
        ("3/order", rows(5, 1, 0, 2, 4)[:, None], "row order must list"),
        ("3/order", None, "'3/order' is missing"),
        ("5/mask", torch.zeros(1, dtype=torch.uint8), "a packed mask of 5 x 3 bits has another size"),
        ("5/mask", torch.zeros(3, dtype=torch.uint8), "a packed mask of 5 x 3 bits has another size"),
        ("5/mask", torch.zeros(2), "a packed mask of 5 x 3 bits has another size"),
        ("5/mask", torch.zeros(2, dtype=torch.uint8), "its sizes do not follow from its tables"),
    ],
)
def test_a_sidecar_that_does_not_fit_the_plan(tmp_path: Path, key: str, tensor: Tensor | None, message: str) -> None:
    path = save_plan(plan_of_every_kind(), tmp_path)
    tensors = load_file(tmp_path / json.loads(path.read_text())["sidecar"])
    tensors.pop(key)
    rename_sidecar(path, save(tensors if tensor is None else {**tensors, key: tensor}))
    with pytest.raises(PlanError, match=message):
        SizePlan.load(path)


Edit = Callable[[dict[str, Any]], object]
EDITS: dict[str, tuple[Edit, str]] = {
    "fewer rows": (lambda data: data["tables"][3]["blocks"][0].update(rows=1), "hold one row or more each"),
    "negative rows": (lambda data: data["tables"][3].update(blocks=[{"rows": 7, "dim": 8}, {"rows": -1, "dim": 0}]), "one row"),
    "a smaller dim": (lambda data: data["tables"][3]["blocks"][1].update(dim=2), "its sizes do not follow"),
    "a dim above the table's": (lambda data: data["tables"][0]["blocks"][0].update(dim=16), "between 0 and the table's 8"),
    "a dim that is text": (lambda data: data["tables"][0]["blocks"][0].update(dim="8"), "its sizes do not follow"),
    "rising dims": (lambda data: data["tables"][3]["blocks"].reverse(), "falling dim"),
    "columns twice": (lambda data: data["tables"][1].update(columns=[0] * 8), "permutation of 8 columns"),
    "too few columns": (lambda data: data["tables"][1].update(columns=[1, 0]), "permutation of 8 columns"),
    "an unknown kind": (lambda data: data["tables"][0].update(kind="odd"), "its sizes do not follow"),
    "an unknown dtype": (lambda data: data["tables"][0].update(dtype="float33"), "there is no dtype 'float33'"),
    "another thing of torch": (lambda data: data["tables"][0].update(dtype="nn"), "there is no dtype 'nn'"),
    "another spelling of a dtype": (lambda data: data["tables"][0].update(dtype="float"), "its sizes do not follow"),
    "a bool for a mean dim": (lambda data: data["tables"][5]["blocks"][0].update(dim=True), "its sizes do not follow"),
    "no end of rows": (lambda data: data["tables"][0].update(rows=float("inf")), "infinity"),
    "more columns than fit in memory": (lambda data: data["tables"][1].update(dim=10**12), "permutation of 1000000000000"),
    "a name that is a number": (lambda data: data["tables"][0].update(name=5), "its sizes do not follow"),
    "a feature that is a number": (lambda data: data["tables"][0].update(features=[5]), "its sizes do not follow"),
    "a bool for a number": (lambda data: data.update(version=True), "its sizes do not follow"),
    "align 0": (lambda data: data.update(align=0), "align must be at least 1"),
    "another size": (lambda data: data.update(size_bytes=data["size_bytes"] + 1), "its sizes do not follow"),
    "another number of weights": (lambda data: data.update(n_params=1), "its sizes do not follow"),
    "one table fewer": (lambda data: data["tables"].pop(), "its sizes do not follow"),
    "no sidecar": (lambda data: data.update(sidecar=None), "'3/order' is missing"),
    "a folder as sidecar": (lambda data: data.update(sidecar=".."), "needs '..' beside it"),
    "a sidecar that is no name": (lambda data: data.update(sidecar="a\0b"), "beside it"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_plans_are_refused(tmp_path: Path, name: str) -> None:
    edit, message = EDITS[name]
    path = save_plan(plan_of_every_kind(), tmp_path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as error:
        SizePlan.load(path)
    assert str(path) in str(error.value) or "beside it" in str(error.value)


PLACES = st.lists(st.integers(0, 100), min_size=1, max_size=6)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


def damage(data: Any, places: list[int], value: Any, drop: bool) -> None:
    """Walk into the data by the places' numbers; drop what is found there, or put another value."""
    for left, place in enumerate(places, 1 - len(places)):
        keys = list(data) if isinstance(data, dict) else range(len(data))
        key = keys[place % len(keys)]
        if left == 0 or not isinstance(data[key], dict | list) or not data[key]:
            break
        data = data[key]
    if drop:
        del data[key]
    else:
        data[key] = value


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plan(plan_of_every_kind(), tmp_path_factory.mktemp("saved"))


@given(places=PLACES, value=VALUES, drop=st.booleans())
@settings(max_examples=500)
def test_whatever_is_changed_is_refused_or_read_as_it_stands(saved: Path, places: list[int], value: Any, drop: bool) -> None:
    data = json.loads(saved.read_text())
    damage(data, places, value, drop)
    path = saved.with_name("changed.json")
    path.write_text(json.dumps(data))
    try:
        plan = SizePlan.load(path)
    except PlanError:
        return
    assert json.dumps(plan.to_json(data["sidecar"]), sort_keys=True) == json.dumps(data, sort_keys=True)
    assert str(plan)


# Plans of other models.


def two_tables() -> SizePlan:
    return SizePlan(tuple(TablePlan.nested(table(name=n), [8], [rows(0, 1, 2, 3, 4, 5)]) for n in "ab"))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([table(name="a")], "the plan has 'ebc.b', the model has not."),
        ([table(name=n) for n in "abc"], "the model has 'ebc.c', the plan has not."),
        ([table(name="b"), table(name="a")], "the tables stand in another order."),
        (
            [table(name="a"), table(1000, 4, "b", dtype=torch.float16)],
            "'ebc.b' is 6 x 8 float32 for ['f_b'] in the plan and 1,000 x 4 float16 for ['f_b'] in the model.",
        ),
        (
            [table(name=n) for n in "vwxyz"],
            "the plan has 'ebc.a', the model has not; the plan has 'ebc.b', the model has not; "
            "the model has 'ebc.v', the plan has not; the model has 'ebc.w', the plan has not; ....",
        ),
    ],
)
def test_the_difference_between_a_plan_and_a_model_is_said(tables: Sequence[Table], message: str) -> None:
    assert mismatch(tables, two_tables()) == (
        f"this size plan is for another model: {message}\n  Possible solution: derive a plan from a search on this model."
    )
