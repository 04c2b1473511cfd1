"""What a user gives for an object on a frame, checked, with errors in words for who uses the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from reprlib import repr

MAX_POINTS = 500
"""Of an object on a frame."""


@dataclass
class Prompt:
    """What a user gave for an object on a frame, places as fractions of its width and height."""

    points: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: list[float] | None = None
    mask: bool = False


def whole(name: str, value: object) -> int:
    """A whole number; ValueError for anything else, by its name."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {repr(value)}.")
    return value


def checked(points: Sequence[Sequence[float]], labels: Sequence[int], box: Sequence[float] | None) -> Prompt:
    """What was given, places as fractions of the frame; ValueError for what is no prompt."""
    places = [_fractions("A point", point, 2) for point in points]
    if len(places) != len(labels):
        raise ValueError(f"There must be as many labels as points, got {len(labels)} and {len(places)}.")
    for label in labels:
        if whole("A label", label) not in (0, 1):
            raise ValueError(f"A label must be 1 for a point of the object or 0 for one that is not, got {label}.")
    if box is not None:
        box = _fractions("A box", box, 4)
        if box[0] > box[2] or box[1] > box[3]:
            raise ValueError(f"A box must be left, top, right, bottom, got {box}.")
    prompt = Prompt(places, list(labels), box)
    if not places and box is None:
        raise ValueError("There is no prompt: give a point or a box.")
    _require_few(prompt)
    return prompt


def joined(before: Prompt, prompt: Prompt) -> Prompt:
    """The points of a prompt behind those that were there before."""
    if prompt.box is not None:
        raise ValueError("A box comes before all points: it must replace what was shown before on this frame.")
    if before.mask:
        raise ValueError("The object was shown by a mask on this frame: points must replace it.")
    both = Prompt(before.points + prompt.points, before.labels + prompt.labels, before.box)
    _require_few(both)
    return both


def _require_few(prompt: Prompt) -> None:
    if len(prompt.points) > MAX_POINTS:
        raise ValueError(f"An object has at most {MAX_POINTS} points on a frame, got {len(prompt.points)}.")


def _fractions(name: str, values: Sequence[float], count: int) -> list[float]:
    is_list = isinstance(values, (list, tuple)) and len(values) == count
    if not is_list or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in values):  # not NaN either
        raise ValueError(f"{name} must be {count} fractions of the frame, from 0 to 1, got {repr(values)}.")
    return [float(v) for v in values]
