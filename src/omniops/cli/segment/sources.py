"""What ``omniops segment`` reads: pictures, videos and live videos, told apart by what is in them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from io import BufferedReader
from pathlib import Path
from typing import IO

from omniops.cli.common import CommandError, require_sam2
from omniops.cli.pictures import find_pictures, is_picture
from omniops.cli.sources import expand_sources

_SIGNATURE_SIZE = 16


class Kind(Enum):
    """How a source is segmented."""

    PICTURE = "picture"
    VIDEO = "video"
    LIVE = "live video"


@dataclass(frozen=True)
class Source:
    """A picture, a video or a live video."""

    name: str
    """As it was written, for what is said of it."""
    kind: Kind
    place: Path | int | str | bytes | IO[bytes]
    """The file or folder, the bytes of a picture, or the live video as ``LiveFrames`` takes it."""

    @property
    def path(self) -> Path | None:
        """The file or folder; None of what is none."""
        return self.place if isinstance(self.place, Path) else None


@dataclass(frozen=True)
class Sources:
    """All that is to be segmented."""

    all: list[Source]
    are_many: bool
    """Whether results go to a folder, as where several were named, even if one was found."""


def find_sources(
    arguments: Sequence[str], files_from: str | None, camera: int | None, *, everything: bool, pictures: bool
) -> Sources:
    """What the arguments name.

    Args:
        arguments: files, folders, patterns, URLs, ``-``.
        files_from: a list of more.
        camera: the number of one.
        everything: whether all masks are looked for, which needs pictures.
        pictures: whether the files of a folder are pictures by themselves.
    """
    if camera is not None:
        if arguments or files_from is not None:
            raise CommandError("--camera is read alone: leave out what else is to be read")
        require_sam2()
        found = Sources([Source(f"camera {camera}", Kind.LIVE, camera)], False)
    elif list(arguments) == ["-"] and files_from is None:
        require_sam2()
        found = Sources([_of_stdin()], False)
    else:
        found = _of_paths(expand_sources(arguments, files_from), arguments, everything or pictures)
    for source in found.all:
        if everything and source.kind is not Kind.PICTURE:
            raise CommandError(f"--everything is for pictures, and {source.name} is none that Pillow can read")
        if source.kind is Kind.LIVE and found.are_many:
            raise CommandError(f"{source.name} is a live video, which is read alone")
    return found


def _of_paths(names: Sequence[str], arguments: Sequence[str], folders_have_pictures: bool) -> Sources:
    from omniops.sam2.live_sources import is_stream

    sources: list[Source] = []
    are_many = list(names) != list(arguments) or len(names) > 1
    for name in names:
        path = Path(name)
        if is_stream(name):
            require_sam2()
            sources.append(Source(name, Kind.LIVE, name))
        elif name == "-":
            raise CommandError("- is a picture or a video from stdin, and is read alone")
        elif not path.exists():
            raise CommandError(f"no such file: {name}")
        elif path.is_dir() and folders_have_pictures:
            are_many = True
            sources += [Source(str(file), Kind.PICTURE, file) for file in find_pictures([path])]
        else:
            require_sam2()
            kind = Kind.PICTURE if path.is_file() and is_picture(path) else Kind.VIDEO
            sources.append(Source(name, kind, path))
    return Sources(list(dict.fromkeys(sources)), are_many)


def _of_stdin() -> Source:
    """A picture from a pipe, which is read to its end, or a video, which is read as it comes."""
    from omniops.sam2.picture_files import begins_like_picture

    stream = sys.stdin.buffer
    assert isinstance(stream, BufferedReader)
    if begins_like_picture(stream.peek(_SIGNATURE_SIZE)):
        return Source("stdin", Kind.PICTURE, stream.read())
    return Source("stdin", Kind.LIVE, stream)
