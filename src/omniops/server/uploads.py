"""Uploaded videos and pictures: written to the disk as they arrive, checked, converted, and removed when old."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from omniops.server import pictures
from omniops.server.errors import NotFound, ServerError, TooLarge, full_disk_errors
from omniops.server.jobs import Jobs, Progress
from omniops.server.settings import Settings
from omniops.server.transcode import Encoding, transcode
from omniops.server.videos import Video, Videos

__all__ = ["Incoming", "Uploads", "temporary_file"]

_CHUNK_BYTES = 2**20
_PREFIX = ".incoming-"
_ABANDONED = 3600.0
"""Seconds after which an unfinished file is nobody's any more."""
_SWEEP = 60.0
_KEPT_CLIPS = 1000
"""Clips of which is known what was made of them."""
_KEPT = re.compile(r"[0-9a-f]{64}\.(mp4|png|jpg)")


class Incoming(io.FileIO):
    """A file of its own in the folder of uploads, which is gone when it is closed.

    Raises:
        TooLarge: by ``write``, for more than ``max_bytes``.
        ServerError: by ``write``, where the disk is full.
    """

    def __init__(self, folder: Path, max_bytes: int, progress: Progress | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
        os.close(handle)
        self.path = Path(name)
        self._max_bytes, self._progress = max_bytes, progress
        super().__init__(name, "w+b")

    def write(self, data: Any) -> int:
        """Append ``data``, all of it."""
        left = memoryview(data).cast("B")
        if self.tell() + len(left) > self._max_bytes:
            raise TooLarge(f"It has more than the {self._max_bytes / 1e6:g} megabytes that are taken.")
        count = len(left)
        with full_disk_errors("files"):
            while left:
                left = left[super().write(left) or 0 :]
        if self._progress is not None:
            self._progress.update(self.tell(), self._progress.total)
        return count

    def close(self) -> None:
        """Let go of the file, and remove it."""
        super().close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def temporary_file(settings: Settings, progress: Progress | None = None) -> Incoming:
    """Where a file that comes is written to, as much of it as is taken."""
    return Incoming(settings.uploads, settings.max_upload_bytes, progress)


class Uploads:
    """What is made of files that people send.

    Args:
        settings: has the limits, the folder, and how videos are written.
        videos: describes what was made.
        in_use: the API's paths (``uploads/HASH.mp4``) of which nothing is removed; asked before anything is.
    """

    def __init__(self, settings: Settings, videos: Videos, in_use: Callable[[], Iterable[str]] = tuple) -> None:
        self.settings = settings
        self.videos = videos
        self.jobs: Jobs = videos.jobs
        self.in_use = in_use
        self._lock = threading.Lock()
        self._swept = -math.inf
        self._made: OrderedDict[tuple[str, float, float], str] = OrderedDict()

    def receive(
        self,
        stream: BinaryIO,
        *,
        start: float | None = None,
        duration: float | None = None,
        picture: bool = False,
        key: str | None = None,
        gone: Callable[[], bool] | None = None,
    ) -> Video:
        """Store a video, or a picture, and wait for it to be checked and converted by another thread.

        Args:
            stream: the file, an ``Incoming`` or anything that can be read; it is closed.
            start: seconds into the video where it begins; None for what the settings say.
            duration: seconds of it, of which no more are taken than the settings say.
            key: under which ``GET /progress/<key>`` reports its progress.
            gone: whether the client has gone, which ends the job.

        Raises:
            TooLarge: for too many bytes or pixels.
            ServerError: for wrong times, and in the official server's words for what is no video.
            Busy: where too much is to be done.
            Cancelled: where ``gone`` said so.
        """
        begin, seconds = self._span(start, duration)
        progress = self.jobs.announce(key, "receiving")
        self.sweep()
        incoming = stream if isinstance(stream, Incoming) else self._copied(stream, progress)
        with incoming:
            incoming.flush()
            make = self._picture if picture else self._video
            progress.update(0, None, "converting")
            job = self.jobs.start(lambda progress: make(incoming.path, begin, seconds, progress), progress)
            try:
                path = job.result(gone)
            except BaseException:
                job.cancel()
                job.wait()  # it reads the file
                raise
        self.sweep(keep=path)
        return self.videos.describe(path)

    def sweep(self, keep: str | None = None) -> None:
        """Remove what nobody used for long, and the oldest where all are too large; ``keep`` stays."""
        with self._lock:
            if keep is None and time.monotonic() < self._swept + _SWEEP:
                return
            self._swept = time.monotonic()
            in_use = {*self.in_use(), keep}
            now, all_stored = time.time(), sorted(self._stored(), reverse=True)
            total = sum(size for _, size, path in all_stored if f"uploads/{path.name}" in in_use)
            for used, size, path in all_stored:
                if f"uploads/{path.name}" in in_use:
                    continue
                if now - used > self.settings.upload_age or total + size > self.settings.max_uploads_bytes:
                    with suppress(OSError):
                        path.unlink()
                        (self.settings.posters / f"{path.stem}.jpg").unlink(missing_ok=True)
                else:
                    total += size
            with suppress(OSError):
                for path in self.settings.uploads.glob(f"{_PREFIX}*"):
                    if now - path.stat().st_mtime > _ABANDONED:
                        path.unlink(missing_ok=True)

    def _stored(self) -> Iterator[tuple[float, int, Path]]:
        """When each upload was used last, its size and path."""
        with suppress(OSError):
            for path in list(self.settings.uploads.iterdir()):
                with suppress(OSError):
                    found = path.lstat()
                    if _KEPT.fullmatch(path.name):
                        yield max(found.st_atime, found.st_mtime), found.st_size, path

    def _span(self, start: float | None, duration: float | None) -> tuple[float, float]:
        begin = self.settings.video_encode_seek_time if start is None else start
        seconds = self.settings.max_upload_video_duration if duration is None else duration
        if not 0 <= begin < math.inf:
            raise ServerError("startTimeSec must be a number of seconds from 0 on.")
        if not 0 < seconds < math.inf:
            raise ServerError("durationTimeSec must be a number of seconds above 0.")
        return begin, min(seconds, self.settings.max_upload_video_duration)

    def _copied(self, stream: BinaryIO, progress: Progress) -> Incoming:
        incoming = temporary_file(self.settings, progress)
        try:
            shutil.copyfileobj(stream, incoming, _CHUNK_BYTES)
        except BaseException:
            incoming.close()
            raise
        finally:
            stream.close()
        return incoming

    def _video(self, source: Path, begin: float, seconds: float, progress: Progress) -> str:
        asked = (_digest(source), begin, seconds)
        with self._unfinished(".mp4") as out:
            with self.jobs.budget.threads() as threads:
                progress.check()
                # Nothing is converted twice. Encoders of hardware may write other bytes the second time, too.
                known = self._made.get(asked)
                count = 0 if known is None else self._frames_of(known)
                if known is not None and count:
                    progress.update(count, count)
                    return known
                transcode(
                    source,
                    out,
                    Encoding.of(self.settings),
                    start=begin,
                    duration=seconds,
                    max_pixels=self.settings.max_upload_pixels,
                    threads=threads,
                    progress=progress,
                )
                progress.check()
                path = self._made[asked] = self._store(out)
            with self._lock:
                while len(self._made) > _KEPT_CLIPS:
                    self._made.popitem(last=False)
            return path

    def _picture(self, source: Path, _begin: float, _seconds: float, progress: Progress) -> str:
        with self.jobs.budget.threads(1):
            progress.check()
            with full_disk_errors("files"):
                out = pictures.write(source, self.settings.uploads, source.name, self.settings.max_upload_pixels)
        try:
            return self._store(out)
        finally:
            out.unlink(missing_ok=True)

    @contextmanager
    def _unfinished(self, suffix: str) -> Iterator[Path]:
        handle, name = tempfile.mkstemp(suffix, _PREFIX, self.settings.uploads)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _frames_of(self, path: str) -> int:
        """How many frames an upload has; 0 where it was removed."""
        with suppress(NotFound):
            return self.videos.describe(path).frames
        return 0

    def _store(self, made: Path) -> str:
        """Give a file the name that its content has. Returns the API's path."""
        path = self.settings.uploads / f"{_digest(made)}{made.suffix}"
        os.chmod(made, 0o644)
        with self._lock:  # not between a look at what is old and its removal
            if path.is_file():
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            else:
                os.replace(made, path)
        return f"uploads/{path.name}"


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
