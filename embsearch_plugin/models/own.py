"""A model of the user's own, named in a recipe as ``my_package.my_module:build_model``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from embsearch_plugin.data.dataset import Schema
from embsearch_plugin.errors import ModelError
from embsearch_plugin.user_code import accepted, imported, misfit


@dataclass(frozen=True)
class OwnModel:
    """A function that returns a train task: ``loss, (loss, logits, labels) = model(batch)``.

    Args:
        name: ``package.module:function``; a function decorated by ``es.searchable`` will do.
        options: its arguments by name. A parameter called ``schema`` is given the data's schema.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        imported(self.name)

    def build(self, schema: Schema) -> nn.Module:
        """Build the model.

        Raises:
            ModelError: where the function does not take the options, by its parameters or a ValueError, or returns no module.
        """
        function = imported(self.name)
        if problem := misfit(function, options := accepted(function, self.options, schema=schema)):
            raise ModelError(f"the model {self.name!r} cannot be built with {dict(self.options)}: {problem}")
        try:
            model = function(**options)
        except ValueError as error:
            raise ModelError(f"the model {self.name!r} cannot be built with {dict(self.options)}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.name!r} must return an nn.Module; got {type(model).__name__}.")
        return model
