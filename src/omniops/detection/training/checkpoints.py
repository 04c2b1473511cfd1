"""The files of a training: written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from omniops.detection.trained import KEY, load
from omniops.weights import replace_file

_OF_STATE = {KEY, "state_dict", "settings", "dataset", "optimizer", "scaler", "rng"}
_OF_STATE |= {"epoch", "step", "totals", "history"}
LAST, BEST, HISTORY = "last.pth", "best.pth", "history.json"
"""The state after the last epoch, or within one; the weights after the best; the losses and figures of each."""


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers and texts; what was there is replaced once they are on the disk.

    Raises:
        OSError: where they cannot be written.
    """
    replace_file(path, lambda file: torch.save(dict(content), file))


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the record of each epoch as JSON.

    Raises:
        OSError: where it cannot be written.
    """
    replace_file(path, lambda file: file.write(json.dumps(history, indent=1).encode() + b"\n"))


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """What ``Training.state`` gave, on the CPU.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is none, or holds more than tensors, numbers and texts.

    Example:
        >>> read_checkpoint("boats/last.pth")
        Traceback (most recent call last):
        FileNotFoundError: there is no checkpoint at boats/last.pth
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        content = load(path)
    except Exception as error:  # of many types, whatever the bytes of a file that is none happen to mean
        raise ValueError(f"{path} is no checkpoint, a damaged one, or one that only running code restores") from error
    missing = sorted(_OF_STATE - set(content)) if isinstance(content, dict) else sorted(_OF_STATE)
    if missing:
        raise ValueError(f"{path} is no state of a training: it lacks {', '.join(missing)}")
    return dict(content)
