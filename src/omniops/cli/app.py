"""The commands together, and how each of them ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from omniops.cli.bench import bench
from omniops.cli.common import CommandError
from omniops.cli.demo import demo
from omniops.cli.detect import detect
from omniops.cli.detect_eval import detect_eval
from omniops.cli.doctor import doctor
from omniops.cli.selftest import selftest

app = typer.Typer(
    name="omniops",
    help="Vision operators on every device: what serves them here, whether they are right, how fast they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (doctor, selftest, bench, demo, detect, detect_eval):
    app.command()(command)


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the command and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="omniops")
    except CommandError as error:
        print(f"omniops: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
