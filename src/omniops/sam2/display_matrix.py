"""How the frames of a video are rotated and flipped to be shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import VideoFrame


class Orientation(NamedTuple):
    """One of the eight orientations of a square."""

    is_transposed: bool
    """Whether rows become columns, before the flips."""
    flips: tuple[slice, slice]
    """The steps along the two axes of the result, -1 where it is flipped."""

    def apply(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A view of (H, W, 3) as it is to be shown."""
        return (rgb.swapaxes(0, 1) if self.is_transposed else rgb)[self.flips]


def display_orientation(frame: VideoFrame) -> Orientation:
    """How a frame is to be shown, by its display matrix.

    The matrix takes the pixel (x, y) to (a x + c y, b x + d y). FFmpeg stores a, b, 0, c, d, 0 and three more numbers.
    A rotation by another angle counts as the nearest orientation. A matrix that makes every picture a line or a point,
    as zeros do, is ignored.
    """
    a, b, c, d = _display_matrix(frame)
    is_transposed = abs(b) > abs(a)
    x, y = (c, b) if is_transposed else (a, d)
    return Orientation(
        is_transposed, (slice(None, None, -1 if y < 0 else None), slice(None, None, -1 if x < 0 else None))
    )


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV fails on side data without a name, as EXIF's. Its rotation does not know flips.
        cosine, sine = math.cos(math.radians(frame.rotation)), math.sin(math.radians(frame.rotation))
        return round(2**16 * cosine), round(-(2**16) * sine), round(2**16 * sine), round(2**16 * cosine)
    if side_data is not None:
        a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
        if a * d != b * c:
            return a, b, c, d
    return 1, 0, 0, 1
