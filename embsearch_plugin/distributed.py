"""The two reductions a search needs over processes; without a process group they do nothing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is rank 0, or the only one."""
    return world_size() == 1 or dist.get_rank() == 0


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over processes."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean of tensors over processes, exchanged as one."""
    if world_size() == 1:
        return list(values)
    flat = total(torch.cat([value.flatten() for value in values])) / world_size()
    parts = flat.split([value.numel() for value in values])
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]
