"""Videos, written frame by frame, that keep the times, the shape of pixels and the colours of what was read."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniops.drawing.sound import add_sound

if TYPE_CHECKING:
    from omniops.sam2.frames import Frames

_FOLDERS_RATE = Fraction(24)
_SLOWEST = Fraction(1, 1001)
_FINEST = Fraction(1, 90000)
"""The clock of times that come without one of their own: whole at 24, 25, 30 and 60 frames a second."""
_FINEST_OF_MPEG_4 = Fraction(1, 60000)
_MOST_OF_MPEG_4, _MOST_OF_MP4, _MOST_OF_WEBM = 65535, 10**7, 1000
"""Ticks a second that they can count."""

_MATRICES = {
    1: "bt709",
    2: "smpte170m",  # unspecified: FFmpeg, which read it, takes it for that
    4: "fcc",
    5: "smpte170m",
    6: "smpte170m",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}
"""What FFmpeg's scale filter calls those of ITU-T H.273, table 4."""
_OPTIONS = {
    "libx264": {"preset": "veryfast", "tune": "zerolatency"},
    # What is transparent has no frames that are made of later ones.
    "libvpx-vp9": {
        **{"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"},
        **{"lag-in-frames": "0", "auto-alt-ref": "0"},
    },
}
"""By codec. No frame waits in the encoder for those after it."""
_BT709, _UNSPECIFIED, _SRGB = 1, 2, 13
_LIMITED, _FULL = 1, 2


class VideoWriter:
    """Frames of one size as an MP4 file: H.264, or MPEG-4 where FFmpeg came without x264. A path that ends with .webm
    gets a WebM file, VP9, which may be transparent.

    The file is there once the first frame has come, and whatever ends the process, the frames written until then can be
    read from it, but for the last. Sides become even, as these codecs want them: the last row or column is repeated.

    Sound is put in when the video is closed; until then, and where it fails, the file is there without it.

    Args:
        path: the file to write, replaced where it is there. To a pipe goes what can be written without going back.
        like: the video that the frames come from, whose rate, clock, shape of pixels and colours it gets. Pictures are
            taken for sRGB.
        fps: frames a second, instead of those of ``like``; 24 where neither says.
        audio: the file whose sound the video gets, which may be that of ``like``, or one without sound. What is heard
            with the first frame in that file is heard with it here; times of ``write`` are those of ``like.times``.
            Tracks are copied where the new file can have their codec, else they become AAC, or Opus in WebM.

    Raises:
        FileNotFoundError: where there is no file ``audio``.
        OSError: by any method, with the path in its text, where the file cannot be written.
        ImportError: by ``write``, without PyAV.
        ValueError: by ``write``, for a frame of another size than the first, and for a transparent one in MP4.

    Warns:
        UserWarning: by ``close``, where the sound, or a track of it, had to be left out.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with VideoWriter(f"{folder}/a.mp4", fps=25) as writer:
        ...         for value in (0, 100, 200):
        ...             writer.write(np.full((48, 64, 3), value, np.uint8))
        ...     len(omniops.sam2.frames.Frames(f"{folder}/a.mp4"))
        3
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        like: Frames | None = None,
        fps: float | None = None,
        *,
        audio: str | os.PathLike[str] | None = None,
    ) -> None:
        self._path = Path(os.fsdecode(path))
        self._audio = None if audio is None else Path(os.fsdecode(audio))
        if self._audio is not None and not self._audio.exists():
            raise FileNotFoundError(f"there is no file {self._audio} to take sound from")
        self._is_webm = self._path.suffix.lower() == ".webm"
        fps = fps or (like.fps if like is not None else None)
        self._rate = max(_SLOWEST, Fraction(fps or _FOLDERS_RATE).limit_denominator(1001))
        self._like = like
        self._file: _Output | None = None
        self._first: float | None = None
        self._count = 0
        self._last = -1  # tick
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frame: NDArray[np.uint8], time: float | None = None) -> None:
        """Append (H, W, 3), RGB, or of WebM (H, W, 4), RGBA.

        ``time`` in seconds is when it is shown, which None leaves to the rate. Only differences of times count: the
        first frame is shown at once.
        """
        import av

        if frame.shape != (self._shape or frame.shape):
            raise ValueError(f"frames must be of one size, got {frame.shape} after {self._shape}")
        if frame.shape[2] == 4 and not self._is_webm:
            raise ValueError("MP4 has no transparency: end the path with .webm")
        self._shape = frame.shape
        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        try:
            with _signals_afterwards():
                if self._file is None:
                    self._open(even.shape[0], even.shape[1], time)
                picture = av.VideoFrame.from_ndarray(even, format="rgba" if self._is_transparent else "rgb24")
                picture.pts, picture.time_base = self._ticks(time), self._clock
                self._encode(self._converted(picture))
                self._count += 1
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Write what the encoder still holds, the end, and the sound; after an error, only let go of the file."""
        import av

        if self._file is None or self._file.closed:
            return
        is_whole, is_file = not self._file.failed, self._file.seekable()
        try:
            if is_whole:
                with _signals_afterwards():
                    self._encode(None)
                    self._container.close()
                    self._file.finish()
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from None
        finally:
            self.abort()
        if is_whole and self._audio is not None and not self._audio.is_dir():
            self._add_sound(self._audio, is_file)

    def abort(self) -> None:
        """Let go of the file as it is, without the end: what was written can be read."""
        if self._file is None:
            return
        self._file.failed = True
        with suppress(Exception):  # the container tries to write its end, which is refused
            self._container.close()
        self._file.close()

    @property
    def _is_transparent(self) -> bool:
        return self._shape is not None and self._shape[2] == 4

    @property
    def _layout(self) -> str:
        return "yuva420p" if self._is_transparent else "yuv420p"

    def _add_sound(self, audio: Path, is_file: bool) -> None:
        if not is_file:
            warnings.warn(f"{self._path} is without sound: it is a pipe", stacklevel=3)
            return
        start_time = None
        if self._like is not None and self._like.path.exists() and audio.samefile(self._like.path):
            start_time = self._like.start_time
        add_sound(self._path, audio, start_time, self._first or 0.0)

    def _failed(self, error: OSError) -> OSError:
        self.abort()
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        failed = OSError(f"cannot write {self._path}: {why}")
        failed.errno = error.errno
        return failed

    def _open(self, height: int, width: int, time: float | None) -> None:
        import av

        self._file = _Output(self._path)
        # Fragments until the end, which makes a plain file of them: that is what all players read.
        flags = "hybrid_fragmented" if self._file.seekable() else "empty_moov+default_base_moof"
        options = {} if self._is_webm else {"movflags": f"{flags}+frag_every_frame", "flush_packets": "1"}
        self._container: Any = av.open(self._file, "w", format="webm" if self._is_webm else "mp4", options=options)
        has_x264 = "libx264" in av.codecs_available
        codec = "libvpx-vp9" if self._is_webm else "libx264" if has_x264 else "mpeg4"
        stream = self._stream = self._container.add_stream(codec, rate=self._rate)
        stream.height, stream.width, stream.pix_fmt = height, width, self._layout
        if codec == "mpeg4":  # whose default is far too little
            stream.bit_rate = int(height * width * self._rate / 4)
        else:
            stream.options = _OPTIONS[codec]
        context = stream.codec_context
        context.gop_size = min(60, max(12, round(self._rate)))
        context.time_base = self._clock = self._clock_of(time, has_x264)
        if self._like is not None and self._like.sample_aspect_ratio != 1:
            context.sample_aspect_ratio = self._like.sample_aspect_ratio
        colour = None if self._like is None else self._like.colour
        if colour is None:
            primaries, transfer, matrix, full = _BT709, _SRGB, _BT709, False
        else:
            primaries, transfer, matrix, full = colour
        self._matrix = matrix if matrix in _MATRICES else _BT709
        self._range = _FULL if full and codec == "libx264" else _LIMITED
        context.color_primaries, context.color_trc = primaries, transfer
        context.colorspace, context.color_range = self._matrix, self._range
        self._graph = self._conversion(height, width)

    def _clock_of(self, time: float | None, has_x264: bool) -> Fraction:
        """Seconds a tick."""
        own = None if self._like is None else self._like.time_base
        clock = 1 / self._rate if time is None else own or _FINEST
        if self._is_webm:
            return clock if clock.denominator <= _MOST_OF_WEBM else Fraction(1, _MOST_OF_WEBM)
        if clock.denominator <= (_MOST_OF_MP4 if has_x264 else _MOST_OF_MPEG_4):
            return clock
        return _FINEST if has_x264 else _FINEST_OF_MPEG_4

    def _ticks(self, time: float | None) -> int:
        """When the next frame is shown; always later than the one before."""
        if time is None:
            ticks = round(self._count / self._rate / self._clock)
        else:
            self._first = time if self._first is None else self._first
            ticks = round((time - self._first) / self._clock)
        self._last = max(ticks, self._last + 1)
        return self._last

    def _conversion(self, height: int, width: int) -> Any:
        """The graph of filters from RGB to what is encoded."""
        import av

        graph = av.filter.Graph()
        colours = (
            f"out_color_matrix={_MATRICES[self._matrix]}:out_range={'full' if self._range == _FULL else 'limited'}"
        )
        graph.link_nodes(
            graph.add_buffer(
                width=width,
                height=height,
                format="rgba" if self._is_transparent else "rgb24",
                time_base=self._clock,
            ),
            graph.add("scale", f"{colours}:flags=bicubic+accurate_rnd"),
            graph.add("format", self._layout),
            graph.add("buffersink"),
        ).configure()
        return graph

    def _converted(self, picture: Any) -> Any:
        self._graph.push(picture)
        converted = self._graph.pull()
        converted.colorspace, converted.color_range = self._matrix, self._range
        return converted

    def _encode(self, frame: Any) -> None:
        assert self._file is not None
        for packet in self._stream.encode(frame):
            if not packet.duration:  # of the last frame nothing else says how long it is shown
                packet.duration = max(1, round(1 / self._rate / packet.time_base))
            self._container.mux(packet)
            self._file.keep()


@contextmanager
def _signals_afterwards() -> Iterator[None]:
    """Meanwhile the handlers of Ctrl-C and of requests to end are not called, but after it.

    What they raise while FFmpeg calls Python is lost in PyAV, and with it the bytes that were to be written.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python calls no handlers
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        handler = None if number is None else signal.getsignal(number)
        if number is not None and callable(handler):
            handlers[int(number)] = handler
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: received.append((number, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in received:
            handlers[number](number, frame)


class _Output:
    """The file that FFmpeg writes to. It is opened here, so that any name will do and errors are the system's own.

    What FFmpeg changes of what it wrote before is changed at the end: until then the file can be read, without it not.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._position = 0
        self._readable_size = 0
        self._changes: list[tuple[int, bytes]] = []
        self.failed = False
        self.closed = False

    def write(self, data: bytes) -> int:
        if self.failed:
            raise OSError("it was given up")
        if self._position < self._readable_size:
            self._changes.append((self._position, bytes(data)))
        else:
            self._append(data)
        self._position += len(data)
        return len(data)

    def keep(self) -> None:
        """Call what was written until now a file that can be read."""
        if self.seekable():
            self._readable_size = self._position

    def finish(self) -> None:
        """Make the changes."""
        for offset, data in self._changes:
            self._file.seek(offset)
            self._file.write(data)

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset, whence = self._position + offset, os.SEEK_SET
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def _append(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self.failed = True
            if self.seekable():  # a fragment whose head is cut off would make all of the file unreadable
                with suppress(OSError):
                    self._file.truncate(self._readable_size)
            raise
