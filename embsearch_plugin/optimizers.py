"""What a search asks of the user's optimizer: that its step hook fires, and that its state can follow the weights."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from embsearch_plugin.errors import AttachError

log = logging.getLogger(__name__)

SMALLEST_GATE = 0.05  # below it, moments start anew: they come from gates that were larger, and dividing would blow them up

# State that is linear in the gradient, and state that is quadratic: a gate g folded into the weights divides the gradient
# by g, so the former is divided by g and the latter by g squared.
FIRST_MOMENTS = frozenset({"exp_avg", "exp_inf", "grad_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


def check_hook_fires(optimizer: Any) -> None:
    """Make sure that a hook on ``optimizer.step`` will be called.

    Raises:
        AttachError: where it will not, as with TorchRec's KeyedOptimizerWrapper, whose step is not torch's.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise AttachError("LBFGS keeps its parameters as one vector, which compact tables cannot join. Use another optimizer.")
    if _has_hooked_step(optimizer):
        return
    inner, path = optimizer, "optimizer"
    while not _has_hooked_step(inner) and hasattr(inner, "_optimizer"):
        inner, path = inner._optimizer, f"{path}._optimizer"
    if _has_hooked_step(inner):
        hint = f"attach the {type(inner).__name__} inside: attach({path}, ...), and make the wrapper anew after compact"
    else:
        hint = "attach the torch.optim optimizers it is made of: attach([...], ...)"
    raise AttachError(
        f"a search step follows optimizer.step() through torch's step hook, and {type(optimizer).__name__}.step does not "
        f"call it.\n  Possible solutions: 1) {hint}  2) call session.step(batch) in your loop."
    )


def _has_hooked_step(optimizer: Any) -> bool:
    return isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False)


@dataclass(frozen=True)
class Slice:
    """What a new parameter keeps of an old one.

    Args:
        new: the new parameter.
        rows: int64 (rows,), the old rows it keeps; ``None`` for all of them.
        columns: int64 (width,), the old columns; ``None`` for all of them.
        mask: bool (V, D), the single weights it keeps, flattened; then rows and columns are ``None``.
        gates: float32, of the shape of what is kept: what was folded into the weights; ``None`` for one.
        rotation: float32 (old columns, width), what the kept rows are multiplied by at last; then ``columns`` is ``None``.
    """

    new: nn.Parameter
    rows: Tensor | None = None
    columns: Tensor | None = None
    mask: Tensor | None = None
    gates: Tensor | None = None
    rotation: Tensor | None = None

    @torch.no_grad()
    def fill(self, old: nn.Parameter) -> None:
        """Write the kept weights, times their gates, in their new basis, into the new parameter; frozen stays frozen.

        There is nothing to write where they are on the meta device.
        """
        self.new.requires_grad_(old.requires_grad)
        if old.is_meta:
            return
        kept = self.of(old)
        kept = kept if self.gates is None else kept.float() * self.gates.to(kept.device)
        self.new.copy_(kept if self.rotation is None else kept.float() @ self.rotation.to(kept.device))

    def of(self, old: Tensor) -> Tensor:
        """Return the kept part of a tensor (V, D), or of one with a value per row, (V,) or (V, 1)."""
        if self.mask is not None:
            per_weight = old if old.shape == self.mask.shape else old.reshape(-1, 1).expand(self.mask.shape)
            return per_weight[self.mask.to(old.device)]
        kept = old if self.rows is None else old.index_select(0, self.rows.to(old.device))
        if self.columns is None or old.dim() < 2 or old.shape[1] == 1:
            return kept.clone()
        return kept.index_select(1, self.columns.to(old.device))

    def moments(self, name: str, old: Tensor) -> Tensor | None:
        """Return the kept part of optimizer state, rescaled for the folded gates; ``None`` where that is not known."""
        if self.rotation is not None:
            return None
        kept = self.of(old)
        if self.gates is None:
            return kept
        if name not in FIRST_MOMENTS | SECOND_MOMENTS:
            return None
        gates = self.gates.to(old.device)
        if kept.shape != gates.shape:  # row-wise: one moment per row, the mean over its columns
            gates = gates.square().mean(dim=1).sqrt().view(kept.shape)
        power = 1 if name in FIRST_MOMENTS else 2
        scale = torch.where(gates >= SMALLEST_GATE, gates.clamp(min=SMALLEST_GATE).reciprocal(), 0.0) ** power
        return (kept * scale).to(kept.dtype)


def exchange(
    optimizer: Optimizer, old: nn.Parameter, new: Sequence[nn.Parameter], states: Sequence[dict[str, Any]] = ()
) -> bool:
    """Put new parameters in the place of ``old``, with a state each where there are any; return whether they are there now.

    They are not where ``old`` was not, or where the optimizer cannot train them: it then lets go of ``old`` all the same.
    """
    if isinstance(optimizer, CombinedOptimizer):  # its state is a copy of that of the optimizers inside
        return any(exchange(inner, old, new, states) for _, inner in optimizer.optimizers)
    group, index = _place(optimizer, old)
    if group is None:
        return False
    trained = not (isinstance(optimizer, RowWiseAdagrad) and any(p.dim() < 2 for p in new))  # single weights have no row
    new = new if trained else []
    group["params"][index : index + 1] = new
    if "param_names" in group:
        name = group["param_names"][index]
        group["param_names"][index : index + 1] = [f"{name}#{number}" for number in range(len(new))]
    optimizer.state.pop(old, None)
    _begin_states(optimizer, new)
    optimizer.state.update((p, state) for p, state in zip(new, states, strict=False) if state)
    return trained


def _begin_states(optimizer: Optimizer, new: Sequence[nn.Parameter]) -> None:
    """Give new parameters the state of an optimizer that makes it when it is made, and not in its first step."""
    if isinstance(optimizer, RowWiseAdagrad) and new:
        optimizer.state.update(type(optimizer)(new, **optimizer.defaults).state)


def _place(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[dict[str, Any] | None, int]:
    """Return the group that holds ``parameter``, and its place there; no group where none does."""
    groups = optimizer.param_groups
    return next(((group, i) for group in groups for i, p in enumerate(group["params"]) if p is parameter), (None, 0))


def add_beside(optimizer: Optimizer, known: nn.Parameter, new: Sequence[nn.Parameter]) -> bool:
    """Put new parameters, without state, behind ``known`` in its group; return whether ``known`` was there."""
    if isinstance(optimizer, CombinedOptimizer):
        return any(add_beside(inner, known, new) for _, inner in optimizer.optimizers)
    group, index = _place(optimizer, known)
    if group is None:
        return False
    join(optimizer, new, group, index + 1)
    return True


def add_to_any(optimizers: Sequence[Optimizer], known: nn.Parameter, new: Sequence[nn.Parameter]) -> None:
    """Put new parameters beside ``known``; where none of the optimizers holds it, into the first group of the first one."""
    if not any(add_beside(optimizer, known, new) for optimizer in optimizers):
        join(optimizers[0], new)


def join(
    optimizer: Optimizer, new: Sequence[nn.Parameter], group: dict[str, Any] | None = None, place: int | None = None
) -> None:
    """Put new parameters into a group that is there: schedulers know no groups but those that were there before them.

    Args:
        optimizer: of the group.
        new: the parameters.
        group: by default its first.
        place: from which on they stand, by default at the end.
    """
    group = optimizer.param_groups[0] if group is None else group
    _begin_states(optimizer, new)
    place = len(group["params"]) if place is None else place
    group["params"][place:place] = new
    if "param_names" in group:
        names = [f"embsearch#{len(group['param_names']) + number}" for number in range(len(new))]
        group["param_names"][place:place] = names


def groups_in_order(optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the groups that hold ``parameters`` in their order, as one of ``model.parameters()`` does; others do not count."""
    places = _places_of(parameters)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [[places[id(p)] for p in group["params"] if id(p) in places] for group in groups]
    return [group for group, found in zip(groups, held, strict=True) if found == sorted(found)]


def put_in_order(groups: Sequence[dict[str, Any]], parameters: Iterable[nn.Parameter]) -> None:
    """Let groups hold ``parameters`` in their order; others stay where they are.

    The state of an optimizer is loaded by place, so it then fits one that is made of a model loaded in a new process.
    """
    places = _places_of(parameters)
    for group in groups:
        now = [i for i, p in enumerate(group["params"]) if id(p) in places]
        wanted = sorted(now, key=lambda i: places[id(group["params"][i])])
        for key in {"params", "param_names"} & group.keys():
            for i, item in zip(now, [group[key][i] for i in wanted], strict=True):
                group[key][i] = item


def _places_of(parameters: Iterable[nn.Parameter]) -> dict[int, int]:
    return {id(parameter): place for place, parameter in enumerate(parameters)}


def takers_of_dense(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Return the optimizers that take any parameter: SparseAdam takes sparse tables only, and RowWiseAdagrad what has rows."""
    return [optimizer for optimizer in optimizers if not isinstance(optimizer, torch.optim.SparseAdam | RowWiseAdagrad)]


def carried_states(optimizer: Optimizer, old: nn.Parameter, slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """Return the state of each new parameter; none where ``old`` has none yet. Nothing is changed."""
    state = optimizer.state.get(old)
    return [carried_state(state, old.shape, part) for part in slices] if state else []


def carried_state(state: dict[str, Any], shape: torch.Size, part: Slice) -> dict[str, Any]:
    """Return the state of a new parameter; empty, so that the optimizer starts anew, where it cannot be carried over."""
    carried: dict[str, Any] = {}
    if part.rotation is not None:  # a rewrite says so once for all tables
        return carried
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            carried[name] = value.clone()
        elif value is None or isinstance(value, int | float | str):
            carried[name] = value
        else:
            carried[name] = _carried_moments(state, name, shape, part)
            if carried[name] is None:
                log.warning("optimizer state %r cannot follow a compacted table; it starts anew", name)
                return {}
    return carried


def _carried_moments(state: dict[str, Any], name: str, shape: torch.Size, part: Slice) -> Tensor | None:
    """Return what a new parameter keeps of moments per weight or per row; ``None`` where they are neither, or not known."""
    value = state[name]
    if not isinstance(value, Tensor) or value.shape not in (shape, shape[:1], (shape[0], 1)):
        return None
    if name == "momentum_buffer" and "square_avg" in state:  # RMSprop's: steps, free of the gradient's scale
        return part.of(value)
    return part.moments(name, value)
