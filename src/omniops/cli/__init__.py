"""The command ``omniops``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omniops.cli import ending


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or the process's own, and exit.

    Status 0: done, 1: failed, 2: used wrongly, 130: interrupted, 143: terminated, 141: nobody reads the output.
    """

    def run() -> None:
        try:
            from omniops.cli.app import run_app
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("typer", "rich"):
                raise
            raise ending.CommandError(
                f"the command needs {package}, which is not installed: pip install 'omniops[cli]'", status=1
            ) from None
        run_app(arguments)

    with ending.terminable():
        ending.write_any_name()
        status = ending.status_of(run)
    sys.exit(status)
