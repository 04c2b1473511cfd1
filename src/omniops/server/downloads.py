"""The masks of a session as files: COCO's JSON, pictures of masks, the objects coloured, and the objects cut out."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omniops.drawing import VideoWriter, paint
from omniops.sam2 import rle
from omniops.sam2.frames import Frames
from omniops.server.errors import ServerError, full_disk_errors
from omniops.server.jobs import Jobs, Progress
from omniops.server.settings import Settings

__all__ = ["Download", "Downloads", "MaskSource"]

_TYPES = {
    ".json": "application/json",
    ".zip": "application/zip",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".png": "image/png",
}
_PREFIX = ".made-"
_ABANDONED = 3600.0
_EDGE = 8
"""Pixels around an object that keep their colours where it is cut out of a video, for its edge is mixed with them."""


class MaskSource(Protocol):
    """What ``Downloads`` needs of a session."""

    path: Path
    name: str
    width: int
    height: int
    names: dict[int, str]

    @property
    def found(self) -> dict[int, dict[int, str]]:
        """COCO's counts by frame and object."""

    @property
    def is_picture(self) -> bool:
        """Whether it is a picture rather than a video."""


class Download(NamedTuple):
    """A file to be sent; it is removed when it is closed."""

    file: io.FileIO
    size: int
    type: str
    """Its media type."""
    name: str
    """The name under which the client saves it."""


class Downloads:
    """Makes files of a session's masks, by the threads of ``jobs``."""

    def __init__(self, settings: Settings, jobs: Jobs) -> None:
        self.jobs = jobs
        self._folder = settings.data / "downloads"

    def make(
        self,
        session: MaskSource,
        format: str,
        kind: str | None = None,
        *,
        key: str | None = None,
        gone: Callable[[], bool] | None = None,
    ) -> Download:
        """Make a file, and wait for it.

        Args:
            format: ``coco``, ``png`` (a zip of masks), ``overlay`` or ``cutout``.
            kind: ``mp4``, ``webm`` or ``png``, what an overlay or cut-out is written as; None for what suits.
            key: under which ``GET /progress/<key>`` reports its progress.
            gone: whether the client has gone, which ends the job.

        Raises:
            ServerError: for what there is not, and where nothing was found yet.
            Busy: where too much is to be done.
            Cancelled: where ``gone`` said so.
        """
        suffix = _suffix(format, kind, session.is_picture)
        found = {frame: dict(masks) for frame, masks in sorted(session.found.items()) if masks}
        if not found:
            raise ServerError("Nothing was found yet. Click on an object first.", 409)
        self._remove_abandoned()
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix, _PREFIX, self._folder)
        os.close(handle)
        out = Path(name)
        write = {"coco": _write_coco, "png": _write_masks, "overlay": _write_overlay, "cutout": _write_cutout}[format]
        work = _Work(session, found, out)
        progress = self.jobs.announce(key, "writing")
        job = None
        try:
            job = self.jobs.start(lambda progress: self._run(write, work, progress), progress)
            job.result(gone)
            file = _TemporaryFile(out)
        except BaseException:
            if job is not None:
                job.cancel()
                job.wait()
            out.unlink(missing_ok=True)
            raise
        return Download(file, out.stat().st_size, _TYPES[suffix], f"{_stem(session.name)}-{format}{suffix}")

    def _run(self, write: Callable[[_Work, Progress], None], work: _Work, progress: Progress) -> None:
        with self.jobs.budget.threads(1), full_disk_errors("files"):
            progress.check()
            write(work, progress)

    def _remove_abandoned(self) -> None:
        with suppress(OSError):
            for path in self._folder.glob(f"{_PREFIX}*"):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)


class _Work:
    """One file to be written."""

    def __init__(self, session: MaskSource, found: dict[int, dict[int, str]], out: Path) -> None:
        self.found, self.out = found, out
        self.size = [session.height, session.width]
        self.is_picture, self.names, self._path = session.is_picture, dict(session.names), session.path

    def opened(self) -> Frames:
        """The source.

        Raises:
            ServerError: where it is not there any more.
        """
        try:
            return Frames(self._path)
        except (OSError, ValueError):
            raise ServerError("The video cannot be read any more.", 410) from None

    def masks(self, frame: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """The masks of a frame, (H, W) each, with their objects."""
        for number, counts in self.found.get(frame, {}).items():
            yield number, rle.decode({"size": self.size, "counts": counts})


class _TemporaryFile(io.FileIO):
    """A file that is removed when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(str(path), "rb")

    def close(self) -> None:
        super().close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _suffix(format: str, kind: str | None, is_picture: bool) -> str:
    """What the file ends with.

    Raises:
        ServerError: for what there is not.
    """
    if format in ("coco", "png"):
        return ".json" if format == "coco" else ".zip"
    if format not in ("overlay", "cutout"):
        raise ServerError("format must be coco, png, overlay or cutout.")
    usual = "png" if is_picture else "mp4" if format == "overlay" else "webm"
    kind = kind or usual
    if kind not in ("mp4", "webm", "png"):
        raise ServerError("as must be mp4, webm or png.")
    if is_picture and kind != "png":
        raise ServerError("A picture is written as png.")
    if not is_picture and kind == "png":
        raise ServerError("A video is written as mp4 or webm; format=png gives its masks as pictures.")
    return f".{kind}"


def _stem(name: str) -> str:
    """What files made of a video are called, by its path in the API."""
    stem = PurePosixPath(name).stem
    return f"upload-{stem[:8]}" if name.startswith("uploads/") else stem


def _write_coco(work: _Work, progress: Progress) -> None:
    """A record of each object on each frame, as ``omniops segment`` writes them."""
    times = None if work.is_picture else work.opened().times
    with work.out.open("w", encoding="utf-8") as file:
        for i, (frame, masks) in enumerate(work.found.items()):
            for j, (number, mask) in enumerate(work.masks(frame)):
                position: dict[str, Any] = {} if work.is_picture else {"frame": frame}
                if times is not None:
                    position["time"] = float(times[frame])
                name = {"name": work.names[number]} if number in work.names else {}
                segmentation = {"size": work.size, "counts": masks[number]}
                record = {**position, "id": number, **name, "segmentation": segmentation, "area": int(mask.sum())}
                file.write(("[" if i == j == 0 else ",\n") + json.dumps(record))
            progress.update(i + 1, len(work.found))
        file.write("]\n")


def _write_masks(work: _Work, progress: Progress) -> None:
    """A picture of each mask, white inside, in a folder for each object: they may lie over each other."""
    with zipfile.ZipFile(work.out, "w") as archive:
        for i, frame in enumerate(work.found):
            for number, mask in work.masks(frame):
                picture = io.BytesIO()
                Image.fromarray(mask.astype(np.uint8) * 255).save(picture, "PNG")
                folder = _folder_of(number, work.names.get(number, ""))
                archive.writestr(
                    f"{folder}.png" if work.is_picture else f"{folder}/{frame:05d}.png", picture.getvalue()
                )
            progress.update(i + 1, len(work.found))


def _folder_of(number: int, name: str) -> str:
    """A name that all systems take, and that no other object has."""
    safe = re.sub(r"[^\w -]+", "_", name).strip(" ._")[:60]
    return f"{number}-{safe}" if safe else str(number)


def _write_overlay(work: _Work, progress: Progress) -> None:
    def draw(frame: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # The largest first, so that none is hidden by what it lies in.
        paint(pixels, sorted(work.masks(frame), key=lambda item: -int(item[1].sum())))
        return pixels

    _write_frames(work, progress, draw)


def _write_cutout(work: _Work, progress: Progress) -> None:
    """The objects alone: on nothing where the file knows transparency, on black in MP4, which does not."""
    is_opaque = work.out.suffix == ".mp4"

    def draw(frame: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        inside = np.zeros(pixels.shape[:2], np.bool_)
        for _, mask in work.masks(frame):
            inside |= mask
        kept = inside if work.is_picture or is_opaque else _dilated(inside, _EDGE)
        pixels = np.where(kept[..., None], pixels, 0)
        return pixels if is_opaque else np.dstack([pixels, inside.astype(np.uint8) * 255])

    _write_frames(work, progress, draw)


def _write_frames(work: _Work, progress: Progress, draw: Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    """Every frame of the source as ``draw`` makes it of its number and pixels."""
    source = work.opened()
    if work.is_picture:
        Image.fromarray(draw(0, source[0])).save(work.out, "PNG")
        return
    with VideoWriter(work.out, like=source) as writer:
        for i in range(len(source)):
            writer.write(draw(i, source[i]), None if source.times is None else float(source.times[i]))
            progress.update(i + 1, len(source))


def _dilated(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """The mask, dilated by a square of ``2 * radius + 1`` pixels."""
    for axis in (0, 1):
        dilated = mask.copy()
        reach = 1
        left = radius
        while left > 0:  # doubling: what is dilated by n is dilated by 2 n in one step
            step = min(reach, left)
            previous = dilated.copy()
            later, earlier = [slice(None)] * 2, [slice(None)] * 2
            later[axis], earlier[axis] = slice(step, None), slice(None, -step)
            dilated[tuple(later)] |= previous[tuple(earlier)]
            dilated[tuple(earlier)] |= previous[tuple(later)]
            left -= step
            reach *= 2
        mask = dilated
    return mask
