"""SizePlan: how many rows and columns each table keeps. Plain data: print it, diff it, commit it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from embsearch_plugin.collection import Table
from embsearch_plugin.costs import PROJECTION_DTYPE, Unit, human_bytes
from embsearch_plugin.errors import PlanError
from embsearch_plugin.files import atomic, write_json

FORMAT, VERSION = "embsearch-plan", 1


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a plan, and how many columns each of them keeps (a mean in a fine-grained plan)."""

    rows: int
    dim: float


@dataclass(frozen=True)
class Chunk:
    """Columns ``[start, start + width)`` of the column order, stored for the first ``rows`` rows of the row order."""

    start: int
    width: int
    rows: int


@dataclass(frozen=True, eq=False)
class TablePlan:
    """What one table keeps.

    Rows stand in plan order: blocks by falling dim, within a block by falling frequency. Every block keeps the first
    ``dim`` columns of the column order, so blocks nest and a column chunk is stored for a prefix of the rows.

    Args:
        table: the original table.
        blocks: ``(rows, dim)`` in plan order; the rows sum to the table's.
        order: int32 (kept rows,), ``order[i]`` is the original row at place i; rows of dim 0 are not listed. ``None``
            where the rows already stand in plan order.
        columns: (D,), a permutation: ``columns[k]`` is the original column at place k. ``None`` for the natural order. Stored
            only where there is no projection, whose rows stand in that order.
        mask: bool (V, D), the weights kept by a fine-grained plan; then ``order`` and ``columns`` are ``None``.
        projection: whether the K stored columns are projected to the table's D by a matrix (K, D); otherwise they are
            padded with zeros.
        bias: whether a vector (D,) is added to the output of every bag, empty ones too.

    Raises:
        PlanError: where these do not fit each other or the table.
    """

    table: Table
    blocks: tuple[Block, ...]
    order: Tensor | None = None
    columns: tuple[int, ...] | None = None
    mask: Tensor | None = None
    projection: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        problem = next(self._problems(), None)
        if problem:
            raise PlanError(f"the plan of table {str(self.table)!r} is malformed: {problem}")

    def _problems(self) -> Iterator[str]:
        """Yield what does not fit: the one place where plans are checked, built or loaded."""
        rows, dim, dims = self.table.rows, self.table.dim, [block.dim for block in self.blocks]
        if (self.projection or self.bias) and (self.mask is not None or not any(dims)):
            yield "a projection and a bias need stored columns, kept by blocks"
        if any(block.rows < 1 for block in self.blocks) or sum(block.rows for block in self.blocks) != rows:
            yield f"its blocks must hold one row or more each, and the table's {rows} together"
        if not all(0 <= d <= dim for d in dims):
            yield f"dims must lie between 0 and the table's {dim}; got {dims}"
        if self.mask is not None:
            if self.mask.dtype != torch.bool or self.mask.shape != (rows, dim):
                yield f"its mask must be bool ({rows}, {dim}); got {self.mask.dtype} {tuple(self.mask.shape)}"
            return
        if dims != sorted(dims, reverse=True):
            yield f"blocks must stand by falling dim; got {dims}"
        if self.order is not None and not self._lists_kept_rows(self.order):
            yield "its row order must list, as int32, every row that is kept once"
        if self.columns is not None and (len(self.columns) != dim or sorted(self.columns) != list(range(dim))):
            yield f"its column order must be a permutation of {dim} columns"

    def _lists_kept_rows(self, order: Tensor) -> bool:
        kept = sum(block.rows for block in self.blocks if block.dim)
        if order.dtype != torch.int32 or order.shape != (kept,):
            return False
        distinct = order.unique()
        return distinct.numel() == kept and bool(((distinct >= 0) & (distinct < self.table.rows)).all())

    @classmethod
    def nested(
        cls,
        table: Table,
        dims: Sequence[int],
        rows: Sequence[Tensor],
        columns: Sequence[int] | None = None,
        *,
        projection: bool = False,
        bias: bool = False,
    ) -> "TablePlan":
        """Build a plan from each row block's dim and rows (int32 tensors of original row numbers).

        A table that keeps nothing has no projection and no bias either.
        """
        ranked = sorted(zip(dims, rows, strict=True), key=lambda pair: -pair[0])
        ranked = [(dim, block) for dim, block in ranked if block.numel()]
        blocks = tuple(Block(block.numel(), int(dim)) for dim, block in ranked)
        placed = None if columns is None else tuple(int(column) for column in columns)
        if placed == tuple(range(table.dim)) or all(b.dim in (0, table.dim) for b in blocks):
            placed = None
        output = (projection, bias) if blocks[0].dim else (False, False)
        if len({block.dim for block in blocks}) == 1:
            return cls(table, (Block(table.rows, blocks[0].dim),), None, placed, None, *output)
        order = torch.cat([block for dim, block in ranked if dim]).int().cpu()
        ranked_already = torch.equal(order, torch.arange(order.numel(), dtype=order.dtype))
        return cls(table, blocks, None if ranked_already else order, placed, None, *output)

    @classmethod
    def fine(cls, table: Table, mask: Tensor, rows: Sequence[Tensor]) -> "TablePlan":
        """Build a fine-grained plan from the weights to keep, bool (V, D); ``rows`` are the blocks to report by."""
        kept = mask.sum(1)
        blocks = tuple(Block(r.numel(), round(float(kept[r.long()].float().mean()), 3)) for r in rows if r.numel())
        return cls(table, blocks, mask=mask.bool().cpu())

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The column chunks as stored: one per distinct dim, each for the rows that keep it."""
        if self.mask is not None:
            return ()
        chunks, start = [], 0
        for dim in sorted({int(block.dim) for block in self.blocks} - {0}):
            chunks.append(Chunk(start, dim - start, sum(b.rows for b in self.blocks if b.dim >= dim)))
            start = dim
        return tuple(chunks)

    @property
    def width(self) -> int:
        """The largest dim that any row keeps."""
        if self.mask is not None:
            return int(self.mask.sum(1).max())
        return int(self.blocks[0].dim)

    @property
    def n_weights(self) -> int:
        """Number of embedding weights kept."""
        if self.mask is not None:
            return int(self.mask.sum())
        return sum(chunk.rows * chunk.width for chunk in self.chunks)

    @property
    def n_output_params(self) -> int:
        """Number of weights of the projection and the bias."""
        return (self.width * self.projection + self.bias) * self.table.dim

    @property
    def n_params(self) -> int:
        """Number of weights kept, with those of the projection and the bias."""
        return self.n_weights + self.n_output_params

    @property
    def size_bytes(self) -> int:
        """Bytes as stored: weights, the indices that find them, projection and bias."""
        weights = self.n_weights * self.table.dtype.itemsize
        if self.mask is not None:
            return weights + Unit.BYTES.fine_index(self.table, self.n_weights)
        remap = Unit.BYTES.remap(self.table) if self.order is not None else 0
        placement = Unit.BYTES.placement(self.table) if self.columns is not None and not self.projection else 0
        return weights + remap + placement + self.n_output_params * PROJECTION_DTYPE.itemsize


@dataclass(frozen=True, eq=False)
class SizePlan:
    """How many rows and columns every table keeps.

    Args:
        tables: a :class:`TablePlan` per table, in the model's order.
        align: stored widths are multiples of it.

    Raises:
        PlanError: where ``align`` is below one.
    """

    tables: tuple[TablePlan, ...]
    align: int = 4

    def __post_init__(self) -> None:
        if self.align < 1:
            raise PlanError(f"align must be at least 1; got {self.align}.")

    @property
    def n_params(self) -> int:
        """Number of weights kept, projections and biases included."""
        return sum(plan.n_params for plan in self.tables)

    @property
    def size_bytes(self) -> int:
        """Bytes of all compact tables as stored, indices included; equals the ``nbytes`` of their tensors."""
        return sum(plan.size_bytes for plan in self.tables)

    @property
    def original_bytes(self) -> int:
        """Weight bytes of the tables before."""
        return sum(plan.table.size_bytes for plan in self.tables)

    def for_collection(self, collection: str) -> tuple[TablePlan, ...]:
        """Return the plans of one collection's tables."""
        return tuple(plan for plan in self.tables if plan.table.collection == collection)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and beside it, named by its hash, one safetensors file with row orders and masks."""
        path = Path(path)
        tensors = {f"{number}/{key}": t for number, plan in enumerate(self.tables) for key, t in _tensors(plan)}
        content = save_tensors(tensors)
        sidecar = f"{path.stem}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors" if tensors else None
        if sidecar:
            with atomic(path.parent / sidecar) as temporary:
                temporary.write_bytes(content)
        write_json(path, self.to_json(sidecar))

    def to_json(self, sidecar: str | None = None) -> dict[str, Any]:
        """Return the plan as plain data; ``sidecar`` names the file that holds row orders and masks."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "align": self.align,
            "original_bytes": self.original_bytes,
            "size_bytes": self.size_bytes,
            "n_params": self.n_params,
            "sidecar": sidecar,
            "tables": [_table_to_json(plan) for plan in self.tables],
        }

    @classmethod
    def load(cls, path: str | Path) -> "SizePlan":
        """Read a plan.

        Raises:
            PlanError: where the file is missing, cut short, edited or of another format, or its sidecar is not the one
                it names.
        """
        path = Path(path)
        data = _read_json(path)
        tensors = {} if data.get("sidecar") is None else _read_sidecar(path, str(data["sidecar"]))
        try:
            tables = (_table_from_json(entry, f"{number}/", tensors) for number, entry in enumerate(data["tables"]))
            plan = cls(tuple(tables), int(data["align"]))
            # Every value was converted to its type, so that what was not of that type, or does not follow from the
            # rest, differs now.
            same = _text(plan.to_json(data["sidecar"])) == _text(data)
        except KeyError as error:
            raise PlanError(f"{path} is not a whole size plan: {error} is missing. Save it again.") from error
        except (OverflowError, PlanError, TypeError, ValueError) as error:
            raise PlanError(f"{path} was edited or damaged: {error}. Save it again.") from error
        if not same:
            raise PlanError(f"{path} was edited or damaged: its sizes do not follow from its tables. Save it again.")
        return plan

    def __str__(self) -> str:
        """A table a person can read: rows, dims per block, bytes before and after."""
        lines = [f"{'table':<32}{'rows':>12}{'bytes before':>14}{'after':>12}  blocks (rows x dim)"]
        for plan in self.tables:
            blocks = "  ".join(f"{b.rows:,} x {b.dim:g}" for b in plan.blocks) + _kinds(plan)
            before, after = human_bytes(plan.table.size_bytes), human_bytes(plan.size_bytes)
            lines.append(f"{str(plan.table)[-31:]:<32}{plan.table.rows:>12,}{before:>14}{after:>12}  {blocks}")
        share = self.size_bytes / self.original_bytes if self.original_bytes else 1.0
        total = f"{human_bytes(self.size_bytes)} of {human_bytes(self.original_bytes)} ({share:.2%})"
        return "\n".join([*lines, f"{total}, {self.n_params:,} parameters"])


def _kinds(plan: TablePlan) -> str:
    kinds = {"fine": plan.mask is not None, "projected": plan.projection, "bias": plan.bias}
    return "".join(f"  {kind}" for kind, present in kinds.items() if present)


def _tensors(plan: TablePlan) -> Iterator[tuple[str, Tensor]]:
    if plan.order is not None:
        yield "order", plan.order
    if plan.mask is not None:
        yield "mask", pack_bits(plan.mask)


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def _table_to_json(plan: TablePlan) -> dict[str, Any]:
    table = plan.table
    return {
        "collection": table.collection,
        "name": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "dtype": str(table.dtype).removeprefix("torch."),
        "features": list(table.features),
        "kind": "blocks" if plan.mask is None else "fine",
        "blocks": [{"rows": block.rows, "dim": block.dim} for block in plan.blocks],
        "columns": plan.columns,
        "ordered": plan.order is not None,
        "projection": plan.projection,
        "bias": plan.bias,
        "size_bytes": plan.size_bytes,
        "original_bytes": table.size_bytes,
    }


def _table_from_json(entry: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> TablePlan:
    dtype = getattr(torch, str(entry["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {entry['dtype']!r}")
    features = tuple(str(feature) for feature in entry["features"])
    table = Table(str(entry["collection"]), str(entry["name"]), int(entry["rows"]), int(entry["dim"]), dtype, features)
    if entry["kind"] == "fine":
        blocks = tuple(Block(int(block["rows"]), float(block["dim"])) for block in entry["blocks"])
        return TablePlan(table, blocks, mask=unpack_bits(tensors[prefix + "mask"], table.rows, table.dim))
    blocks = tuple(Block(int(block["rows"]), int(block["dim"])) for block in entry["blocks"])
    order = tensors[prefix + "order"] if entry["ordered"] else None
    columns = None if entry["columns"] is None else tuple(int(column) for column in entry["columns"])
    return TablePlan(table, blocks, order, columns, None, bool(entry["projection"]), bool(entry["bias"]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read the size plan {path}: {error.strerror}.") from error
    except (RecursionError, ValueError) as error:
        raise PlanError(f"{path} is not a whole size plan ({error}); it may have been cut short. Save it again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f"{path} is not a size plan: it must hold an object with format {FORMAT!r}.")
    if data.get("version") != VERSION:
        raise PlanError(f"{path} has format version {data.get('version')!r}; this version of the plugin reads {VERSION}.")
    return data


def _read_sidecar(path: Path, name: str) -> dict[str, Tensor]:
    sidecar = path.parent / Path(name).name
    try:
        content = sidecar.read_bytes()
    except (OSError, ValueError) as error:
        raise PlanError(f"the size plan {path} needs {name!r} beside it: {error}. Copy both files.") from error
    if hashlib.sha256(content).hexdigest()[:16] not in name:
        raise PlanError(f"{sidecar} is damaged: its content is not what its name says. Save the plan again.")
    try:
        return load_tensors(content)
    except SafetensorError as error:
        raise PlanError(f"{sidecar} is not a safetensors file ({error}).") from error


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor into uint8, eight to a byte."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`pack_bits`: bool (rows, columns).

    Raises:
        ValueError: where ``packed`` does not hold that many bits.
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-rows * columns // 8),):
        raise ValueError(f"a packed mask of {rows} x {columns} bits has another size")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: rows * columns].view(rows, columns).bool()


def mismatch(tables: Sequence[Table], plan: SizePlan) -> str:
    """Say how a plan's tables differ from a model's."""
    planned = {str(p.table): p.table for p in plan.tables}
    present = {str(t): t for t in tables}
    lines = [f"the plan has {name!r}, the model has not" for name in sorted(planned.keys() - present.keys())]
    lines += [f"the model has {name!r}, the plan has not" for name in sorted(present.keys() - planned.keys())]
    for name in sorted(planned.keys() & present.keys()):
        if planned[name] != present[name]:
            lines.append(f"{name!r} is {_describe(planned[name])} in the plan and {_describe(present[name])} in the model")
    shown = "; ".join(lines[:4]) + ("; ..." if len(lines) > 4 else "") or "the tables stand in another order"
    return f"this size plan is for another model: {shown}.\n  Possible solution: derive a plan from a search on this model."


def _describe(table: Table) -> str:
    return f"{table.rows:,} x {table.dim} {str(table.dtype).removeprefix('torch.')} for {list(table.features)}"
