"""From growing tables to a size plan and compact tables: the state of a stream, to be served.

Rows of width d_k go through the maps of a chain to D columns, so they lie in a subspace of d_k dimensions, which is part of
that of d_(k+1). In one basis of all of them, a row of width d_k has d_k numbers, and the table's projection, whose first rows
span the smaller subspaces, serves every width. The table's bias is the output of an id that is not there. How far an output is
from that lies in the row's subspace too: the biases of Eq. 1 that a shorter way leaves out are among what a larger row can
express.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection, TableIndex
from embsearch_plugin.errors import SessionError
from embsearch_plugin.plan import SizePlan, TablePlan
from embsearch_plugin.streaming.forms import Chain
from embsearch_plugin.streaming.table import GrowingTable


def plan_of(table: GrowingTable) -> TablePlan:
    """Return the plan that stores the rows as they are; ids that never came have none.

    Raises:
        SessionError: where ids came that the original table has no rows for.
    """
    spec, ids = table.spec, table.ids.ids
    outside = ids[(ids < 0) | (ids >= spec.rows)]
    if len(outside):
        raise SessionError(
            f"a plan of table {spec} has rows for the ids 0 to {spec.rows - 1}, and {len(outside)} others came; the largest "
            f"is {int(ids.max())}.\n  Possible solutions: 1) num_embeddings above the largest id  2) ids counted from 0."
        )
    never = torch.ones(spec.rows, dtype=torch.bool)
    never[ids] = False
    dims, sizes = _stored_widths(table), table.rows.sizes(torch.arange(len(table)))
    rows = [ids[sizes == size].sort().values.int() for size in range(len(dims))]
    projected = isinstance(table.form, Chain) and len(dims) > 1
    if projected and not len(table):  # a plan that stores nothing has no bias: let it store a row of zeros
        rows[0], never[0] = torch.zeros(1, dtype=torch.int32), False
    blocks = [*rows, never.nonzero().flatten().int()]
    return TablePlan.nested(spec, [*dims, 0], blocks, projection=projected, bias=projected)


def same_plans(one: SizePlan, other: SizePlan) -> bool:
    """Whether two plans store the same rows in the same order."""
    orders = [[None if table.order is None else table.order.tolist() for table in plan.tables] for plan in (one, other)]
    return one.to_json() == other.to_json() and orders[0] == orders[1]


def _stored_widths(table: GrowingTable) -> Sequence[int]:
    """Return what rows of each width are stored as: what a mixture makes of its rows, or the rows."""
    return table.rows.widths if isinstance(table.form, Chain) else [table.spec.dim]


@torch.no_grad()
def fill(
    compact: CompactEmbeddingBagCollection, number: int, plan: TablePlan, table: GrowingTable, device: torch.device
) -> None:
    """Write a table's rows into its compact form, so that it answers as the growing table does in evaluation mode.

    Args:
        compact: the collection, on the host.
        number: of the table there.
        plan: that of :func:`plan_of`.
        table: in evaluation mode.
        device: where its form is.
    """
    order = torch.arange(plan.table.rows) if plan.order is None else plan.order.long()
    outputs = table.read(table.find(order), device, training=False, searching=False).double().cpu()
    index = cast(TableIndex, compact.index[number])
    if plan.projection:
        assert isinstance(table.form, Chain)
        base, basis = table.form.base(), basis_of(table.form)[: plan.width]
        assert index.projection is not None and index.bias is not None and base is not None
        base = base.double().cpu()
        index.projection.copy_(basis)
        index.bias.copy_(base)
        outputs = (outputs - base) @ basis.t()
    for chunk_number, chunk in enumerate(plan.chunks):
        stored = outputs[: chunk.rows, chunk.start : chunk.start + chunk.width]
        compact.chunk_weight(number, chunk_number).copy_(stored)


@torch.no_grad()
def basis_of(chain: Chain) -> Tensor:
    """Return orthonormal rows, float64 (D, D), of which the first d_k span what rows of the k-th width are mapped to."""
    basis = reached = torch.eye(chain.widths[-1], dtype=torch.float64)
    for step in reversed(chain.linear_maps):  # ``reached`` is the map from a width to D, in the first columns of the basis
        turn, image = torch.linalg.qr(reached @ step.weight.double().cpu(), mode="complete")
        basis = torch.cat([basis[:, : len(turn)] @ turn, basis[:, len(turn) :]], 1)
        reached = image[: step.in_features]
    return basis.t()
