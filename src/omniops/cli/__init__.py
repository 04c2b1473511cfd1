"""The command ``omniops``."""

from __future__ import annotations

import sys

from omniops.cli import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or the process's own, and exit.

    Status 0: done, 1: failed, 2: used wrongly, 130: interrupted, 143: terminated, 141: nobody reads the output.
    """

    def call() -> None:
        try:
            from omniops.cli.app import run_app
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("typer", "rich"):
                raise
            raise errors.CommandError(
                f"the command needs {package}, which is not installed: pip install 'omniops[cli]'", status=1
            ) from None
        run_app(arguments)

    with errors.signals_as_errors(), errors.levels():
        errors.escape_unencodable()
        status = errors.run(call)
    sys.exit(status)
