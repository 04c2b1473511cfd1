"""When figures were taken, on what, and with which versions."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from omniops.environment import installed, machine, versions


def circumstances(device: str, peers: Iterable[str]) -> dict[str, Any]:
    """When figures were taken, by which command, on what and with which versions.

    Args:
        device: what they were taken on, in words.
        peers: the packages beside which omniops was timed.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "device": device,
        "hardware": {**machine(), "threads": torch.get_num_threads()},
        "versions": {**versions(), **installed(peers), "cuda": torch.version.cuda},
    }


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python {os.path.relpath(program)}" if program.suffix == ".py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}"
