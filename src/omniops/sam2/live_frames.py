"""The frames of a live video, numbered as they come: of a camera, a network stream, a pipe or an iterator.

Frames are resized for the network as the pictures of a folder are, by PIL's default filter.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from os import PathLike
from time import perf_counter
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from omniops.sam2.arguments import check_int
from omniops.sam2.frames import Frames
from omniops.sam2.live_sources import is_stream, open_stream
from omniops.sam2.transforms import to_rgb

NUM_KEPT_FRAMES = 16
"""Of how many frames, the last that were taken, the pixels are kept."""
WAIT, DROP_OLDEST, DROP_NEWEST = POLICIES = ("wait", "drop_oldest", "drop_newest")


class _Arrival(NamedTuple):
    pixels: NDArray[np.uint8]
    time: float
    """By ``perf_counter``."""


class LiveFrames:
    """The frames of a live video, which is read as it is taken, or by a thread that drops what comes too fast.

    ``len(frames)`` is how many have been taken so far, and ``frames[i]`` one of the last 16: RGB, uint8, (H, W, 3).
    Frames that were dropped have no number. To be closed, or used as a context manager.

    Args:
        source: an iterable of frames of one size, each as ``SAM2ImagePredictor.set_image`` takes a picture or a tensor
            (3, H, W), uint8 or floating from 0 to 1; the number of a camera; a URL of a stream (rtsp, rtmp, http,
            https, udp, rtp, srt); ``FORMAT:DEVICE`` of a device that FFmpeg knows, as ``v4l2:/dev/video0``,
            ``avfoundation:0`` or ``lavfi:testsrc``; or an open binary file, as a pipe is, with a video that can be
            read from its beginning on.
        when_full: what becomes of frames that come faster than they are taken. ``wait``: the source waits, and every
            frame is taken; so it is with iterables and pipes by default. ``drop_oldest``: a thread reads, and a new
            frame takes the place of the one that has waited longest; so it is with cameras, streams and devices.
            ``drop_newest``: a new frame is dropped.
        buffer_size: how many frames may wait where frames are dropped.

    Raises:
        ImportError: for a camera, a stream or a pipe without PyAV.
        TypeError: where an argument is something else, or the first frame is.
        ValueError: where there is no frame, the source cannot be opened, or there is no such policy.

    Example:
        >>> frames = LiveFrames(np.zeros((48, 64, 3), np.uint8) for _ in range(3))
        >>> frames.width, frames.height, len(frames)
        (64, 48, 1)
        >>> frames.take()
        1
    """

    fps = None
    times = None
    time_base = None
    colour = None
    sample_aspect_ratio = Fraction(1)

    def __init__(
        self,
        source: Iterable[Any] | int | str | BinaryIO,
        *,
        when_full: str | None = None,
        buffer_size: int = 1,
    ) -> None:
        if when_full not in (None, *POLICIES):
            raise ValueError(f"when_full must be one of {', '.join(POLICIES)}, got {when_full!r}")
        if check_int("buffer_size", buffer_size) < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
        is_camera_or_url = isinstance(source, (int, str))
        is_read_by_pyav = is_camera_or_url or hasattr(source, "read")
        opened = open_stream(source) if is_read_by_pyav else _iterate(source)  # type: ignore[arg-type]
        self._kept: OrderedDict[int, _Arrival] = OrderedDict()
        self._num_taken = 0
        self._first: _Arrival | None = None
        self._size: tuple[int, int] | None = None
        if (when_full or (DROP_OLDEST if is_camera_or_url else WAIT)) == WAIT:
            self._queue: _WaitingSource | _Queue = _WaitingSource(opened)
        else:
            self._queue = _Queue(buffer_size, drop_oldest=when_full != DROP_NEWEST)
            threading.Thread(target=_read, args=(opened, self._queue), name="live frames", daemon=True).start()
        if self.take() is None:
            raise ValueError("the live video ended before its first frame")

    @property
    def width(self) -> int:
        """Of frames, in pixels."""
        assert self._size is not None
        return self._size[1]

    @property
    def height(self) -> int:
        """Of frames, in pixels."""
        assert self._size is not None
        return self._size[0]

    @property
    def num_dropped(self) -> int:
        """How many frames were dropped so far."""
        return self._queue.num_dropped

    @property
    def latency(self) -> float:
        """Seconds since the frame that was taken last had come."""
        return perf_counter() - next(reversed(self._kept.values())).time

    @property
    def nbytes(self) -> int:
        """Bytes of the frames that are kept."""
        return sum(arrival.pixels.nbytes for arrival in self._kept.values())

    @property
    def kept(self) -> range:
        """The numbers of the frames whose pixels are kept."""
        return range(next(iter(self._kept)), self._num_taken)

    def take(self) -> int | None:
        """Wait for the next frame. Returns its number; None at the end of the video.

        Raises:
            FrameError: where a stream breaks off.
            TypeError, ValueError: for a frame of another type or size.
            Exception: what an iterable raises.
        """
        arrival, self._first = self._first or self._queue.get(), None
        if arrival is None:
            return None
        size = arrival.pixels.shape[:2]
        if self._size is None:
            self._size = (size[0], size[1])
        elif size != self._size:
            raise ValueError(
                f"the frames of a live video must be of one size: frame {self._num_taken} is of {size[1]} x {size[0]} "
                f"pixels, the first of {self.width} x {self.height}"
            )
        self._kept[self._num_taken] = arrival
        self._num_taken += 1
        if len(self._kept) > NUM_KEPT_FRAMES:
            self._kept.popitem(last=False)
        return self._num_taken - 1

    def go_on_from(self, num_taken: int, last: Sequence[NDArray[np.uint8]]) -> None:
        """Number the frames after those of an earlier video, of which the last ones count as taken just now.

        Args:
            num_taken: of how many frames the earlier one was, 1 or more.
            last: the pixels of its last, (H, W, 3), at most 16.

        Raises:
            ValueError: where the earlier one's frames are of another size, or more than the first frame has been taken.
        """
        height, width = last[0].shape[:2]
        if (height, width) != self._size:
            raise ValueError(
                f"a live video of {width} x {height} pixels cannot go on with one of {self.width} x {self.height}"
            )
        if self._num_taken != 1:
            raise ValueError(
                f"what a live video goes on with must be new, but {self._num_taken} of its frames are taken"
            )
        self._first = self._kept.pop(0)
        now = perf_counter()
        for i, pixels in enumerate(last, start=num_taken - len(last)):
            self._kept[i] = _Arrival(pixels, now)
        self._num_taken = num_taken

    def time(self, index: int) -> float:
        """When a frame that is kept had come, in seconds by ``time.perf_counter``."""
        return self._arrival(index).time

    def close(self) -> None:
        """Take no more frames, and let go of the source."""
        self._first = None
        self._queue.close()

    def resized(self, index: int, image_size: int) -> NDArray[np.uint8]:
        """A frame for the network: (S, S, 3)."""
        from PIL import Image

        return np.array(Image.fromarray(self[index]).resize((image_size, image_size)))

    def __len__(self) -> int:
        return self._num_taken

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self._arrival(index).pixels

    def __enter__(self) -> LiveFrames:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_queue"):
            self.close()

    def _arrival(self, index: int) -> _Arrival:
        index = operator.index(index)
        index += self._num_taken if index < 0 else 0
        if index not in self._kept:
            kept = self.kept
            raise IndexError(f"frame {index} of a live video, of which frames {kept[0]} to {kept[-1]} are kept")
        return self._kept[index]


class _WaitingSource:
    """Frames that are read when they are taken."""

    num_dropped = 0

    def __init__(self, source: Iterator[NDArray[np.uint8]]) -> None:
        self._source: Iterator[NDArray[np.uint8]] | None = source

    def get(self) -> _Arrival | None:
        """The next frame; None at the end."""
        pixels = None if self._source is None else next(self._source, None)
        return None if pixels is None else _Arrival(pixels, perf_counter())

    def close(self) -> None:
        """Let go of the source."""
        source, self._source = self._source, None
        if source is not None:
            _close(source)


class _Queue:
    """Frames between the thread that reads them and the one that takes them."""

    def __init__(self, buffer_size: int, *, drop_oldest: bool) -> None:
        self.num_dropped = 0
        self._buffer_size, self._drop_oldest = buffer_size, drop_oldest
        self._frames: deque[_Arrival] = deque()
        self._changed = threading.Condition()
        self._has_ended = False
        self._error: BaseException | None = None

    def put(self, pixels: NDArray[np.uint8]) -> bool:
        """Add a frame, or drop one; False where no more are wanted."""
        with self._changed:
            if self._has_ended:
                return False
            is_full = len(self._frames) == self._buffer_size
            if is_full:
                self.num_dropped += 1
            if is_full and self._drop_oldest:
                self._frames.popleft()
            if not is_full or self._drop_oldest:
                self._frames.append(_Arrival(pixels, perf_counter()))
                self._changed.notify()
            return True

    def end(self, error: BaseException | None = None) -> None:
        """No more frames come, for that reason."""
        with self._changed:
            self._has_ended, self._error = True, error
            self._changed.notify_all()

    def get(self) -> _Arrival | None:
        """The next frame; None at the end. Raises what the source has raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._has_ended)
            if self._frames:
                return self._frames.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def close(self) -> None:
        """Forget the frames, and have the thread end with the next one."""
        with self._changed:
            self._frames.clear()
        self.end()


def _read(source: Iterator[NDArray[np.uint8]], queue: _Queue) -> None:
    error: BaseException | None = None
    try:
        for pixels in source:
            if not queue.put(pixels):
                break
    except BaseException as raised:  # for the thread that takes the frames
        error = raised
    finally:
        _close(source)
    queue.end(error)


def _close(source: Any) -> None:
    if hasattr(source, "close"):
        source.close()


VideoSource = str | PathLike[str] | Frames | LiveFrames | Iterable[Any] | int | BinaryIO
"""What ``SAM2VideoPredictor.init_state`` takes as a video."""


def open_video(source: VideoSource) -> Frames | LiveFrames:
    """The frames of a video."""
    if isinstance(source, (Frames, LiveFrames)):
        return source
    return LiveFrames(source) if is_live(source) else Frames(source)  # type: ignore[arg-type]


def is_live(source: object) -> bool:
    """Whether a source of ``init_state`` is a live video's, and no path."""
    if isinstance(source, str):
        return is_stream(source)
    return (isinstance(source, int) and not isinstance(source, bool)) or hasattr(source, "read") or _is_iterable(source)


def _is_iterable(source: object) -> bool:
    return hasattr(source, "__iter__") and not isinstance(source, (bytes, dict, set, frozenset))


def _iterate(source: Any) -> Iterator[NDArray[np.uint8]]:
    if not _is_iterable(source) or getattr(source, "ndim", 4) < 4:  # one picture is no list of them
        raise TypeError(
            "source must be an iterable of frames, the number of a camera, a URL or a binary file, got "
            f"{type(source).__name__}"
        )
    return (_to_uint8(frame) for frame in iter(source))


def _to_uint8(frame: Any) -> NDArray[np.uint8]:
    """(H, W, 3), a copy, as iterables may write the next frame where this one is."""
    if isinstance(frame, Tensor):
        if frame.ndim != 3:
            raise ValueError(f"a frame that is a tensor must be (3, H, W), got {tuple(frame.shape)}")
        frame = frame.detach().permute(1, 2, 0).cpu()
        frame = (frame if frame.dtype.itemsize == 1 else frame.float()).numpy()
    rgb = to_rgb(frame)
    if rgb.dtype == np.uint16:
        rgb = rgb >> 8
    elif rgb.dtype != np.uint8:
        rgb = (rgb * 255).round()
    return np.array(rgb, np.uint8)
