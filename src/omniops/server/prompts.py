"""The prompts of an object on a frame, whose errors are in words for who uses the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from reprlib import repr

MAX_POINTS = 500
"""Of an object on a frame."""


@dataclass
class Prompt:
    """The prompt of an object on a frame; coordinates are fractions of the frame's width and height."""

    points: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: list[float] | None = None
    mask: bool = False


def require_int(name: str, value: object) -> int:
    """A whole number.

    Raises:
        ValueError: for anything else, which calls the value by its name.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {repr(value)}.")
    return value


def make_prompt(points: Sequence[Sequence[float]], labels: Sequence[int], box: Sequence[float] | None) -> Prompt:
    """The prompt of points (n, 2), their labels, and a box [x0, y0, x1, y1]; coordinates are fractions of the frame.

    Raises:
        ValueError: for what is no prompt.
    """
    coords = [_fractions("A point", point, 2) for point in points]
    if len(coords) != len(labels):
        raise ValueError(f"There must be as many labels as points, got {len(labels)} and {len(coords)}.")
    for label in labels:
        if require_int("A label", label) not in (0, 1):
            raise ValueError(f"A label must be 1 for a point of the object or 0 for one that is not, got {label}.")
    if box is not None:
        box = _fractions("A box", box, 4)
        if box[0] > box[2] or box[1] > box[3]:
            raise ValueError(f"A box must be left, top, right, bottom, got {box}.")
    prompt = Prompt(coords, list(labels), box)
    if not coords and box is None:
        raise ValueError("There is no prompt: give a point or a box.")
    _require_few(prompt)
    return prompt


def append_points(previous: Prompt, prompt: Prompt) -> Prompt:
    """The previous prompt with the points of another one behind its own.

    Raises:
        ValueError: where the other one has a box, the previous one is a mask, or there are too many points.
    """
    if prompt.box is not None:
        raise ValueError("A box comes before all points: it must replace what was shown before on this frame.")
    if previous.mask:
        raise ValueError("The object was shown by a mask on this frame: points must replace it.")
    extended = Prompt(previous.points + prompt.points, previous.labels + prompt.labels, previous.box)
    _require_few(extended)
    return extended


def _require_few(prompt: Prompt) -> None:
    if len(prompt.points) > MAX_POINTS:
        raise ValueError(f"An object has at most {MAX_POINTS} points on a frame, got {len(prompt.points)}.")


def _fractions(name: str, values: Sequence[float], count: int) -> list[float]:
    is_list = isinstance(values, (list, tuple)) and len(values) == count
    if not is_list or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in values):  # not NaN either
        raise ValueError(f"{name} must be {count} fractions of the frame, from 0 to 1, got {repr(values)}.")
    return [float(v) for v in values]
