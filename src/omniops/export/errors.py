"""What keeps a model from being written, in one line, and how the errors of other packages become one."""

from __future__ import annotations

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
    """What an error says first, and the line of the model's code that PyTorch says has caused it."""
    lines = [line.strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line), type(error).__name__)
    caused = next((line for line in lines if line.startswith("Caused by: ") and line not in first), "")
    text = f"{first} {caused}".strip()
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
