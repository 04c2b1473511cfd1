"""The commands together, and how each of them ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from omniops.cli.bench import bench
from omniops.cli.bench_sam2 import bench_sam2
from omniops.cli.common import CommandError
from omniops.cli.demo import demo
from omniops.cli.detect import detect
from omniops.cli.detect_eval import detect_eval
from omniops.cli.doctor import doctor
from omniops.cli.segment import segment
from omniops.cli.selftest import selftest

_BENCH_SAM2 = "bench sam2"


class _Commands(TyperGroup):
    """With a command of two words, beside the one that is called as the first of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Which command the arguments name, and what is left of them."""
        if " ".join(args[:2]) == _BENCH_SAM2:
            args = [_BENCH_SAM2, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="omniops",
    cls=_Commands,
    help="Vision operators on every device: what serves them here, whether they are right, how fast they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (doctor, selftest, bench, demo, detect, detect_eval, segment):
    app.command()(command)
app.command(_BENCH_SAM2, hidden=True)(bench_sam2)  # omniops bench --help names it


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the command and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="omniops")
    except CommandError as error:
        print(f"omniops: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
