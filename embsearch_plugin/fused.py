"""Tables on FBGEMM's table-batched embeddings (TBE), on one device, with the optimizer fused into the backward."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward  # type: ignore[attr-defined]
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embsearch_plugin.errors import SessionError
from embsearch_plugin.lookup.slots import Slot, slots_of
from embsearch_plugin.optimizers import Slice

_POOLING = {PoolingType.SUM: PoolingMode.SUM, PoolingType.MEAN: PoolingMode.MEAN}


class FusedEmbeddingBags(EmbeddingBagCollectionInterface):
    """A plain collection whose lookups and updates run on TBE kernels, one or more per pooling and precision.

    The collection's Parameter objects stay, as views of the kernels' memory; they get no gradient, since the kernels
    update them in the backward.

    Args:
        plain: the collection; its parameters are moved into the kernels.
        fused_params: TorchRec's: ``optimizer``, ``learning_rate`` and what else the kernel takes.
        kernel_columns: the most columns that one kernel looks up, where it holds several tables; ``None`` for any number.
        ids_checked: whether the caller has made sure that every id has a row, so that the kernels need not.
    """

    def __init__(
        self,
        plain: EmbeddingBagCollection,
        fused_params: Mapping[str, Any],
        *,
        kernel_columns: int | None = None,
        ids_checked: bool = False,
    ) -> None:
        super().__init__()
        frozen = [name for name, parameter in plain.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise SessionError(
                f"fused kernels train every table they hold, and {frozen[0]!r} is frozen (requires_grad=False).\n"
                "  Possible solutions: 1) put frozen tables into a collection of their own  2) train without fused=."
            )
        self.fused_params = dict(fused_params)
        self.kernel_params = {"bounds_check_mode": BoundsCheckMode.NONE} if ids_checked else {}
        self.embedding_bags = plain.embedding_bags
        self._configs = plain.embedding_bag_configs()
        self._weighted = plain.is_weighted()
        self._slots = slots_of(self._configs)
        # Not registered as modules: their memory is that of the parameters above, and must be listed and saved once.
        self._groups = [_Group(self, tables) for tables in self._grouped(kernel_columns)]

    def _grouped(self, kernel_columns: int | None) -> list[list[int]]:
        """Deal the tables to kernels, as evenly as their number allows."""
        alike: dict[tuple[PoolingType, torch.dtype], list[int]] = {}
        for index, config in enumerate(self._configs):
            alike.setdefault((config.pooling, self._weight(index).dtype), []).append(index)
        return [part for tables in alike.values() for part in self._cut(tables, kernel_columns)]

    def _cut(self, tables: list[int], kernel_columns: int | None) -> list[list[int]]:
        columns = [self._configs[index].embedding_dim * len(self._configs[index].feature_names) for index in tables]
        parts = 1 if kernel_columns is None else -(-sum(columns) // kernel_columns)
        ends = [(total * parts - 1) // sum(columns) for total in accumulate(columns)]
        return [part for n in range(parts) if (part := [t for t, end in zip(tables, ends, strict=True) if end == n])]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._weighted

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._weight(0).device

    @property
    def kernels(self) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
        """The TBE kernels."""
        return [group.kernel for group in self._groups]

    def _weight(self, index: int) -> nn.Parameter:
        weight = self.embedding_bags[self._configs[index].name].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool: (B, sum of dims), keyed as the plain collection."""
        keys, dims = [slot.key for slot in self._slots], [slot.dim for slot in self._slots]
        lookups = self.lookups(features)
        if len(lookups) == 1:
            return KeyedTensor(keys, dims, lookups[0][1]())
        columns = {
            slot: part
            for slots, look_up in lookups
            for slot, part in zip(slots, look_up().split([s.dim for s in slots], dim=1), strict=True)
        }
        return KeyedTensor(keys, dims, torch.cat([columns[slot] for slot in self._slots], dim=1))

    def lookups(self, features: KeyedJaggedTensor) -> list[tuple[Sequence[Slot], Callable[[], Tensor]]]:
        """Return each kernel's slots, and what pools their rows when called: (B, sum of their dims)."""
        return [(group.slots, partial(group.pool, features)) for group in self._groups]

    @property
    def kernels_in_order(self) -> bool:
        """Whether the kernels' slots, one kernel after the other, are in the order of the output's columns."""
        return [slot for group in self._groups for slot in group.slots] == list(self._slots)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedEmbeddingBags":
        """Copy parameters and kernels, and let the copied parameters be views of the copied kernels again."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for group in copied._groups:
            group.share_memory()
        return copied

    def optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        """Return each table's optimizer state by name, as views of the kernels' memory."""
        return {name: state for group in self._groups for name, state in group.states()}

    def learning_rates(self) -> dict[str, float]:
        """Return each table's learning rate as it is now: schedules set that of a kernel."""
        return {name: group.kernel.get_learning_rate() for group in self._groups for name in group.names}

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Set each kernel's learning rate to that of its first table, where ``rates`` has it."""
        for group in self._groups:
            if group.names[0] in rates:
                group.kernel.set_learning_rate(rates[group.names[0]])

    def kernel_state(self) -> dict[str, Any]:
        """Return what the kernels hold besides weights, by table however dealt: optimizer state, step counters, rates."""
        counters = {
            name: [group.kernel.iter.clone(), group.kernel.iter_cpu.clone()]
            for group in self._groups
            if hasattr(group.kernel, "iter")
            for name in group.names
        }
        return {"optimizer": self.optimizer_states(), "counters": counters, "rates": self.learning_rates()}

    @torch.no_grad()
    def load_kernel_state(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        for table, tensors in self.optimizer_states().items():
            for name, tensor in tensors.items():
                tensor.copy_(state["optimizer"][table][name])
        for group in self._groups:
            if hasattr(group.kernel, "iter"):
                steps, steps_cpu = state["counters"][group.names[0]]
                group.kernel.iter.copy_(steps)
                group.kernel.iter_cpu.copy_(steps_cpu)
        self.set_learning_rates(state.get("rates", {}))  # older states have none


class _Group:
    """The tables of one pooling and precision on one kernel."""

    def __init__(self, bags: FusedEmbeddingBags, tables: Sequence[int]) -> None:
        configs = bags.embedding_bag_configs()
        self.names = [configs[index].name for index in tables]
        self.weights = [bags.embedding_bags[name].weight for name in self.names]
        self.slots = [slot for slot in bags._slots if slot.table in tables]
        self.weighted = bags.is_weighted()
        self.kernel = _kernel(
            [configs[index] for index in tables],
            [tables.index(slot.table) for slot in self.slots],
            self.weights[0],
            bags.kernel_params | bags.fused_params,
        )
        self.share_memory()

    def share_memory(self) -> None:
        """Put the parameters' values into the kernel, and let the parameters be views of its memory."""
        for weight, memory in zip(self.weights, self.kernel.split_embedding_weights(), strict=True):
            memory.copy_(weight.data)
            weight.data = memory

    def pool(self, features: KeyedJaggedTensor) -> Tensor:
        """Return the pooled rows of this group's slots, (B, sum of their dims)."""
        if self.weights[0].data_ptr() != self.kernel.split_embedding_weights()[0].data_ptr():
            raise SessionError(
                "the fused tables no longer share their kernels' memory: the model was moved, or its state was assigned, "
                "after its first forward.\n  Possible solution: move the model before its first forward; load state with "
                "assign=False."
            )
        features = _selected(features, [slot.feature for slot in self.slots])
        weights = features.weights() if self.weighted else None
        if torch.is_inference_mode_enabled():  # which the kernels do not know
            with torch.inference_mode(False), torch.no_grad():
                pooled: Tensor = self.kernel(features.values().long(), features.offsets().long(), weights)
        else:
            pooled = self.kernel(features.values().long(), features.offsets().long(), weights)
        return pooled

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each table's name and optimizer state."""
        if not self.kernel.split_optimizer_states() or not self.kernel.split_optimizer_states()[0]:
            return  # SGD has none
        yield from zip(self.names, self.kernel.get_optimizer_state(), strict=True)


def _selected(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """Return the named features in that order; a view, where they lie side by side."""
    keys = features.keys()
    if keys == names:
        return features
    first = keys.index(names[0])
    if keys[first : first + len(names)] != names:
        return features.permute([keys.index(name) for name in names])
    sizes = [first, len(names), len(keys) - first - len(names)]
    return features.split(sizes)[1]


def _kernel(
    configs: Sequence[EmbeddingBagConfig], feature_tables: list[int], like: Tensor, fused_params: Mapping[str, Any]
) -> SplitTableBatchedEmbeddingBagsCodegen:
    location = EmbeddingLocation.DEVICE if like.is_cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if like.is_cuda else ComputeDevice.CPU
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(config.num_embeddings, config.embedding_dim, location, compute) for config in configs],
        feature_table_map=feature_tables,
        pooling_mode=_POOLING[configs[0].pooling],
        weights_precision=SparseType.from_dtype(like.dtype),
        output_dtype=SparseType.FP32,
        device=like.device,
        **fused_params,
    )


@contextmanager
def steps_kept(collection: nn.Module) -> Iterator[None]:
    """Restore the step counters of a collection's TBE kernels, which some optimizers (Adam) advance in every forward."""
    kernels = collection.kernels if isinstance(collection, FusedEmbeddingBags) else collection.modules()
    counted = [k for k in kernels if isinstance(k, SplitTableBatchedEmbeddingBagsCodegen) and hasattr(k, "iter")]
    saved = [(k, k.iter.clone(), k.iter_cpu.clone()) for k in counted]
    try:
        yield
    finally:
        for kernel, steps, steps_cpu in saved:
            kernel.iter.copy_(steps)
            kernel.iter_cpu.copy_(steps_cpu)


def requested(collection: nn.Module, fused_params: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the ``fused_params`` asked for: given, or by the marks of TorchRec's ``apply_optimizer_in_backward``."""
    if fused_params is not None:
        return dict(fused_params)
    marks = {n: _from_marks(p) for n, p in collection.named_parameters() if getattr(p, "_optimizer_classes", None)}
    if not marks:
        return None
    if len(marks) < len(list(collection.parameters())):
        raise SessionError("apply_optimizer_in_backward must mark every table of a collection, or none.")
    first, *others = marks
    for name in others:
        if marks[name] != marks[first]:
            raise SessionError(
                "apply_optimizer_in_backward must mark all tables of a collection alike, since fused kernels train them by one "
                f"optimizer; {first!r} has {marks[first]}, and {name!r} has {marks[name]}.\n  Possible solutions: 1) the same "
                "optimizer and settings for both  2) a collection for each."
            )
    return marks[first]


def _from_marks(parameter: nn.Parameter) -> dict[str, Any]:
    (optimizer,), (options,) = parameter._optimizer_classes, parameter._optimizer_kwargs  # type: ignore[attr-defined]
    params = {key: value for key, value in options.items() if key not in ("lr", "betas")}
    params["optimizer"] = optimizer_type_to_emb_opt_type(optimizer)
    if "lr" in options:
        params["learning_rate"] = options["lr"]
    if "betas" in options:
        params["beta1"], params["beta2"] = options["betas"]
    return params


@torch.enable_grad()  # without it a parameter has no node to hook the optimizer to
def mark_alike(old: Tensor, new: nn.Parameter) -> None:
    """Have ``new`` trained in the backward as ``old`` is, where TorchRec's ``apply_optimizer_in_backward`` marked that."""
    if new.requires_grad:
        optimizers, options = getattr(old, "_optimizer_classes", ()), getattr(old, "_optimizer_kwargs", ())
        for optimizer, settings in zip(optimizers, options, strict=True):
            apply_optimizer_in_backward(optimizer, [new], settings)


@torch.no_grad()
def carry_state(old: FusedEmbeddingBags, new: FusedEmbeddingBags, slices: Mapping[str, Sequence[tuple[str, Slice]]]) -> None:
    """Copy optimizer state and learning rates of old tables to the new tables that keep parts of them.

    Args:
        old: the collection before.
        new: the collection after.
        slices: per old table, the names of new tables with what each keeps.
    """
    states, targets, rates = old.optimizer_states(), new.optimizer_states(), old.learning_rates()
    new.set_learning_rates({name: rates[table] for table, parts in slices.items() for name, _ in parts})
    for table, parts in slices.items():
        for name, part in parts:
            for key, target in targets.get(name, {}).items():
                moments = part.moments(key, states[table][key])
                if moments is not None:
                    target.copy_(moments.view(target.shape))
    for kernel in new.kernels:
        if hasattr(kernel, "iter"):
            kernel.iter.copy_(old.kernels[0].iter)
            kernel.iter_cpu.copy_(old.kernels[0].iter_cpu)
