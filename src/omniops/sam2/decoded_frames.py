"""The decoded frames of a video that are kept, within a limit of memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from omniops.sam2.frame_reader import MAX_DECODED_BYTES

if TYPE_CHECKING:
    from av import VideoFrame

FRAME_OVERHEAD = 16 * 2**10
"""Bytes that a frame takes beside its pixels, at most: FFmpeg's and PyAV's records of it, and padding of its rows."""


class DecodedFrames:
    """Frames by their index; the one that was added first is the first to be released.

    FFmpeg frees the memory of a closed decoder's frames together, when none of them is referred to any more. So frames
    of closed decoders are released together.
    """

    def __init__(self) -> None:
        self._frames: OrderedDict[int, VideoFrame] = OrderedDict()
        self._bytes_of_open = 0
        self._of_closed: set[int] = set()
        self._bytes_of_closed = 0

    def __contains__(self, index: object) -> bool:
        return index in self._frames

    def __getitem__(self, index: int) -> VideoFrame:
        return self._frames[index]

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._bytes_of_open + self._bytes_of_closed

    def get(self, index: int) -> VideoFrame | None:
        """The frame, or None where it is not kept."""
        return self._frames.get(index)

    def add(self, index: int, frame: VideoFrame) -> None:
        """Keep a frame of the open decoder, and release others where they are too many."""
        if index in self._frames and index not in self._of_closed:
            self._bytes_of_open -= _nbytes(self._frames[index])
        self._of_closed.discard(index)
        self._frames[index] = frame
        self._frames.move_to_end(index)
        self._bytes_of_open += _nbytes(frame)
        if self.nbytes > MAX_DECODED_BYTES:
            for old in self._of_closed:
                del self._frames[old]
            self._of_closed.clear()
        if not self._of_closed:
            self._bytes_of_closed = 0
        while self._bytes_of_open > MAX_DECODED_BYTES and len(self._frames) > 2:
            self._bytes_of_open -= _nbytes(self._frames.popitem(last=False)[1])

    def mark_decoder_closed(self) -> None:
        """Frames that are added from now on are of another decoder."""
        self._of_closed.update(self._frames)
        self._bytes_of_closed += self._bytes_of_open
        self._bytes_of_open = 0

    def clear(self) -> None:
        """Release the frames of the open decoder, where no other had any."""
        self._frames.clear()
        self._bytes_of_open = 0


def _nbytes(frame: VideoFrame) -> int:
    return FRAME_OVERHEAD + sum(int(plane.buffer_size) for plane in frame.planes)
