"""Files that are there whole or not at all, and in place of others only where that is asked for."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_new(path: Path, suffix: str, overwrite: bool) -> None:
    """Raise before the long work starts where a file could not be written or is there.

    Raises:
        ValueError: for a name that does not end with ``suffix``.
        FileNotFoundError, FileExistsError, PermissionError: what the file system says, or will say.
    """
    if not is_named(path, suffix):
        raise ValueError(f"path must be a name that ends with {suffix}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: {path.parent} is no folder that is there")
    for existing in names_of(path):
        if os.path.lexists(existing) and not overwrite:
            raise FileExistsError(f"{existing} is there already: overwrite=True replaces it")
    if path.is_dir() and path.suffix.lower() != ".mlpackage":
        raise FileExistsError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied")


def is_named(path: Path, suffix: str) -> bool:
    """Whether it is a name that ends with ``suffix``, and not that alone."""
    return path.suffix.lower() == suffix and path.name.lower() != suffix


def names_of(path: Path) -> list[Path]:
    """All that belongs to a file of that name: OpenVINO has the weights in a second one."""
    return [path.with_suffix(".bin"), path] if path.suffix.lower() == ".xml" else [path]


@contextmanager
def writing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path of that name in a new folder beside it; what is written there moves to its place at the end.

    A file with others beside it, which its format has put there, comes last, so that it is never there without them.
    """
    folder = path.parent / f".omniops-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder / path.name
        written = sorted(folder.iterdir(), key=lambda entry: entry.name == path.name)
        for target in (path.parent / entry.name for entry in written):
            if not overwrite and os.path.lexists(target):
                raise FileExistsError(f"cannot write {target}: meanwhile it is there")
        for entry in written:
            _move(entry, path.parent / entry.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(entry: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():  # a folder is not replaced by a renamed one
        os.rename(target, entry.with_name("replaced"))
    os.replace(entry, target)
