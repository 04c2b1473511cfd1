"""The options of the command itself, and those that every command takes."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from omniops.cli import errors

EXIT_STATUS = (
    "Exit status: 0 done, 1 failed, 2 used wrongly, 130 interrupted (Ctrl-C), 143 terminated, 129 its terminal was "
    "closed, 141 nobody reads the output."
)


class LogLevel(str, Enum):
    """What is said on stderr, from least to most."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


def _show_version(wanted: bool) -> None:
    if wanted:
        from omniops import __version__

        typer.echo(f"omniops {__version__}")
        raise typer.Exit


def _set_quiet(wanted: bool) -> None:
    if wanted:
        errors.set_level("error")


def _set_level(level: LogLevel | None) -> None:
    if level is not None and not errors.is_quiet():  # whichever of the two is read first
        errors.set_level(level.value)


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_show_version, expose_value=False, is_eager=True, help="Show it and exit."),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_set_quiet,
        expose_value=False,
        show_default=False,
        help="Results alone, and what ends the command: no notes, warnings and progress.",
    ),
]
LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(
        "--log-level",
        callback=_set_level,
        expose_value=False,
        envvar="OMNIOPS_LOG_LEVEL",
        show_default="info",
        help="What is said on stderr besides errors; debug adds an error's traceback.",
    ),
]


def of_the_command(version: VersionOption = False) -> None:
    """What stands before a command's name."""


def of_every_command(quiet: QuietOption = False, log_level: LogLevelOption = None) -> None:
    """What every command takes besides its own options."""
