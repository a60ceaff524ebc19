"""Mixtures: against a loop over ids and sizes, and gradients against finite differences."""

import pytest
import torch
from torch import Tensor

from embsearch_plugin.algorithms.parts.mixture import Mixture
from embsearch_plugin.streaming.forms import Entries
from embsearch_plugin.streaming.rows import Piece

SIZES = (1, 2, 4)


def mixture(n: int, *, training: bool = True) -> tuple[Mixture, Piece, Tensor]:
    torch.manual_seed(1)
    form = Mixture(SIZES).double().train(training)
    weights = torch.randn(n, 3, dtype=torch.float64).softmax(1).requires_grad_()
    form.weigh = lambda entries: weights
    for norm in form.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    rows = torch.randn(n, sum(SIZES), dtype=torch.float64, requires_grad=True)
    return form, Piece(0, torch.arange(n), rows), weights


def entries(n: int, searching: bool = False) -> Entries:
    return Entries(torch.arange(n), torch.ones(n, dtype=torch.int64), searching)


def slow(form: Mixture, rows: Tensor, weights: Tensor, *, by_batch: bool) -> Tensor:
    """The weighted sum over sizes n of tanh(batch norm(W_n e_n + b_n)), number by number."""
    outputs, start = torch.zeros(len(rows), SIZES[-1], dtype=torch.float64), 0
    for number, (size, norm) in enumerate(zip(SIZES, form.norms, strict=True)):
        mapped = torch.stack([form.maps[number].weight @ row + form.maps[number].bias for row in rows[:, start : start + size]])
        mean, var = (mapped.mean(0), mapped.var(0, correction=0)) if by_batch else (norm.running_mean, norm.running_var)
        normed = (mapped - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
        outputs = outputs + weights[:, number : number + 1] * normed.tanh()
        start += size
    return outputs


@pytest.mark.parametrize(("n", "training"), [(6, True), (6, False), (1, False), (1, True), (0, True)])
def test_outputs_are_weighted_sums(n: int, training: bool) -> None:
    """One id alone has no spread, so it is normalized by what was learned so far."""
    form, piece, weights = mixture(n, training=training)
    learned = [norm.running_mean.clone() for norm in form.norms]
    expected = slow(form, piece.rows, weights, by_batch=training and n > 1) if n else torch.zeros(0, 4, dtype=torch.float64)
    torch.testing.assert_close(form([piece], entries(n)), expected)
    for norm, before in zip(form.norms, learned, strict=True):
        assert torch.equal(norm.running_mean, before) is not (training and n > 1)


def test_gradients_are_right_for_rows_and_parameters_and_weights_have_none() -> None:
    form, piece, weights = mixture(5)
    assert torch.autograd.gradcheck(lambda *_: form([piece], entries(5)), (piece.rows, *form.parameters()))
    form([piece], entries(5)).sum().backward()
    assert weights.grad is None


def test_in_a_search_step_weights_have_gradients() -> None:
    form, piece, weights = mixture(5)
    assert torch.autograd.gradcheck(lambda w: form([piece], entries(5, searching=True)), (weights,))


def test_rows_of_all_sizes_lie_side_by_side() -> None:
    assert Mixture(SIZES).widths == (7,)
    assert Mixture(SIZES).base() is None
