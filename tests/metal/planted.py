"""Functions of the package with something of their source replaced, as the faults that a test has to catch."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def planted(function: Callable[..., Any], text: str, replacement: str) -> Callable[..., Any]:
    """The function with every ``text`` in its source replaced; AssertionError where there is none."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert text in source, f"{function.__name__} has no {text!r}"
    names = dict(function.__globals__)
    exec("from __future__ import annotations\n" + source.replace(text, replacement), names)
    made: Callable[..., Any] = names[function.__name__]
    return made
