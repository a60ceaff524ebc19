"""A collection under ``torch.fx``: a leaf, since what it does depends on ids and on the step of a search."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from torch import nn
from torch.fx import Proxy
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

Forward = Callable[[Any, KeyedJaggedTensor], KeyedTensor]


def is_traced(features: object) -> bool:
    """Whether ``features`` stand for a batch in a graph that ``torch.fx`` is recording."""
    return isinstance(features, Proxy)


def leaf(forward: Forward) -> Forward:
    """Let ``torch.fx`` record one call of the module whose ``forward`` this is, and none of what it does.

    TorchRec's train pipelines trace a model that holds sharded modules, and go into whatever holds one: a searchable or a
    compact collection does, where its tables are sharded. A tracer is not asked, so this holds for any.
    """

    @wraps(forward)
    def recorded(self: nn.Module, features: KeyedJaggedTensor) -> KeyedTensor:
        if isinstance(features, Proxy):
            tracer: Any = features.tracer
            return cast(KeyedTensor, tracer.create_proxy("call_module", tracer.path_of_module(self), (features,), {}))
        return forward(self, features)

    return recorded
