"""What the readers of frames have in common: of a video file, of a folder of pictures, and of an animation."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_DECODED_BYTES = 256 * 2**20
"""Of the decoded frames that a reader keeps."""


class FrameError(ValueError):
    """A frame that cannot be decoded, of a video or a folder that could be opened."""


class IncompleteVideoWarning(UserWarning):
    """Of a video that breaks off, or that has frames which cannot be decoded."""


class Colour(NamedTuple):
    """How YUV stands for colours, by the numbers of ITU-T H.273; 2 where a video does not say."""

    primaries: int
    transfer: int
    matrix: int
    full_range: bool


class FrameReader(Protocol):
    """A reader of frames. ``Frames`` says what the attributes mean."""

    width: int
    height: int

    @property
    def fps(self) -> float | None:
        """Frames a second."""

    @property
    def times(self) -> Sequence[float] | None:
        """Seconds after the first frame."""

    @property
    def time_base(self) -> Fraction | None:
        """Seconds of which the times are multiples."""

    @property
    def start_time(self) -> float | None:
        """When the first frame is shown, in seconds of the file's own clock."""

    @property
    def sample_aspect_ratio(self) -> Fraction:
        """Width of a pixel divided by its height."""

    @property
    def colour(self) -> Colour | None:
        """How YUV stands for colours."""

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory."""

    def __len__(self) -> int: ...

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""

    def resized(self, index: int, image_size: int) -> NDArray[np.uint8]:
        """(S, S, 3), RGB, for the network."""
