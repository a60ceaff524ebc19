"""What a recipe names in a package of its user's own: ``my_package.my_module:function``."""

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


def imported(name: str) -> Callable[..., Any]:
    """Return the function of that name; modules of the working directory are found, too.

    Raises:
        ValueError: where there is none, or it cannot be imported.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {name!r}, which must be package.module:function: {error}") from error
    if not callable(found):
        raise ValueError(f"{name!r} must be a function or a class; got {type(found).__name__}")
    return getattr(found, "original", found)  # beneath es.searchable, where it is decorated


def misfit(function: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Return why a function cannot be called with the options; nothing where it can. What it raises itself is its user's."""
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        return str(error)
    return ""


def accepted(function: Callable[..., Any], options: Mapping[str, Any], **offered: Any) -> dict[str, Any]:
    """Return the options, and of what is offered that which the function has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters} | dict(options)
