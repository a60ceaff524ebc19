"""What makes outputs of rows: against a loop over rows, and gradients against finite differences."""

import pytest
import torch
from torch import Tensor

from embsearch_plugin.streaming.forms import Chain, Entries, Plain
from embsearch_plugin.streaming.rows import Piece

WIDTHS = (2, 3, 5)
SIZES = torch.tensor([1, 0, 2, 2, 0, 1, 0])


def pieces_of(sizes: Tensor, rows: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Piece]:
    return [
        Piece(size, (sizes == size).nonzero().flatten(), rows[size].to(dtype).requires_grad_()) for size in range(len(WIDTHS))
    ]


def entries(count: int) -> Entries:
    return Entries(torch.arange(count), torch.ones(count, dtype=torch.int64), searching=False)


def chain_and_pieces(sizes: Tensor = SIZES) -> tuple[Chain, list[Piece]]:
    torch.manual_seed(0)
    rows = [torch.randn(int((sizes == size).sum()), width) for size, width in enumerate(WIDTHS)]
    return Chain(WIDTHS).double(), pieces_of(sizes, rows)


def slow(chain: Chain, size: int, row: Tensor) -> Tensor:
    """Eq. 1, a row at a time."""
    for step in list(chain.maps)[size:]:
        row = step.weight @ row + step.bias
    return row


@pytest.mark.parametrize("sizes", [SIZES, torch.tensor([2, 2]), torch.tensor([0]), torch.tensor([], dtype=torch.int64)])
def test_a_chain_maps_each_row_as_often_as_it_takes(sizes: Tensor) -> None:
    chain, pieces = chain_and_pieces(sizes)
    outputs = chain(pieces, entries(len(sizes)))
    assert outputs.shape == (len(sizes), 5)
    for piece in pieces:
        for position, row in zip(piece.positions, piece.rows, strict=True):
            torch.testing.assert_close(outputs[position], slow(chain, piece.size, row))


def test_gradients_of_a_chain_are_right_for_rows_and_maps() -> None:
    chain, pieces = chain_and_pieces()
    inputs = (*[piece.rows for piece in pieces], *chain.parameters())
    assert torch.autograd.gradcheck(lambda *_: chain(pieces, entries(len(SIZES))), inputs)


def test_the_base_is_what_zeros_of_the_first_width_become_and_is_trained() -> None:
    chain, _ = chain_and_pieces()
    base = chain.base()
    assert base is not None
    torch.testing.assert_close(base, slow(chain, 0, torch.zeros(2, dtype=torch.float64)))
    assert torch.autograd.gradcheck(lambda *_: chain.base(), tuple(chain.parameters()))


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_that_grows_keeps_its_output(size: int) -> None:
    chain, _ = chain_and_pieces()
    rows = torch.randn(4, WIDTHS[size - 1], dtype=torch.float64)
    wider = chain.widened(size, rows)
    assert wider.shape == (4, WIDTHS[size])
    for row, wide in zip(rows, wider, strict=True):
        torch.testing.assert_close(slow(chain, size, wide), slow(chain, size - 1, row))


def test_one_width_is_the_output_itself() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    piece = Piece(0, torch.arange(3), rows)
    for form in (Plain(4), Chain([4])):
        assert torch.equal(form([piece], entries(3)), rows)
        assert form.base() is None
        assert form.widths == (4,)
