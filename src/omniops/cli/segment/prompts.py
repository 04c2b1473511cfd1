"""The prompts of ``omniops segment``: as they are written, and by frame and object."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from omniops.cli.common import CommandError

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass
class Prompts:
    """Those of one object on one frame."""

    points: list[Point] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """1 where a point is of the object, 0 where it is not."""
    box: Box | None = None

    @property
    def is_one_click(self) -> bool:
        """Which may mean an object, a part of it or all that it is part of."""
        return self.box is None and len(self.points) == 1


@dataclass(frozen=True)
class WrittenPrompt:
    """A prompt as it was written, for what is said of it."""

    option: str
    text: str
    numbers: tuple[float, ...]
    label: int
    frame: int | None
    object: int

    def error(self, why: str) -> CommandError:
        """The error that says so."""
        return CommandError(f"{self.option} {self.text}: {why}")


def parse_prompts(points: Iterable[str], boxes: Iterable[str]) -> list[WrittenPrompt]:
    """The prompts of ``--point`` and ``--box``."""
    forms = {"--point": ("X,Y or X,Y,LABEL, with LABEL 1 or 0", points), "--box": ("X0,Y0,X1,Y1", boxes)}
    written = []
    for option, (form, texts) in forms.items():
        for text in texts:
            found = re.fullmatch(r"([^@#]+)(?:@(\d+))?(?:#([1-9]\d{0,3}))?", text)
            try:
                numbers = tuple(float(number) for number in found[1].split(",")) if found else ()
            except ValueError:
                numbers = ()
            label = numbers[2] if option == "--point" and len(numbers) == 3 else 1.0
            if not found or len(numbers) not in ((2, 3) if option == "--point" else (4,)) or label not in (0, 1):
                raise CommandError(f"{option} must be {form}, then @FRAME and #OBJECT where wanted, got {text!r}")
            size = 2 if option == "--point" else 4
            written.append(
                WrittenPrompt(
                    option,
                    text,
                    numbers[:size],
                    int(label),
                    None if found[2] is None else int(found[2]),
                    int(found[3] or 1),
                )
            )
    return written


def check_prompts(
    written: Iterable[WrittenPrompt], path: Path | str, width: int, height: int, frames: int | None
) -> None:
    """Raise where a prompt lies outside of what it is for; a picture has no frames."""
    size = f"{path} has {width} x {height} pixels"
    for prompt in written:
        if frames is None and prompt.frame is not None:
            raise prompt.error(f"{path} is a picture, which has no frames")
        if frames is not None and (prompt.frame or 0) >= frames:
            raise prompt.error(f"{path} has {frames} frames, the first of which is 0")
        if prompt.option == "--point":
            x, y = prompt.numbers
            if not (0 <= x < width and 0 <= y < height):
                raise prompt.error(f"it is outside: {size}")
        else:
            x0, y0, x1, y1 = prompt.numbers
            if not (x0 < x1 and y0 < y1):
                raise prompt.error("it is inside out: X0 must be less than X1, and Y0 less than Y1")
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise prompt.error(f"it is outside: {size}")


def group_prompts(written: Iterable[WrittenPrompt]) -> dict[tuple[int, int], Prompts]:
    """The prompts by frame and object, in that order."""
    groups: dict[tuple[int, int], Prompts] = {}
    for prompt in written:
        prompts = groups.setdefault((prompt.frame or 0, prompt.object), Prompts())
        if prompt.option == "--point":
            x, y = prompt.numbers
            prompts.points.append((x, y))
            prompts.labels.append(prompt.label)
        elif prompts.box is None:
            x0, y0, x1, y1 = prompt.numbers
            prompts.box = (x0, y0, x1, y1)
        else:
            raise prompt.error(f"object {prompt.object} has a box there: for another object add #{prompt.object + 1}")
    groups = dict(sorted(groups.items()))
    shown = set()
    for (_, number), prompts in groups.items():
        if number not in shown and prompts.box is None and 1 not in prompts.labels:
            raise CommandError(f"object {number} is only told where it is not: give a point of it, or a box")
        shown.add(number)
    return groups
