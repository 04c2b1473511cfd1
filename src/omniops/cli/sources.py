"""What a command reads, as it is named: files, patterns that the shell did not expand, and lists of files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Annotated

import typer

from omniops.cli.errors import CommandError, reason

FilesFromOption = Annotated[
    str | None,
    typer.Option(
        "--files-from",
        metavar="FILE",
        help="More of them, a path on each line of a file; - is stdin, as of find.",
        show_default=False,
    ),
]


def expand_sources(arguments: Sequence[str], files_from: str | None = None) -> list[str]:
    """What the arguments and a list name, in this order; what a pattern finds is sorted by name.

    A file whose name has a ``*`` is that file. ``**`` is any number of folders. The paths of a list are separated by
    ends of lines, or by NUL as of ``find -print0``; they are no patterns.
    """
    sources: list[str] = []
    for argument in arguments:
        is_pattern = any(sign in argument for sign in "*?[") and "://" not in argument
        if not is_pattern or Path(argument).exists():
            sources.append(argument)
            continue
        found = sorted(glob(argument, recursive=True))
        if not found:
            raise CommandError(f"nothing there is called {argument}")
        sources += found
    if files_from is not None:
        listed = _read_list(files_from)
        if not listed:
            raise CommandError(f"--files-from {files_from}: no path in it")
        sources += listed
    if not sources:
        raise CommandError("nothing to read: name files, or a list of them by --files-from")
    return sources


def _read_list(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--files-from {name}: {reason(error)}") from None
    lines = text.split("\0") if "\0" in text else text.splitlines()
    return [line for line in lines if line.strip()]
