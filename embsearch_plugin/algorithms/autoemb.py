"""AutoEmb on a stream: rows of all candidate sizes, mixed by a controller that sees an id's frequency (esapn.txt, 3.3).

By Zhao, Wang, Chen, Zheng, Liu and Tang (2020; arXiv 2002.11252); this follows what esapn.txt says of it, and of DARTS. Every
id has a row of each size, each is mapped to the table's width, then batch norm and tanh, and the sum is weighted by a
softmax. One controller per table makes the weights of the frequency. It descends the loss on a batch of the past before each
batch of the stream is learned from; rows and model descend that of the stream.

Differences:
    * The controller sees the frequency alone; AutoEmb adds an id's last weights and loss.
    * First order: the loss on the past is that of the model as it is, not after a virtual step.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.algorithms.parts.mixture import Mixture, SoftConfig, SoftSearch
from embsearch_plugin.algorithms.parts.row_sizes import FREQUENCY_WIDTH
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.limits import Limits, at_least
from embsearch_plugin.randomness import private_random
from embsearch_plugin.streaming.forms import Entries
from embsearch_plugin.streaming.table import GrowingTable

if TYPE_CHECKING:
    from embsearch_plugin.streaming.session import StreamSession


@dataclass(frozen=True, kw_only=True)
class AutoEmb(SoftConfig):
    """Settings of AutoEmb.

    Args:
        hidden: width of the controller's hidden layer.
        frequencies: the largest frequency that it tells apart.
    """

    name: ClassVar[str] = "autoemb"
    limits: ClassVar[Limits] = {"hidden": at_least(1), "frequencies": at_least(1)}
    hidden: int = 512
    frequencies: int = 1000

    def build(self) -> "AutoEmbSearch":
        """Return the algorithm of one session."""
        return AutoEmbSearch(self)


class AutoEmbSearch(SoftSearch):
    """AutoEmb in one session."""

    def __init__(self, config: AutoEmb) -> None:
        self.config = config

    def start(self, session: "StreamSession") -> None:
        """Make a controller for each table."""
        with private_random(session.seed):
            self._controllers = nn.ModuleList(self._controller(table) for table in session.tables)
        self._optimizer = torch.optim.Adam(self._controllers.parameters(), lr=self.config.lr, fused=True)

    def _controller(self, table: GrowingTable) -> nn.Module:
        """Return a controller, which the table's form asks from now on."""
        assert isinstance(table.form, Mixture)
        controller = nn.Sequential(
            nn.Embedding(self.config.frequencies + 1, FREQUENCY_WIDTH),
            nn.Linear(FREQUENCY_WIDTH, self.config.hidden),
            nn.Tanh(),
            nn.Linear(self.config.hidden, len(table.form.sizes)),
            nn.Softmax(dim=1),
        )
        table.form.weigh = partial(_weights, controller, self.config.frequencies)
        return controller

    def search_step(self, session: "StreamSession", batch: Any) -> Mapping[str, float]:
        """Let the controllers descend the loss on a batch of the past."""
        parameters = list(self._controllers.parameters())
        loss, gradients = session.gradients(batch, lambda: parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return {"validation_loss": loss}

    def state_dict(self) -> dict[str, Any]:
        """Return the controllers, and their optimizer's state."""
        return {"controllers": self._controllers.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._controllers.load_state_dict(state["controllers"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors


def _weights(controller: nn.Module, most: int, entries: Entries) -> Tensor:
    """Return what a controller makes of the frequencies of the entries, (n, N)."""
    weights: Tensor = controller(entries.counts.clamp(max=most))
    return weights


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register AutoEmb."""
    return [AutoEmb]
