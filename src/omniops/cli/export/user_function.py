"""``module:function`` of the user's, which returns the model that is exported."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from omniops.cli.common import CommandError
from omniops.cli.errors import reason

if TYPE_CHECKING:
    from torch import nn

_NAMES = ("dynamic_shapes", "input_names", "output_names")
_WANTED = f"(module, args) or (module, args, dict with any of {', '.join(_NAMES)})"


class UserModel(NamedTuple):
    """What the function returned."""

    module: nn.Module
    args: tuple[Any, ...]
    options: dict[str, Any]


def is_user_function(model: str) -> bool:
    """Whether it reads as module:function; paths and URLs do not."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", model) is not None


def call(model: str) -> UserModel:
    """What ``module:function`` returns; the module is looked for in the working folder too."""
    name, _, function_name = model.partition(":")
    module = _import(name, model)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "" if function is None else f", but a {type(function).__name__} of that name"
        raise CommandError(f"{model}: {module.__name__} has no function {function_name}{found}")
    try:
        value = function()
    except Exception as error:
        raise CommandError(f"{model} raised {type(error).__name__}: {reason(error)}", status=1) from error
    return _checked(model, value)


def _import(name: str, model: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise CommandError(
                f"{model}: there is no module {error.name} in this folder or among Python's packages"
            ) from None
        raise CommandError(f"{model}: {name} raised {type(error).__name__}: {reason(error)}", status=1) from error
    except Exception as error:
        raise CommandError(f"{model}: {name} raised {type(error).__name__}: {reason(error)}", status=1) from error


def _checked(model: str, value: Any) -> UserModel:
    from torch import nn

    if not isinstance(value, tuple) or len(value) not in (2, 3):
        raise CommandError(f"{model} must return {_WANTED}, got {_describe(value)}")
    module, args, options = value if len(value) == 3 else (*value, {})
    if not isinstance(module, nn.Module):
        raise CommandError(f"{model} must return {_WANTED}, got for module {_describe(module)}")
    if not isinstance(args, tuple):
        raise CommandError(f"{model} must return {_WANTED}, got for args {_describe(args)}")
    if not isinstance(options, dict) or not set(options) <= set(_NAMES):
        named = ", ".join(map(str, options)) if isinstance(options, dict) else _describe(options)
        raise CommandError(f"{model} must return {_WANTED}, got for the last {named}")
    return UserModel(module, args, options)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__
