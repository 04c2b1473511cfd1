"""What ``omniops segment`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omniops.cli.common import CommandError
from omniops.cli.segment.model import ModelChoice
from omniops.cli.segment.options import Save, Upsampling
from omniops.cli.segment.prompts import WrittenPrompt
from omniops.cli.segment.sources import Source


@dataclass(frozen=True)
class Labels:
    """The classes of objects."""

    of_all: str = "object"
    of_objects: dict[int, str] = field(default_factory=dict)

    def of(self, number: int) -> str:
        """The class of an object."""
        return self.of_objects.get(number, self.of_all)

    @property
    def categories(self) -> list[str]:
        """All classes, each once, by the numbers of their objects; that of all others comes first."""
        named = [name for _, name in sorted(self.of_objects.items())]
        return list(dict.fromkeys([self.of_all, *named] if self.of_all != "object" or not named else named))


@dataclass(frozen=True)
class Request:
    """A picture or a video, what to look for in it, with which model, and where the result goes."""

    source: Source
    prompts: list[WrittenPrompt]
    model: ModelChoice
    out: Path
    """Of which the other files have their names."""
    overwrite: bool
    save: tuple[Save, ...]
    labels: Labels = field(default_factory=Labels)
    upsampling: Upsampling = Upsampling.BILINEAR
    resume: bool = False


def parse_labels(texts: list[str]) -> Labels:
    """The classes of ``--label``."""
    of_all: list[str] = []
    of_objects: dict[int, str] = {}
    for text in texts:
        name, separator, number = text.rpartition("#")
        if not separator:
            of_all.append(text)
        elif not number.isdecimal() or int(number) < 1 or int(number) in of_objects:
            raise CommandError(f"--label must be NAME or NAME#OBJECT, once for each object, got {text!r}")
        else:
            of_objects[int(number)] = name
    if len(of_all) > 1:
        raise CommandError(f"--label {of_all[1]}: {of_all[0]} is the class of all objects; add #OBJECT to one of them")
    if any(not name.strip() for name in (*of_all, *of_objects.values())):
        raise CommandError("--label must not be empty")
    return Labels(of_all[0] if of_all else Labels.of_all, of_objects)
