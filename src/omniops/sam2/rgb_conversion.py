"""Decoded frames of videos as RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import VideoFrame

_MAX_SCALERS = 4
_BT601, _BT709 = 5, 1
RGB_RANGE = 2
"""FFmpeg's number for all values from 0 to 255."""


class RGBConverter:
    """Converts and resizes by swscale's bicubic filter; for one thread at a time."""

    def __init__(self) -> None:
        self._scalers: dict[tuple[int, int], Any] = {}

    def convert(self, frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
        """(height, width, 3), as the frame is stored, which may be turned."""
        from av.video.reformatter import VideoReformatter

        # One scaler a size: without, each frame would keep one of its own, bigger than a small frame.
        if (width, height) not in self._scalers and len(self._scalers) == _MAX_SCALERS:
            self._scalers.clear()
        scaler = self._scalers.setdefault((width, height), VideoReformatter())
        # PyAV before 17 applies the source matrix only where the destination has another, which RGB ignores.
        rgb: NDArray[np.uint8] = scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=int(frame.colorspace),
            dst_colorspace=_BT601 if frame.colorspace == _BT709 else _BT709,
            interpolation="BICUBIC",
            src_color_range=int(frame.color_range),
            dst_color_range=RGB_RANGE,
        ).to_ndarray()
        return rgb
