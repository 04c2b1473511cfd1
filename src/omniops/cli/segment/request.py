"""What ``omniops segment`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omniops.cli.segment.model import ModelChoice
from omniops.cli.segment.prompts import WrittenPrompt


@dataclass(frozen=True)
class Request:
    """A picture or a video, what to look for in it, with which model, and where the result goes."""

    source: Path
    prompts: list[WrittenPrompt]
    model: ModelChoice
    out: Path
    overwrite: bool


def overlay_of(out: Path) -> Path:
    """Where the masks are shown on a picture, beside what they are written to."""
    return out.with_name(f"{out.stem}-overlay.jpg")
