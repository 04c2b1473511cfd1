"""The files that commands write: none in the place of another unless that is asked for, each whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from unicodedata import normalize

import typer

from omniops.cli.common import require_writable
from omniops.cli.errors import CommandError, reason

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]

_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
_MAX_NAMED = 10
"""How many of the files that are in the way an error names."""


def require_new(paths: Iterable[Path | None], overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raise before the long work starts where a file could not be written, or is there; make the folders.

    What is read is never written to. A device or a pipe may be written to: it has nothing to lose.
    """
    wanted = [path for path in paths if path is not None]
    read = {os.path.realpath(source) for source in sources}
    for path in wanted:
        if os.path.realpath(path) in read or any(_is_same(path, source) for source in sources):
            raise CommandError(f"{path} would be overwritten: it is what is read, so --out must be another")
    existing = [path for path in wanted if os.path.lexists(path) and not _is_stream(path) and not os.path.isdir(path)]
    if existing and not overwrite:
        raise CommandError(f"{_describe_existing(existing)} already: --overwrite replaces what is there")
    for path in wanted:
        require_writable(path)
        if not _is_stream(path) and not os.access(path.parent, os.W_OK):
            raise CommandError(f"cannot write {path}: permission denied")


def require_ending(option: str, path: Path, ending: str, what: str) -> None:
    """Raise where a file is not called as what is written into it; ``what`` says what that is."""
    if path.name.lower() == ending:
        raise CommandError(f"{option} {path}: a name is missing before {ending}")
    if path.suffix.lower() != ending:
        raise CommandError(f"cannot write {path}: {what} ends with {ending}")


def require_picture(option: str, path: Path | None) -> None:
    """Raise for a name whose ending is no picture format's."""
    if path is None:
        return
    if path.name.lower() in _PICTURES:
        raise CommandError(f"{option} {path}: a name is missing before {path.name}")
    if path.suffix.lower() not in _PICTURES:
        raise CommandError(f"cannot write {path}: a picture's name ends with .png, .jpg, .pdf, .svg or .webp")


@contextmanager
def writing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path to write to meanwhile, in the same folder, for what gets its name once it is whole.

    Raises CommandError, status 1, for whatever keeps it from being written.
    """
    if _is_stream(path):
        with _errors_of_file(path):
            yield path
        return
    target = Path(os.path.realpath(path)) if overwrite else path
    ending = path.suffix if len(path.suffix) < 10 else ""
    temporary = target.with_name(f".omniops-{os.getpid()}-{secrets.token_hex(4)}{ending}")
    try:
        with _errors_of_file(path):
            yield temporary
            _rename(temporary, target, overwrite)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def writing_numbered_pictures(folder: Path) -> Iterator[Path]:
    """A folder to write 1.png, 2.png, ... to meanwhile, which are then in ``folder`` in place of those of a run before.

    Where there is no such folder it is there with all of them or not at all. Raises CommandError as ``writing``.
    """
    temporary = folder.with_name(f".omniops-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _errors_of_file(folder):
            temporary.mkdir(parents=True)
            yield temporary
            if folder.is_dir():
                delete_numbered_pictures(folder)
                for path in temporary.iterdir():
                    os.replace(path, folder / path.name)
            else:
                os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_numbered_pictures(folder: Path) -> None:
    """Delete 1.png, 2.png, ... of a run before, which may have found more."""
    for path in folder.glob("*.png"):
        if re.fullmatch(r"\d+", path.stem):
            with suppress(OSError):
                path.unlink()


def write_json(path: Path, value: Any, overwrite: bool, indent: int | None = None) -> None:
    """Write a value as JSON; what is there under that name is never a part of it."""
    text = json.dumps(value, indent=indent) + "\n"
    with writing(path, overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if not _is_stream(path):
            os.fsync(file.fileno())


class Records:
    """Records that are on disk as they are found, and one JSON file at the end.

    Until then FILE.jsonl has a line for each, so whatever ends the process leaves all that it had found.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        self.lines = lines_of(path)
        self._overwrite = overwrite
        self._file: BinaryIO | None = None
        self._size = 0

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Write lines, or none where there is no room for all."""
        text = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        if _is_stream(self.path):
            return
        with _errors_of_file(self.lines):
            if self._file is None:
                self._file = self.lines.open("wb" if self._overwrite else "xb", buffering=0)
            try:
                left = memoryview(text)
                while left:
                    left = left[self._file.write(left) :]
            except BaseException:
                self._file.truncate(self._size)
                raise
            self._size += len(text)

    def finish(self, records: Sequence[dict[str, Any]] | None, lines: Sequence[dict[str, Any]] | None = None) -> None:
        """Write all of them as one JSON file, in the order given, in place of the lines.

        None for no such file. Where ``lines`` are given, they stay, in the order given.
        """
        self.keep_lines()
        try:
            if lines is not None:
                with writing(self.lines, overwrite=True) as temporary:
                    temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            if records is not None:
                write_json(self.path, records, self._overwrite)
        except CommandError as error:
            kept = f"; {self.lines} has what was found, a line of JSON each" if self._file is not None else ""
            raise CommandError(f"{error}{kept}", status=1) from None
        if lines is None and (self._file is not None or self._overwrite):  # or of a run before
            with suppress(OSError):
                self.lines.unlink(missing_ok=True)

    def keep_lines(self) -> None:
        """Write no more lines, and leave them as they are."""
        if self._file is not None:
            self._file.close()


def lines_of(path: Path) -> Path:
    """Where ``Records`` writes until the file of this name is whole."""
    return path.with_suffix(".jsonl")


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # which fails where somebody else was faster: a renamed file would replace theirs
    except FileExistsError:
        raise CommandError(f"cannot write {target}: meanwhile it is there", status=1) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise CommandError(f"cannot write {target}: meanwhile it is there", status=1) from None
        os.replace(temporary, target)


@contextmanager
def _errors_of_file(path: Path) -> Iterator[None]:
    """Errors of writing, as errors of the file that is meant."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {path}: {reason(error)}", status=1) from None


def _describe_existing(paths: Sequence[Path]) -> str:
    names = ", ".join(map(str, paths[:_MAX_NAMED]))
    more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    return f"{names}{more} {'is' if len(paths) == 1 else 'are'} there"


def _is_stream(path: Path) -> bool:
    """Whether what is there is a device, a pipe or a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _is_same(path: Path, source: Path) -> bool:
    try:
        return path.samefile(source)
    except OSError:
        return False


def unique_stems(names: Iterable[str]) -> list[str]:
    """What files of those names are called, numbered where several are called the same, without their endings.

    Some file systems tell neither A from a nor é from e with an accent.
    """
    stems: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for name in names:
        stem = unique = Path(name).stem
        while _key(unique) in stems:
            numbers[_key(stem)] += 1
            unique = f"{stem}-{numbers[_key(stem)] + 1}"
        stems[_key(unique)] = unique
    return list(stems.values())


def _key(name: str) -> str:
    return normalize("NFC", name).casefold()
