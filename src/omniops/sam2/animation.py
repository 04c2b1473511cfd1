"""The frames of an animation: of a GIF, PNG, WebP or AVIF, or the pages of a TIFF."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from omniops.sam2 import picture_files
from omniops.sam2.frame_reader import MAX_DECODED_BYTES, FrameError, IncompleteVideoWarning
from omniops.sam2.picture_files import require_same_size

if TYPE_CHECKING:
    from PIL.Image import Image

_DEFAULT_DURATION = 100
"""Milliseconds for which browsers show a frame that does not say."""


class Animation:
    """A ``FrameReader`` of the pictures of a GIF, PNG, WebP, AVIF or TIFF; a file of another kind has one.

    Raises:
        ValueError: for a file that cannot be read, without frames, or with pages of several sizes.

    Warns:
        IncompleteVideoWarning: where not all frames can be decoded.
    """

    colour = None
    start_time = None
    sample_aspect_ratio = Fraction(1)

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._decoded_frames: OrderedDict[int, Image] = OrderedDict()
        try:
            self._picture = picture_files.open_picture(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        self._orientation = picture_files.exif_orientation(self._picture)
        self.width, self.height = picture_files.upright_size(self._picture)
        count = int(getattr(self._picture, "n_frames", 1)) if picture_files.is_animated(self._picture) else 1
        # The first picture of an animated PNG may be for programs that do not know animations, and no frame.
        self._num_skipped = int(count > 1 and bool(getattr(self._picture, "default_image", False)))
        durations = self._read_durations(count - self._num_skipped)
        self._count = len(durations)
        has_times = self._count > 1 and self._picture.format != "TIFF"
        self.times = [sum(durations[:i]) / 1000 for i in range(self._count)] if has_times else None
        self.time_base = Fraction(1, 1000) if has_times else None
        self.fps = 1000 * self._count / sum(durations) if has_times else None

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory."""
        return len(self._decoded_frames) * self._frame_bytes

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""
        return np.array(self._decode(index))

    def resized(self, index: int, image_size: int) -> NDArray[np.uint8]:
        """(S, S, 3), RGB, for the network."""
        return np.array(self._decode(index).resize((image_size, image_size)))

    @property
    def _frame_bytes(self) -> int:
        return 4 * self.width * self.height  # Pillow pads RGB to 4 bytes

    def _read_durations(self, count: int) -> list[float]:
        """Milliseconds of each frame that can be decoded."""
        durations: list[float] = []
        first: tuple[int, int] | None = None
        try:
            for i in range(count):
                self._picture.seek(i + self._num_skipped)
                self._picture.load()
                first = first or self._picture.size
                require_same_size(self._picture.size, f"page {i}", first, f"page 0 of {self._path}")
                durations.append(self._picture.info.get("duration") or _DEFAULT_DURATION)
        except Exception as error:  # Pillow's decoders raise what they like on damaged files
            if isinstance(error, picture_files.SizeError):
                raise
            if not durations:
                raise ValueError(f"{self._path} has no frame that can be decoded: {error}") from None
            warnings.warn(
                f"{self._path} breaks off after {len(durations)} of {count} frames", IncompleteVideoWarning, 5
            )
        return durations

    def _decode(self, index: int) -> Image:
        with self._lock:  # threads share the position in the file
            if index not in self._decoded_frames:
                try:
                    self._picture.seek(index + self._num_skipped)
                    picture = picture_files.upright(picture_files.to_rgb8(self._picture.copy()), self._orientation)
                except Exception as error:  # as in _read_durations
                    raise FrameError(f"frame {index} of {self._path} cannot be decoded: {error}") from None
                self._decoded_frames[index] = picture
                while len(self._decoded_frames) > max(1, MAX_DECODED_BYTES // self._frame_bytes):
                    self._decoded_frames.popitem(last=False)
            self._decoded_frames.move_to_end(index)
            return self._decoded_frames[index]
