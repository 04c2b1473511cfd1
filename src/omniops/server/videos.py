"""The videos and pictures that the server offers: the gallery, what was uploaded, and their posters.

Only what was listed may be opened: a path of the API is looked up, never joined to a folder. Files of the
gallery that not all browsers can show as they are, or not all of whose frames, are converted once; the result
is offered under their own path.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniops.sam2.picture_files import KINDS
from omniops.server import clips, pictures
from omniops.server.errors import Busy, NotFound, ServerError
from omniops.server.jobs import Job, Jobs, Progress
from omniops.server.settings import Settings

__all__ = ["Video", "Videos"]

_log = logging.getLogger(__name__)
_UPLOAD = re.compile(r"uploads/[0-9a-f]{64}\.(mp4|png|jpg)")
_POSTER = re.compile(r"posters/([0-9a-f]{32}|[0-9a-f]{64})\.jpg")
_OURS = re.compile(r"[0-9a-f]{32}\.(mp4|png|jpg)")
_POSTER_SIDE = 1280
_PATIENCE = 20.0
"""Seconds that someone waits for a file of the gallery to be converted."""
_DESCRIBED = 1000
"""Uploads of which is known what they are."""
_OTHER = "There is no such video. It may have been removed."


@dataclass(frozen=True)
class Video:
    """A video or a picture, as the API describes it."""

    path: str
    """``gallery/NAME.mp4`` or ``uploads/HASH.mp4``, as it is: not quoted for URLs."""
    poster_path: str | None
    """``posters/KEY.jpg``; None of uploads."""
    width: int
    height: int
    frames: int
    fps: float | None
    """Frames a second, on average; None of a picture."""
    is_picture: bool


@dataclass
class _Entry:
    """A file of the gallery."""

    path: Path
    state: tuple[int, ...]
    """By which a change of the file is noticed."""
    key: str
    """What its poster and what it was converted to are called; another one after a change."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    shown: Path | None = None
    """What is served and opened, once it is known."""
    video: Video | None = None
    job: Job[Any] | None = None
    failed: bool = False


class Videos:
    """The registry of what may be opened. Several threads may use it.

    Args:
        settings: have the folders, and how videos are converted.
        jobs: what converts them.
    """

    def __init__(self, settings: Settings, jobs: Jobs | None = None) -> None:
        self.settings = settings
        self.jobs = jobs or Jobs(settings.ffmpeg_num_threads)
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._uploads: dict[str, Video] = {}
        self._converted = settings.data / "converted"
        self._posters = threading.Lock()
        # Beside the budget, by one thread: what people wait for is not to wait for a whole gallery.
        self._conversions = Jobs(workers=1, waiting=1000)

    def videos(self) -> list[Video]:
        """Those of the gallery, by the natural order of their names. The folder is looked through at each call.

        Left out is what is no video, and for the time being what is still converted.
        """
        return self._listed(is_picture=False)

    def pictures(self) -> list[Video]:
        """The pictures of the gallery, as ``videos``."""
        return self._listed(is_picture=True)

    def default(self) -> Video:
        """The one that the settings name, else the first.

        Raises:
            NotFound: where the gallery is empty.
        """
        found = self.videos()
        if not found:  # those that are converted come late rather than not at all
            for path, entry in list(self._entries.items()):
                if entry.job is not None and not entry.failed and not _is_picture(path):
                    with suppress(ServerError):
                        self.find(path)
                        found = [self.describe(path)]
                        break
        if not found:
            raise NotFound("There is no video in the gallery yet. Upload one, or put an MP4 file into the gallery.")
        return next((video for video in found if video.path == self.settings.default_video), found[0])

    def find(self, path: str) -> Path:
        """Where a video or picture of the gallery, or an upload, lies on the disk, to be opened or sent.

        Where it is being converted this waits for the end, for some time.

        Raises:
            NotFound: for whatever else, wherever it may lead.
            Busy: where converting it takes longer.
        """
        if _UPLOAD.fullmatch(path):
            return self._upload(path)
        entry = self._entry(path)
        self._prepare(path, entry)
        if entry.shown is None and entry.job is not None:
            entry.job.wait(_PATIENCE)
            if entry.job.ended:
                self._take_converted(path, entry)
        if entry.failed:
            raise NotFound(_OTHER)
        if entry.shown is None:
            raise Busy("The video is being converted to what browsers show. Try again in a minute.")
        return entry.shown

    def describe(self, path: str) -> Video:
        """The description of a path that ``find`` finds.

        Raises:
            NotFound: as ``find``.
        """
        file = self.find(path)
        if path.startswith("uploads/"):
            found = self._uploads.get(path)
            if found is None:
                if len(self._uploads) >= _DESCRIBED:
                    self._uploads.clear()
                found = self._uploads[path] = self._described(path, None, file)
            return found
        video = self._entry(path).video
        if video is None:
            raise NotFound(_OTHER)
        return video

    def poster(self, path: str) -> Path:
        """The JPEG of ``Video.poster_path``, or of the upload ``posters/HASH.jpg``, made when it is first asked for.

        Raises:
            NotFound: for what is no poster of these.
        """
        named = _POSTER.fullmatch(path)
        source = self._of_poster(named[1]) if named else None
        if named is None or source is None:
            raise NotFound("There is no such poster.")
        poster = self.settings.posters / f"{named[1]}.jpg"
        if not poster.is_file():
            shown = self.find(source)
            with self._posters:
                if not poster.is_file():
                    self._write_poster(shown, poster)
        return poster

    def _of_poster(self, key: str) -> str | None:
        """The API's path of what the poster shows."""
        if len(key) == 64:
            names = (f"{key}.{suffix}" for suffix in ("mp4", "png", "jpg"))
            return next((f"uploads/{name}" for name in names if (self.settings.uploads / name).is_file()), None)
        return next((path for path, entry in list(self._entries.items()) if entry.key == key), None)

    def _listed(self, is_picture: bool) -> list[Video]:
        found = []
        for path, entry in self._refresh().items():
            if _is_picture(path) == is_picture:
                self._prepare(path, entry)
                if entry.video is not None:
                    found.append(entry.video)
        return found

    def _entry(self, path: str) -> _Entry:
        entry = self._entries.get(path)
        if entry is None or _state(entry.path) != entry.state:
            entry = self._refresh().get(path)
        if entry is None or not _inside(entry.path, self.settings.gallery):
            raise NotFound(_OTHER)
        return entry

    def _refresh(self) -> dict[str, _Entry]:
        """Look through the gallery. What has not changed stays as it is known."""
        with self._lock:
            entries: dict[str, _Entry] = {}
            for path, file, state in _files(self.settings.gallery):
                known = self._entries.get(path)
                if known is None or known.state != state:
                    known = _Entry(file, state, self._key(path, state))
                entries[path] = known
            if entries.keys() != self._entries.keys() or any(
                self._entries[path] is not entry for path, entry in entries.items()
            ):
                self._entries = entries
                self._forget_others()
            return self._entries

    def _key(self, path: str, state: tuple[int, ...]) -> str:
        encoding = (self.settings.video_encode_codec, self.settings.video_encode_crf)
        size = (self.settings.video_encode_max_width, self.settings.video_encode_max_height)
        return hashlib.sha256(repr((path, state, encoding, size)).encode()).hexdigest()[:32]

    def _forget_others(self) -> None:
        """Remove posters and converted files of what is not in the gallery any more."""
        keys = {entry.key for entry in self._entries.values()}
        for folder in (self.settings.posters, self._converted):
            with suppress(OSError):
                for file in list(folder.iterdir()):
                    if _OURS.fullmatch(file.name) and file.stem not in keys:
                        file.unlink(missing_ok=True)

    def _prepare(self, path: str, entry: _Entry) -> None:
        """Find out what a file is, or begin to convert it."""
        with entry.lock:
            if entry.shown is not None or entry.failed:
                return
            if entry.job is not None:
                if entry.job.ended:
                    self._take_converted(path, entry)
                return
            try:
                converted = next(self._converted.glob(f"{entry.key}.*"), None)
                if converted is None and not self._is_plain(path, entry.path):
                    entry.job = self._conversions.start(
                        lambda progress: self._convert(path, entry, progress), what="converting"
                    )
                    return
                shown = converted or entry.path
                entry.video = self._described(path, f"posters/{entry.key}.jpg", shown)
                entry.shown = shown
            except Busy:  # the next call tries again
                return
            except (ServerError, OSError) as error:
                self._leave_out(path, entry, error)

    def _take_converted(self, path: str, entry: _Entry) -> None:
        """Offer the file that the job of an entry, which has ended, has made."""
        assert entry.job is not None
        try:
            shown = entry.job.result()
            entry.video = self._described(path, f"posters/{entry.key}.jpg", shown)
            entry.shown = shown
        except Exception as error:
            self._leave_out(path, entry, error)

    def _leave_out(self, path: str, entry: _Entry, error: BaseException) -> None:
        if not entry.failed:
            entry.failed = True
            _log.warning("%s is left out of the gallery: %s", path, error)

    def _is_plain(self, path: str, file: Path) -> bool:
        if _is_picture(path):
            return pictures.look(file).is_plain
        return clips.look(file).is_plain

    def _convert(self, path: str, entry: _Entry, progress: Progress) -> Path:
        from omniops.server.transcode import Encoding, transcode

        self._converted.mkdir(parents=True, exist_ok=True)
        if _is_picture(path):
            return pictures.write(entry.path, self._converted, entry.key)
        out = self._converted / f"{entry.key}.mp4"
        unfinished = self._converted / f".{entry.key}.mp4"
        try:
            transcode(entry.path, unfinished, Encoding.of(self.settings, own_times=True), progress=progress)
            os.replace(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)
        return out

    def _described(self, path: str, poster: str | None, file: Path) -> Video:
        if file.suffix != ".mp4":
            picture = pictures.look(file)
            return Video(path, poster, picture.width, picture.height, 1, None, True)
        clip = clips.look(file)
        return Video(path, poster, clip.width, clip.height, clip.frames, clip.fps, False)

    def _write_poster(self, source: Path, poster: Path) -> None:
        poster.parent.mkdir(parents=True, exist_ok=True)
        unfinished = poster.with_name(f".{poster.name}")
        picture = pictures.read(source) if source.suffix != ".mp4" else clips.first_picture(source)
        picture.thumbnail((_POSTER_SIDE, _POSTER_SIDE))
        picture.save(unfinished, format="JPEG", quality=85)
        os.replace(unfinished, poster)

    def _upload(self, path: str) -> Path:
        file = self.settings.uploads / path.removeprefix("uploads/")
        try:
            found = file.lstat()
            if not stat.S_ISREG(found.st_mode):
                raise NotFound(_OTHER)
            # Uploads are removed by when they were last used; their date stays, for browsers know them by it.
            os.utime(file, ns=(time.time_ns(), found.st_mtime_ns))
        except OSError:
            raise NotFound(_OTHER) from None
        return file


def _is_picture(path: str) -> bool:
    return not path.endswith(".mp4")


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, leads to a plain file in the folder."""
    try:
        real = path.resolve(strict=True)
        return real.is_relative_to(folder.resolve(strict=True)) and stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError):
        return False


def _files(gallery: Path) -> list[tuple[str, Path, tuple[int, ...]]]:
    """The API's path, the path on the disk and the state of each file that may be offered, in natural order."""
    found = []
    for file in _walk(gallery, gallery, set()):
        name = file.relative_to(gallery).as_posix()
        if file.suffix != ".mp4" and file.suffix.lower() not in KINDS:
            continue
        state = _state(file)
        if state is None or not _inside(file, gallery):
            continue
        try:
            name.encode()
        except UnicodeEncodeError:  # JSON has no such names
            continue
        found.append((f"gallery/{name}", file, state))
    return sorted(found, key=lambda item: _natural(item[0]))


def _walk(folder: Path, gallery: Path, visited: set[Path]) -> Iterator[Path]:
    """The files of a folder and those in it, each folder once; links that lead out of the gallery are not followed."""
    try:
        real = folder.resolve(strict=True)
        if real in visited or not real.is_relative_to(gallery.resolve(strict=True)):
            return
        visited.add(real)
        paths = sorted(folder.iterdir())
    except (OSError, RuntimeError):
        return
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, gallery, visited)
        else:
            yield path


def _natural(path: str) -> tuple[list[list[tuple[bool, int, str]]], str]:
    """Numbers in names by their value: 2 before 10."""
    names = [re.findall(r"\d+|\D+", name.casefold()) for name in path.split("/")]
    return [[(not run.isdecimal(), int(run) if run.isdecimal() else 0, run) for run in name] for name in names], path
