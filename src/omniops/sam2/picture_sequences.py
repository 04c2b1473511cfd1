"""Frames that are pictures: those of a folder, and those of an animation."""

from __future__ import annotations

import re
import threading
import warnings
from collections import Counter, OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from omniops.sam2 import picture_files
from omniops.sam2.pictures import as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY = 256 * 2**20
"""Bytes of decoded frames that are kept of a video or an animation."""
_USUAL_DURATION = 100
"""Milliseconds for which browsers show a frame that does not say."""


class FrameError(ValueError):
    """A frame that cannot be decoded, of a video or a folder that could be opened."""


class IncompleteVideoWarning(UserWarning):
    """Of a video that breaks off, or that has frames which cannot be decoded."""


class Folder:
    """The pictures of a folder, as ``Frames`` gives them on."""

    fps = None
    times = None
    time_base = None
    colour = None
    sample_aspect_ratio = Fraction(1)

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(_of_one_kind(folder), key=_natural)
        sizes = []
        for path in self._paths:
            try:
                with picture_files.opened(path) as picture:
                    several = picture_files.animated(picture)
                    sizes.append(picture_files.size_of(picture))
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
            if several:
                raise ValueError(f"{path} is an animation or has several pages, not one frame: give it by itself")
            _require_size(sizes[-1], path, sizes[0], self._paths[0])
        self.width, self.height = sizes[0]

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory: none is kept."""
        return 0

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""
        return np.array(self._picture(index))

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        """(side, side, 3), for the network."""
        return np.array(self._picture(index).resize((side, side)))

    def _picture(self, index: int) -> Image:
        path = self._paths[index]
        try:
            with picture_files.opened(path) as picture:
                turn = picture_files.orientation(picture)
                return picture_files.upright(as_8_bits(picture), turn)
        except Exception as error:  # Pillow's decoders raise what they like on damaged files
            raise FrameError(f"{path} cannot be read: {error}") from None


class Animation:
    """The pictures of a GIF, PNG, WebP, AVIF or TIFF, as ``Frames`` gives them on; HEIF has one."""

    colour = None
    sample_aspect_ratio = Fraction(1)

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Image] = OrderedDict()
        try:
            self._picture = picture_files.opened(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        self._turn = picture_files.orientation(self._picture)
        self.width, self.height = picture_files.size_of(self._picture)
        count = int(getattr(self._picture, "n_frames", 1)) if picture_files.animated(self._picture) else 1
        # What an animated PNG shows where animations are not known may be no part of it.
        self._skipped = int(count > 1 and bool(getattr(self._picture, "default_image", False)))
        durations = self._durations(count - self._skipped)
        self._count = len(durations)
        timed = self._count > 1 and self._picture.format != "TIFF"
        self.times = [sum(durations[:i]) / 1000 for i in range(self._count)] if timed else None
        self.time_base = Fraction(1, 1000) if timed else None
        self.fps = 1000 * self._count / sum(durations) if timed else None

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory, which Pillow pads to 4 bytes a pixel."""
        return len(self._kept) * 4 * self.width * self.height

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""
        return np.array(self._decoded(index))

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        """(side, side, 3), for the network."""
        return np.array(self._decoded(index).resize((side, side)))

    def _durations(self, count: int) -> list[float]:
        """Milliseconds of each frame that can be decoded."""
        durations: list[float] = []
        first: tuple[int, int] | None = None
        try:
            for i in range(count):
                self._picture.seek(i + self._skipped)
                self._picture.load()
                first = first or self._picture.size
                _require_size(self._picture.size, f"page {i}", first, f"page 0 of {self._path}")
                durations.append(self._picture.info.get("duration") or _USUAL_DURATION)
        except Exception as error:  # Pillow's decoders raise what they like on damaged files
            if isinstance(error, _SizeError):
                raise
            if not durations:
                raise ValueError(f"{self._path} has no frame that can be decoded: {error}") from None
            warnings.warn(
                f"{self._path} breaks off after {len(durations)} of {count} frames", IncompleteVideoWarning, 5
            )
        return durations

    def _decoded(self, index: int) -> Image:
        with self._lock:  # a file has one place where it is read
            if index not in self._kept:
                try:
                    self._picture.seek(index + self._skipped)
                    picture = picture_files.upright(as_8_bits(self._picture.copy()), self._turn)
                except Exception as error:  # as above
                    raise FrameError(f"frame {index} of {self._path} cannot be decoded: {error}") from None
                self._kept[index] = picture
                while len(self._kept) > max(1, MEMORY // (4 * self.width * self.height)):  # Pillow pads RGB to 4 bytes
                    self._kept.popitem(last=False)
            self._kept.move_to_end(index)
            return self._kept[index]


class _SizeError(ValueError):
    pass


def _of_one_kind(folder: Path) -> list[Path]:
    """The pictures of a folder that are its frames."""
    kinds: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        ending = path.suffix.lower()
        kind = ending if ending in picture_files.UNREADABLE else picture_files.KINDS.get(ending)
        is_lost = path.is_symlink() and not path.exists()  # which says so when it is read
        if kind and not path.name.startswith(".") and (path.is_file() or is_lost):
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise ValueError(f"{folder} has no pictures: no file ends with {picture_files.endings()}")
    frames = kinds.get("JPEG")
    if frames:
        names = {path.stem for path in frames}
        others = [path for kind in kinds if kind != "JPEG" for path in kinds[kind] if path.stem not in names]
    else:
        frames, *rest = kinds.values()
        others = [path for paths in rest for path in paths]
    if others:
        found = Counter(path.suffix.lower() for path in frames + others)
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(found.items()))
        raise ValueError(
            f"{folder} has pictures of several kinds, {listed} ({min(others).name} and {min(frames).name} are two): "
            "give the frames, of one kind, a folder of their own"
        )
    if frames[0].suffix.lower() in picture_files.UNREADABLE:
        raise ValueError(f"{min(frames)} is a picture of a kind that is not read: only {picture_files.endings()} are")
    return frames


def _require_size(size: tuple[int, int], path: Path | str, expected: tuple[int, int], first: Path | str) -> None:
    if size != expected:
        raise _SizeError(
            f"the pictures of a video must be of one size, got {'x'.join(map(str, size))} in {path} "
            f"and {'x'.join(map(str, expected))} in {first}"
        )


def as_8_bits(picture: Image) -> Image:
    """An opened picture in RGB, 8 bits a channel, its pixels read."""
    from PIL import Image

    if picture.mode == "RGB":
        picture.load()
        return picture  # not a copy: that would hold up the other threads
    rgb = as_rgb(picture)
    if rgb.dtype != np.uint8:
        white = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
        rgb = np.rint(rgb * (255 / white)).astype(np.uint8)
    return Image.fromarray(rgb)


def _natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Numbers in names by their value, 2 before 10, and before letters."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts], path.name
