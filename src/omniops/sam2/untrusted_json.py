"""JSON of a file that is not trusted: what is asked for is of the type and in the range that is said, or an error."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from typing import Any

_MAX_DEPTH = 100


def parse(text: str) -> Fields:
    """The object of JSON that a text is.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("its description is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its description is no JSON ({error})") from None
    level = [value]
    for _ in range(_MAX_DEPTH):  # what comes after it may recurse
        level = [inner for outer in level for inner in _inner_values(outer)]
    if level:
        raise ValueError("its description is nested too deeply")
    return Fields("its description", value)


def _inner_values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse(constant: str) -> None:
    raise ValueError(f"its description has the number {constant}")


class Fields:
    """An object of JSON, whose fields are asked for by their names.

    Args:
        name: what errors call it.
        value: the object.

    Raises:
        ValueError: for anything else than an object; by each method, where there is no such field, or another.
    """

    def __init__(self, name: str, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object of JSON, got {_shown(value)}")
        self._name, self._values = name, value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        """The value of a field, whatever it is."""
        if name not in self._values:
            raise ValueError(f"{self._name} lacks {name}")
        return self._values[name]

    def get(self, name: str) -> Any:
        """The value of a field, whatever it is; None where it is missing."""
        return self._values.get(name)

    def fields(self, name: str) -> Fields:
        """An object."""
        return Fields(name, self[name])

    def list_of_fields(self, name: str) -> list[Fields]:
        """A list of objects."""
        return [Fields(f"{name}[{i}]", value) for i, value in enumerate(self._list(name))]

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from low to high."""
        return _check_integer(name, self[name], low, high)

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """A list of integers from low to high."""
        return [_check_integer(name, value, low, high) for value in self._list(name)]

    def frame(self, name: str, allowed: Container[int]) -> int:
        """A frame."""
        return _check_frame(name, self[name], allowed)

    def frames(self, name: str, allowed: Container[int]) -> list[int]:
        """A list of frames, each once."""
        frames = [_check_frame(name, value, allowed) for value in self._list(name)]
        if len(set(frames)) < len(frames):
            raise ValueError(f"{name} has a frame more than once")
        return frames

    def _list(self, name: str) -> list[Any]:
        value = self[name]
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {_shown(value)}")
        return value


def _check_integer(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {_shown(value)}")
    return value


def _check_frame(name: str, value: object, allowed: Container[int]) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} has {_shown(value)}, which is no frame that it can have")
    return value


def _shown(value: object) -> str:
    return f"{value!r:.60}"
