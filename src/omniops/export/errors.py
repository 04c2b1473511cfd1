"""What keeps a model from being written, in one line, and how the errors of other packages become one."""

from __future__ import annotations

import inspect
import os
import traceback
from pathlib import Path

import torch

import omniops

_LONGEST = 300
"""Of what is quoted of another package's error, which may be a whole graph."""


class ExportError(RuntimeError):
    """A model cannot be written in a format; says what to do. Its ``__cause__`` is the other package's error, if any.

    Example:
        >>> from omniops import export
        >>> issubclass(export.ExportError, RuntimeError)
        True
    """


def shorten(error: BaseException) -> str:
    """What an error says first."""
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def line_of_model(error: BaseException) -> str:
    """The file and line of the model's code in which an error was raised, or that called PyTorch; "" where none is."""
    not_models = tuple(str(Path(inspect.getfile(package)).parent) + os.sep for package in (torch, omniops))
    frames = traceback.extract_tb(error.__traceback__)
    found = next((frame for frame in reversed(frames) if not frame.filename.startswith(not_models)), None)
    return f"{found.filename}:{found.lineno}" if found is not None and Path(found.filename).exists() else ""
