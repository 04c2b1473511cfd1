"""The frames of a video file, of a folder of pictures or of an animation, decoded when they are asked for.

As the official package reads them for the network: pictures resized by PIL's default filter, a video's frames resized
by swscale's bicubic filter on their way to RGB. decord, which the official package reads videos with, resizes by that
filter too, but brings an FFmpeg of its own: single pixels may differ by a few steps of 255.

What differs: any video that FFmpeg reads; any pictures that PIL reads, turned as their EXIF data say; names sorted as
people count, numbers or not; and never more than 256 MiB of decoded frames in memory.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omniops.sam2 import picture_files
from omniops.sam2.picture_sequences import Animation, Folder, FrameError, IncompleteVideoWarning
from omniops.sam2.video_file import Colour, VideoFile

__all__ = ["Colour", "FrameError", "Frames", "IncompleteVideoWarning"]


class Frames:
    """The frames of a video.

    ``len(frames)``, iteration, and ``frames[i]``, from 0 or backwards from -1: RGB, uint8, (H, W, 3), turned as the
    video's metadata say. Several threads may use it.

    Args:
        path: a video file, a GIF, PNG, WebP, AVIF or TIFF with all its pictures, a JPEG, or a folder of pictures of
            one size and kind, in natural order of their names: 2.jpg before 10.jpg. Beside JPEGs pictures of other
            kinds may lie that have the JPEGs' names, as masks do: they are not read.

    Raises:
        FileNotFoundError: where nothing is there.
        ImportError: for a video file without PyAV.
        TypeError: where ``path`` is no path.
        ValueError: for a file that is no video, a folder without pictures, a video without frames, or pictures that
            cannot be read or differ in size or kind.

    Warns:
        IncompleteVideoWarning: where a video breaks off or does not have all that it says it has, and where frames are
            damaged; those that can be decoded count.
    """

    fps: float | None
    """Frames a second, on average; None of a folder and of one picture."""
    times: Sequence[float] | None
    """When each frame is shown, in seconds after the first; None of a folder, of pages and of one picture."""
    time_base: Fraction | None
    """The seconds of which the times are multiples, before some were counted from the first; None as ``times``."""
    sample_aspect_ratio: Fraction
    """Width of a pixel as it is shown, divided by its height."""
    colour: Colour | None
    """How the file stands for colours; None where it has RGB, and of pictures."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(os.fsdecode(path))
        except TypeError:
            raise TypeError(f"path must be the path of a video or a folder, got {type(path).__name__}") from None
        if not self.path.exists():
            raise FileNotFoundError(f"there is no video at {self.path}")
        self._source = _opened(self.path)
        self.height, self.width = self._source.height, self._source.width
        self.fps, self.times, self.time_base = self._source.fps, self._source.times, self._source.time_base
        self.sample_aspect_ratio, self.colour = self._source.sample_aspect_ratio, self._source.colour

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self._source.frame(self._index(index))

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[i] for i in range(len(self)))

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        """A frame for the network: (side, side, 3), as the official package resizes it."""
        return self._source.resized(self._index(index), side)

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames that are in memory now."""
        return self._source.nbytes

    def _index(self, index: int) -> int:
        count = len(self)
        at = operator.index(index)
        if not -count <= at < count:
            raise IndexError(f"frame {at} of {self.path}, which has {count}")
        return at % count


def _opened(path: Path) -> Folder | Animation | VideoFile:
    if path.is_dir():
        return Folder(path)
    try:
        is_picture = picture_files.has_pictures_signature(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return Animation(path) if is_picture else VideoFile(path)
