"""The frames of a video file, of a folder of pictures or of an animation, decoded when they are asked for.

They are resized for the network as in the official package: pictures by PIL's default filter, a video's frames by
swscale's bicubic filter during their conversion to RGB. The official package reads videos with decord, which has that
filter too, but another FFmpeg: pixels may differ by a few steps of 255.

What differs: the video may be any that FFmpeg reads, and pictures any that PIL reads, rotated as their EXIF data say;
file names need not be numbers, and are sorted with numbers by their value; and at most 256 MiB of decoded frames are in
memory.
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
from omniops.sam2.animation import Animation
from omniops.sam2.frame_reader import Colour, FrameError, FrameReader, IncompleteVideoWarning
from omniops.sam2.picture_folder import PictureFolder
from omniops.sam2.video_file import VideoFile

__all__ = ["Colour", "FrameError", "Frames", "IncompleteVideoWarning"]


class Frames:
    """The frames of a video.

    ``len(frames)``, iteration, and ``frames[i]``, from 0 or backwards from -1: RGB, uint8, (H, W, 3), rotated as the
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
    """Seconds of which the file's own times are multiples; None as ``times``."""
    start_time: float | None
    """When the first frame is shown, in seconds of the file's own clock, that of its sound; None as ``times``, and
    where the file does not say."""
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
        self._reader = _open_reader(self.path)
        self.height, self.width = self._reader.height, self._reader.width
        self.fps, self.times, self.time_base = self._reader.fps, self._reader.times, self._reader.time_base
        self.start_time = self._reader.start_time
        self.sample_aspect_ratio, self.colour = self._reader.sample_aspect_ratio, self._reader.colour

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self._reader.frame(self._index(index))

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[i] for i in range(len(self)))

    def resized(self, index: int, image_size: int) -> NDArray[np.uint8]:
        """A frame for the network: (S, S, 3), as the official package resizes it."""
        return self._reader.resized(self._index(index), image_size)

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames that are in memory now."""
        return self._reader.nbytes

    def _index(self, index: int) -> int:
        count = len(self)
        index = operator.index(index)
        if not -count <= index < count:
            raise IndexError(f"frame {index} of {self.path}, which has {count}")
        return index % count


def _open_reader(path: Path) -> FrameReader:
    if path.is_dir():
        return PictureFolder(path)
    try:
        is_picture = picture_files.has_picture_signature(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return Animation(path) if is_picture else VideoFile(path)
