"""The command ``omniops``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or the process's own, and exit."""
    try:
        from omniops.cli.app import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"omniops: error: the command needs {package}, which is not installed: pip install 'omniops[cli]'")
    run(arguments)
