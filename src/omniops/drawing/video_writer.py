"""Videos, written frame by frame."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from omniops.sam2.frames import Frames

_FOLDERS_RATE = Fraction(24)


class VideoWriter:
    """Frames of one size as a video: H.264, or MPEG-4 where FFmpeg came without x264.

    The file is there once the first frame has come. Sides become even, as these codecs want them: the last row or
    column is repeated.

    Args:
        path: the file to write.
        like: the video that the frames come from, whose rate it gets.
        fps: frames a second, instead of those of ``like``; 24 where neither says.

    Raises:
        OSError: by any method, with the path in its text, where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], like: Frames | None = None, fps: float | None = None) -> None:
        self._path = Path(path)
        fps = fps or (like.fps if like is not None else None)
        self._rate = _FOLDERS_RATE if fps is None else Fraction(fps).limit_denominator(1001)
        self._container: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frame: NDArray[np.uint8], time: float | None = None) -> None:
        """Append (H, W, 3), RGB; ``time`` in seconds is when it is shown, which None leaves to the rate."""
        import av

        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        try:
            if self._container is None:
                self._open(*even.shape[:2])
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        except av.FFmpegError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Write what the encoder still holds, and the end."""
        import av

        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            container.mux(self._stream.encode(None))
            container.close()
        except av.FFmpegError as error:
            raise self._failed(error) from None

    def _failed(self, error: Any) -> OSError:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error.strerror
        return OSError(f"cannot write {self._path}: {why}")

    def _open(self, height: int, width: int) -> None:
        import av

        self._container = av.open(f"file:{self._path}", "w")
        has_x264 = "libx264" in av.codecs_available
        self._stream = self._container.add_stream("libx264" if has_x264 else "mpeg4", rate=self._rate)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        if has_x264:
            self._stream.options = {"preset": "veryfast"}
        else:  # whose default is far too little
            self._stream.bit_rate = int(height * width * self._rate / 4)
