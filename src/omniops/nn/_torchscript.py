"""A method for TorchScript beside one that it cannot compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def compiled_as(compiled: Callable[..., Any]) -> Callable[[Method], Method]:
    """Have torch.jit.script compile ``compiled`` where a method has ``**kwargs``, or takes and gives several types.

    TorchScript reads a function's source with the inspect module, which goes to what a function wraps. Python calls
    the method itself, and shows its signature.
    """

    def mark(method: Method) -> Method:
        method.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        method.__wrapped__ = compiled  # type: ignore[attr-defined]
        return method

    return mark
