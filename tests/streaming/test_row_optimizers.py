"""Optimizers of rows: against torch's SparseAdam and FBGEMM's row-wise Adagrad."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from embsearch_plugin.streaming.row_optimizers import RowAdam, RowWiseAdagrad
from embsearch_plugin.streaming.rows import Rows

N, D, STEPS = 20, 6, 8


def gradients() -> list[tuple[Tensor, Tensor]]:
    """For each step some rows, each once, and their gradients."""
    random = torch.Generator().manual_seed(3)
    return [(torch.randperm(N, generator=random)[:7], torch.randn(7, D, generator=random)) for _ in range(STEPS)]


def trained(rows: Rows, weights: Tensor) -> Tensor:
    rows.add(weights)
    for entries, gradient in gradients():
        rows.train(entries, 0, gradient, rows.steps + 1)
    return rows.read(torch.arange(N))[0].rows


def test_adam_is_sparse_adam() -> None:
    weights = torch.randn(N, D)
    expected = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.SparseAdam([expected], lr=0.03)
    for entries, gradient in gradients():
        expected.grad = torch.sparse_coo_tensor(entries[None], gradient, (N, D)).coalesce()
        optimizer.step()
    got = trained(Rows((D,), RowAdam(lr=0.03)), weights)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-7)
    assert (got - weights).abs().max() > 0.03


def test_row_wise_adagrad_is_fbgemms() -> None:
    weights = torch.randn(N, 8)  # FBGEMM's widths are multiples of four
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(N, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        eps=1e-8,
    )
    kernel.split_embedding_weights()[0].copy_(weights)
    rows, random = Rows((8,), RowWiseAdagrad(lr=0.05)), torch.Generator().manual_seed(5)
    rows.add(weights)
    for _ in range(STEPS):
        entries = torch.randperm(N, generator=random)[:7].sort().values
        gradient = torch.randn(7, 8, generator=random)
        (kernel(entries, torch.arange(8)) * gradient).sum().backward()
        rows.train(entries, 0, gradient, rows.steps + 1)
    got = rows.read(torch.arange(N))[0].rows
    torch.testing.assert_close(got, kernel.split_embedding_weights()[0], rtol=1e-5, atol=1e-6)
    sums = rows._arenas[0].state["sum"].values
    torch.testing.assert_close(sums, kernel.split_optimizer_states()[0][0].flatten(), rtol=1e-5, atol=1e-6)
    assert (got - weights).abs().max() > 0.05


@pytest.mark.parametrize("optimizer", [RowAdam(lr=0.1), RowWiseAdagrad(lr=0.1)])
def test_a_gradient_of_zero_moves_nothing_and_is_no_nan(optimizer: RowAdam | RowWiseAdagrad) -> None:
    rows = Rows((D,), optimizer)
    weights = torch.randn(3, D)
    rows.add(weights)
    rows.train(torch.arange(3), 0, torch.zeros(3, D), 1)
    assert torch.equal(rows.read(torch.arange(3))[0].rows, weights)
