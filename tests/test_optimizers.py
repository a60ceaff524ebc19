"""Hooks that must fire, and optimizer state that must follow the weights into a compact table.

The reference for the latter replays the past: an optimizer of the same kind is given, for the compact weights alone, the
gradients they would have had. Where a gate g is folded into the weights, that is the old gradient divided by g.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from embsearch_plugin.errors import AttachError
from embsearch_plugin.optimizers import Slice, carried_states, check_hook_fires, exchange

# Step hooks.


class OwnStep(torch.optim.SGD):
    """A user's optimizer with a step of its own."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


class InheritedStep(torch.optim.Adam):
    """A user's optimizer that takes torch's step."""


class InheritedWrapper(KeyedOptimizerWrapper):
    """A subclass of what has no hooks has none either."""


def weight() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    return parameter


def keyed(of: type[KeyedOptimizerWrapper] = KeyedOptimizerWrapper) -> KeyedOptimizerWrapper:
    return of({"weight": weight()}, lambda params: torch.optim.SGD(params, lr=0.1))


def warmed_up() -> WarmupOptimizer:
    return WarmupOptimizer(keyed(), [WarmupStage(WarmupPolicy.CONSTANT, 5)])


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.optim.SGD([weight()], lr=0.1),
        lambda: torch.optim.Adam([weight()]),
        lambda: torch.optim.AdamW([weight()], foreach=True),
        lambda: RowWiseAdagrad([weight()]),
        lambda: OwnStep([weight()], lr=0.1),
        lambda: InheritedStep([weight()]),
        lambda: keyed()._optimizer,
        lambda: CombinedOptimizer([keyed()]),
        lambda: copy.deepcopy(torch.optim.SGD([weight()], lr=0.1)),
        lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight()], lr=0.1), 1).optimizer,
    ],
)
def test_where_the_check_passes_the_hook_fires(build: Callable[[], Optimizer]) -> None:
    optimizer = build()
    check_hook_fires(optimizer)
    fired: list[object] = []
    optimizer.register_step_post_hook(lambda *call: fired.append(call[0]))
    optimizer.step()
    assert fired == [optimizer]


@pytest.mark.parametrize(
    ("build", "way_out"),
    [
        (keyed, r"attach the SGD inside: attach\(optimizer._optimizer, ...\)"),
        (lambda: keyed(InheritedWrapper), r"attach the SGD inside: attach\(optimizer._optimizer, ...\)"),
        (warmed_up, r"attach the SGD inside: attach\(optimizer._optimizer._optimizer, ...\)"),
        (lambda: "adam", r"attach the torch.optim optimizers it is made of: attach\(\[...\], ...\)"),
    ],
)
def test_where_the_hook_cannot_fire_the_way_out_is_said(build: Callable[[], Any], way_out: str) -> None:
    optimizer = build()
    with pytest.raises(AttachError, match=rf"{type(optimizer).__name__}.step does not call it.\n.* 1\) {way_out}.*  2\) call "):
        check_hook_fires(optimizer)


def test_an_optimizer_whose_parameters_cannot_be_replaced() -> None:
    with pytest.raises(AttachError, match="LBFGS keeps its parameters as one vector"):
        check_hook_fires(torch.optim.LBFGS([weight()]))


# What a new parameter keeps.

V, D = 6, 4


@st.composite
def kept(draw: st.DrawFn) -> tuple[list[int] | None, list[int] | None]:
    """Rows and columns in any order; ``None`` for all of them."""
    numbers = [st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True) for n in (V, D)]
    return draw(st.one_of(st.none(), numbers[0])), draw(st.one_of(st.none(), numbers[1]))


def slice_of(rows: Sequence[int] | None, columns: Sequence[int] | None, gates: Tensor | None = None) -> Slice:
    """The part of a (V, D) table in some rows and columns; ``gates`` are the whole table's, (V, D)."""
    part = Slice(
        nn.Parameter(torch.zeros(V if rows is None else len(rows), D if columns is None else len(columns))),
        None if rows is None else torch.tensor(rows),
        None if columns is None else torch.tensor(columns),
    )
    return part if gates is None else Slice(part.new, part.rows, part.columns, gates=part.of(gates))


def replace_parameter(optimizer: Optimizer, old: nn.Parameter, slices: Sequence[Slice]) -> bool:
    return exchange(optimizer, old, [part.new for part in slices], carried_states(optimizer, old, slices))


def picked(table: Tensor, rows: Sequence[int] | None, columns: Sequence[int] | None) -> list[list[float]]:
    values = table.tolist()
    width = range(len(values[0])) if columns is None or len(values[0]) == 1 else columns
    return [[values[row][column] for column in width] for row in (range(V) if rows is None else rows)]


@given(kept())
def test_a_slice_picks_rows_and_columns(where: tuple[list[int] | None, list[int] | None]) -> None:
    rows, columns = where
    part = slice_of(rows, columns)
    table, per_row = torch.arange(V * D).view(V, D), torch.arange(V) + 100
    assert part.of(table).tolist() == picked(table, rows, columns)
    assert part.of(per_row[:, None]).tolist() == picked(per_row[:, None], rows, columns)
    assert part.of(per_row).tolist() == [100 + row for row in (range(V) if rows is None else rows)]


def test_a_slice_is_a_copy() -> None:
    for part in (slice_of(None, None), slice_of([0], None), slice_of(None, [0]), Slice(weight(), mask=torch.ones(V, D).bool())):
        table = torch.ones(V, D)
        part.of(table).zero_()
        assert bool((table == 1).all())


def test_a_slice_by_mask_picks_single_weights() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    part = Slice(nn.Parameter(torch.zeros(3)), mask=mask)
    assert part.of(torch.arange(9).view(3, 3)).tolist() == [0, 2, 7]
    assert part.of(torch.tensor([5, 6, 7])).tolist() == [5, 5, 7]
    assert part.of(torch.tensor([[5], [6], [7]])).tolist() == [5, 5, 7]


def test_moments_are_divided_by_the_gates() -> None:
    gates = torch.tensor([0.5, 0.25, 1.0, 0.0]).repeat(V, 1)
    part, moment = slice_of([1, 0], [0, 1, 3], gates), torch.ones(V, D)
    assert part.moments("exp_avg", moment).tolist() == [[2, 4, 0]] * 2
    assert part.moments("exp_avg_sq", moment).tolist() == [[4, 16, 0]] * 2
    per_row = pytest.approx(3 / (0.25 + 0.0625 + 0))  # by the mean of the squared gates
    assert part.moments("sum", torch.ones(V)).tolist() == [per_row] * 2
    assert part.moments("sum", torch.ones(V, 1)).flatten().tolist() == [per_row] * 2
    assert part.moments("acc_delta", moment) is None
    assert slice_of([1, 0], None).moments("acc_delta", moment).tolist() == [[1] * 4] * 2


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_zero_stays_zero_under_the_smallest_gate(name: str) -> None:
    part = slice_of(None, None, torch.full((V, D), 1e-30))
    assert part.moments(name, torch.zeros(V, D)).tolist() == [[0] * D] * V


def test_moments_keep_their_dtype() -> None:
    part = slice_of([0], [1], torch.full((V, D), 0.5))
    moment = part.moments("momentum_buffer", torch.ones(V, D, dtype=torch.float16))
    assert moment is not None
    assert (moment.dtype, moment.tolist()) == (torch.float16, [[2]])


# State that follows a table.

KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.0),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.9),
    "SGD, Nesterov": lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.9, nesterov=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.0),
    "AdamW, AMSGrad": lambda params: torch.optim.AdamW(params, lr=0.0, amsgrad=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.0),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.0),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.0, eps=1e-30),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.0),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.0),
    "RMSprop, centered": lambda params: torch.optim.RMSprop(params, lr=0.0, centered=True),
    "RMSprop, momentum": lambda params: torch.optim.RMSprop(params, lr=0.0, momentum=0.9, eps=1e-30),
    "row-wise Adagrad": lambda params: RowWiseAdagrad(params, lr=0.0),
}


def gradients(steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(V, D, generator=generator) + 0.1 for _ in range(steps)]


def step(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor, lr: float = 0.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_after_replacing_is_that_of_an_optimizer_which_only_ever_saw_the_new_weights(kind: str, gated: bool) -> None:
    gates = torch.tensor([0.5, 0.25, 1.0, 0.8, 0.3, 0.9])[:, None].repeat(1, D)  # row-wise state is exact for these
    if kind != "row-wise Adagrad":
        gates = gates * torch.tensor([1.0, 0.5, 0.7, 0.3])
    old = nn.Parameter(torch.ones(V, D))
    optimizer = KINDS[kind]([{"params": [nn.Parameter(torch.ones(3, 1))]}, {"params": [nn.Parameter(torch.ones(1, 1)), old]}])
    for gradient in gradients():
        step(optimizer, old, gradient)
    columns = None if kind == "row-wise Adagrad" else [3, 0]
    parts = [slice_of([4, 1, 2], columns, gates if gated else None), slice_of([0], columns, gates if gated else None)]
    replace_parameter(optimizer, old, parts)
    assert old not in optimizer.state
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]

    for part in parts:
        alone = nn.Parameter(part.new.detach().clone())
        reference = KINDS[kind]([alone])
        for gradient in gradients():
            step(reference, alone, part.of(gradient) / (1 if part.gates is None else part.gates))
        last = torch.linspace(-1, 1, alone.numel()).view(alone.shape)
        step(reference, alone, last, lr=0.1)
        step(optimizer, part.new, last, lr=0.1)
        part.new.grad = None
        assert float(alone.detach().abs().max()) > 1e-3  # it moved
        torch.testing.assert_close(part.new, alone, rtol=1e-5, atol=1e-6)


def test_new_parameters_take_the_old_one_s_place_in_its_group() -> None:
    first, old, last = (nn.Parameter(torch.zeros(V, D)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [first, old, last], "lr": 5.0}], lr=0.1)
    parts = [slice_of([0, 1], None), slice_of([2], None)]
    assert replace_parameter(optimizer, old, parts)
    expected = [first, parts[0].new, parts[1].new, last]
    assert all(got is wanted for got, wanted in zip(optimizer.param_groups[1]["params"], expected, strict=True))
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_names_of_parameters_follow() -> None:
    old, other = nn.Parameter(torch.zeros(V, D)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([("old", old), ("other", other)], lr=0.1)
    replace_parameter(optimizer, old, [slice_of([0], None), slice_of([2], None)])
    assert optimizer.param_groups[0]["param_names"] == ["old#0", "old#1", "other"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "row-wise Adagrad"])
def test_single_weights_keep_their_state(kind: str) -> None:
    old, mask = nn.Parameter(torch.ones(V, D)), torch.arange(V * D).view(V, D) % 3 == 0
    optimizer = KINDS[kind]([old])
    for gradient in gradients():
        step(optimizer, old, gradient)
    part = Slice(nn.Parameter(torch.zeros(int(mask.sum()))), mask=mask, gates=torch.full((V, D), 0.5)[mask])
    replace_parameter(optimizer, old, [part])
    alone = nn.Parameter(part.new.detach().clone())
    reference = KINDS[kind]([alone])
    for gradient in gradients():
        step(reference, alone, gradient[mask] / 0.5)
    for each, parameter in ((optimizer, part.new), (reference, alone)):
        step(each, parameter, torch.ones(parameter.shape), lr=0.1)
    torch.testing.assert_close(part.new, alone, rtol=1e-5, atol=1e-6)


def test_each_new_parameter_counts_its_own_steps() -> None:
    old = nn.Parameter(torch.ones(V, D))
    optimizer = torch.optim.Adam([old])
    step(optimizer, old, torch.ones(V, D))
    parts = [slice_of([0], None), slice_of([1], None)]
    replace_parameter(optimizer, old, parts)
    step(optimizer, parts[0].new, torch.ones(1, D))
    assert [float(optimizer.state[part.new]["step"]) for part in parts] == [2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_has_not_stepped_yet(kind: str) -> None:
    old, part = nn.Parameter(torch.ones(V, D)), slice_of([1], None, torch.full((V, D), 0.5))
    optimizer = KINDS[kind]([old])
    replace_parameter(optimizer, old, [part])
    step(optimizer, part.new, torch.ones(1, D), lr=0.1)
    assert bool((part.new < 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_keeps_nothing(kind: str) -> None:
    old = nn.Parameter(torch.ones(V, D))
    optimizer = KINDS[kind]([old])
    step(optimizer, old, torch.ones(V, D))
    replace_parameter(optimizer, old, [])
    assert optimizer.param_groups[0]["params"] == []
    assert not optimizer.state
    optimizer.step()


def test_the_optimizers_inside_a_combined_one() -> None:
    old, other = nn.Parameter(torch.ones(V, D)), weight()
    wrapped = [KeyedOptimizerWrapper({"w": p}, lambda params: torch.optim.Adam(params, lr=0.1)) for p in (other, old)]
    combined = CombinedOptimizer([("a", wrapped[0]), ("b", wrapped[1])])
    old.grad = torch.ones(V, D)
    combined.step()
    part = slice_of([2, 1], None)
    assert replace_parameter(combined, old, [part])
    assert not replace_parameter(combined, old, [part])
    part.new.grad = torch.ones(2, D)
    combined.step()
    assert [float(s["step"]) for s in combined.state.values()] == [2, 2]
    assert wrapped[1]._optimizer.param_groups[0]["params"] == [part.new]
    assert bool((part.new < 0).all())


def test_an_optimizer_of_other_parameters_is_left_alone() -> None:
    mine = weight()
    optimizer = torch.optim.Adam([mine])
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    assert not replace_parameter(optimizer, weight(), [slice_of(None, None)])
    assert str(optimizer.state_dict()) == str(before)
    assert optimizer.param_groups[0]["params"] == [mine]


def test_state_whose_scale_is_unknown_starts_anew_under_gates(caplog: pytest.LogCaptureFixture) -> None:
    old, other = nn.Parameter(torch.ones(V, D)), weight()
    optimizer = torch.optim.Adadelta([old, other])
    step(optimizer, old, torch.ones(V, D))
    part = slice_of([0, 1], None, torch.full((V, D), 0.5))
    with caplog.at_level(logging.WARNING, logger="embsearch_plugin"):
        replace_parameter(optimizer, old, [part])
    assert [record.getMessage() for record in caplog.records] == [
        "optimizer state 'acc_delta' cannot follow a compacted table; it starts anew"
    ]
    assert not optimizer.state[part.new]
    assert optimizer.state[other]["step"] == 1  # of that table only
    fresh = nn.Parameter(part.new.detach().clone())
    step(torch.optim.Adadelta([fresh]), fresh, torch.ones(2, D), lr=0.1)
    step(optimizer, part.new, torch.ones(2, D), lr=0.1)
    assert torch.equal(part.new, fresh)


def test_state_whose_scale_is_unknown_is_kept_without_gates(caplog: pytest.LogCaptureFixture) -> None:
    old, part = nn.Parameter(torch.ones(V, D)), slice_of([2, 1], [3])
    optimizer = torch.optim.Adadelta([old])
    step(optimizer, old, torch.arange(V * D).view(V, D).float())
    expected = {name: value[[2, 1]][:, [3]] for name, value in optimizer.state[old].items() if value.dim()}
    replace_parameter(optimizer, old, [part])
    assert len(expected) == 2
    assert all(torch.equal(optimizer.state[part.new][name], value) for name, value in expected.items())
    assert not caplog.records


def test_state_that_is_not_per_row_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    old, part = nn.Parameter(torch.ones(V, D)), slice_of([2, 1], None)
    optimizer = torch.optim.Adafactor([old])
    step(optimizer, old, torch.ones(V, D))
    replace_parameter(optimizer, old, [part])
    assert not optimizer.state[part.new]
    assert "'col_var' cannot follow" in caplog.text
    step(optimizer, part.new, torch.ones(2, D), lr=0.1)


@pytest.mark.parametrize("columns", [None, [3]])
@pytest.mark.parametrize("value", [torch.ones(V, 2), torch.ones(V, D, 1), torch.ones(D, V), [torch.ones(V, D)]])
def test_state_of_a_form_that_is_not_the_tables_starts_anew(
    value: Any, columns: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    old, part = nn.Parameter(torch.ones(V, D)), slice_of([2, 1], columns)
    optimizer = torch.optim.SGD([old], momentum=0.9)
    optimizer.state[old] = {"momentum_buffer": torch.ones(V, D), "factors": value}
    replace_parameter(optimizer, old, [part])
    assert not optimizer.state[part.new]
    assert "'factors' cannot follow" in caplog.text
