"""The autocast of a training forward, to be repeated by a search step."""

from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """The autocast that a training forward ran under, to be repeated by a search step."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device: str) -> "Autocast":
        """Read the autocast that is on now."""
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> torch.autocast:
        """Return it as a context."""
        return torch.autocast(self.device, self.dtype, self.enabled)
