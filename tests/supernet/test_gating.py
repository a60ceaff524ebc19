"""Gating of pooled rows: beside the same sums written one product at a time, forward and gradients."""

import pytest
import torch
from torch import Tensor

from embsearch_plugin.supernet.gating import gate_cells, gate_rows


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.arange(output.numel(), dtype=torch.float32).view(output.shape).sin()
    return torch.autograd.grad((output.float() * weights).sum(), leaves)


@pytest.mark.parametrize("runs", [(12,), (4, 8), (4, 4, 4)])
@pytest.mark.parametrize("wanted", ["pooled", "gates", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_rows(runs: tuple[int, ...], wanted: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pooled = [torch.randn(5, width, dtype=dtype).requires_grad_(wanted != "gates") for width in runs]
    table = torch.rand(7, 4).requires_grad_(wanted != "pooled")
    rows = torch.randint(7, (5, 3))
    got = gate_rows(pooled, table, rows)
    expected = torch.stack(
        [torch.cat([table[row] * whole[4 * k : 4 * k + 4] for k, row in enumerate(places)])
         for places, whole in zip(rows.tolist(), torch.cat(pooled, 1), strict=True)]
    )  # fmt: skip
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    leaves = [leaf for leaf in (*pooled, table) if leaf.requires_grad]
    for mine, theirs in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wanted", ["pooled", "gates", "both"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cells(wanted: str, overwrite: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaf = torch.randn(3, 5, 8, dtype=dtype).requires_grad_(wanted != "gates")
    gates = torch.rand(3, 8).requires_grad_(wanted != "pooled")
    leaves = [each for each in (leaf, gates) if each.requires_grad]
    expected = sum(leaf[s] * gates[s] for s in range(3))
    theirs = gradients(expected, leaves)
    got = gate_cells(leaf * 1, gates, overwrite=overwrite)
    torch.testing.assert_close(got, expected)
    for mine, other in zip(gradients(got, leaves), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_gradient_takes_the_place_of_what_was_pooled() -> None:
    pooled = torch.randn(3, 5, 8).requires_grad_()
    passed: list[Tensor] = []
    kernel_output = pooled * 1
    kernel_output.register_hook(passed.append)
    gate_cells(kernel_output, torch.rand(3, 8), overwrite=True).sum().backward()
    assert passed[0].data_ptr() == kernel_output.data_ptr()
