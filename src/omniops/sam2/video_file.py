"""A video file: its frames counted, and each decoded when it is asked for.

Frames are counted, not believed: by the packets of the whole file, which are read but not decoded, where a codec puts
one frame into each and they carry distinct times; else by decoding the video once. The times give the order of frames,
so B-frames and variable frame rates need nothing more. A frame is reached from the keyframe before it, and the frames
decoded on the way are kept, as many as the 256 MiB hold: going backwards decodes a group of N frames about 1 + N / 2K
times, where K of them are kept, not N times. Where packets carry no times of their own (few do so: AVI with B-frames,
bare streams) or times that start again (files put one behind the other, as MPEG-TS may be) the way is from the
beginning of the file: frames in order cost no more, one far behind those that are kept costs all before it.

A frame whose data are damaged, in a video that goes on after it, is replaced by its neighbour, with a warning. Several
threads decode a video until damage shows; from then on one does, because FFmpeg's threads lose whole frames beside it.
"""

from __future__ import annotations

import math
import operator
import threading
import warnings
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniops.sam2.picture_files import KINDS
from omniops.sam2.picture_sequences import MEMORY, FrameError, IncompleteVideoWarning

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

_EACH = 16 * 2**10
"""Bytes that a frame takes beside its pixels, at most: FFmpeg's and PyAV's records of it, and what pads its rows."""
_ONE_FRAME_A_PACKET = ("av1", "ffv1", "h264", "hevc", "mjpeg", "png", "prores", "vp9")
_SAY_HOW_LONG = frozenset(("asf", "flv", "live_flv", "matroska", "mxf", "webm"))
"""Formats whose header has the duration of the whole, which FFmpeg measures in others."""
_ROUNDED = 0.002
"""Seconds by which the durations that a file declares may be greater than those of its packets."""
_SIZES = 4
_BT601, _BT709 = 5, 1
_RGB_RANGE = 2


class Colour(NamedTuple):
    """How YUV stands for colours, by the numbers of ITU-T H.273; 2 where a video does not say."""

    primaries: int
    transfer: int
    matrix: int
    full_range: bool


class _Packet(NamedTuple):
    """What is kept of one, its times in ticks."""

    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool

    @classmethod
    def of(cls, packet: Packet) -> _Packet:
        return cls(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard)


class VideoFile:
    """The frames of a video file, as ``Frames`` gives them on."""

    _stream: Any = None

    def __init__(self, path: Path) -> None:
        try:
            import av
            from av.video.reformatter import VideoReformatter
        except ImportError as error:
            raise ImportError(f"reading {path} needs PyAV ({error}): pip install 'omniops[sam2]'") from error
        self._path = path
        self._error = av.FFmpegError
        self._lock = threading.Lock()
        self._frames: OrderedDict[int, VideoFrame] = OrderedDict()
        self._memory = 0  # that the frames of this decoder take
        self._older: set[int] = set()  # frames of decoders before this one
        self._older_memory = 0
        self._new_scaler = VideoReformatter
        self._scalers: dict[tuple[int, int], Any] = {}
        self._threads = True
        self._container: Any = None
        self._file: Any = None
        self._cut: tuple[object, ...] | None = None  # the packet in which the file ends
        self._open()
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 0) or None
        time_base: Fraction = self._stream.time_base
        self.time_base: Fraction | None = time_base
        self._times: list[int] | None = None  # of the frames in order, where they have such
        self._keys = [(0, 0)]  # keyframes: index, and where to seek to
        shown = self._index_packets()
        if self._times is None:
            shown = self._index_frames()
        if not self._count:
            raise ValueError(f"{path} has no frames")
        self.times: list[float] | None = self._in_seconds(shown, time_base)
        if self._count == 1 and self._is_of_pictures:  # one picture, whose rate FFmpeg made up
            self.fps = self.times = self.time_base = None
        self._open()
        try:
            first = self._decoded(0)
        except FrameError:
            raise ValueError(f"{path} has no frame that can be decoded") from None
        self._describe(first)
        # A frame whose side data were looked at refers to itself: it, and its decoder's memory, would stay for long.
        self._frames.clear()
        self._memory = 0
        self._open()

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory."""
        return self._memory + self._older_memory

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""
        return self._rgb(index, *self._size)

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        """(side, side, 3), for the network."""
        return self._rgb(index, side, side)

    def _describe(self, first: VideoFrame) -> None:
        self._size = first.width, first.height
        self._transposed, self._flips = turned(first)
        self.width, self.height = self._size[::-1] if self._transposed else self._size
        ratio = Fraction(self._stream.sample_aspect_ratio or 1)
        self.sample_aspect_ratio = 1 / ratio if self._transposed else ratio
        context = self._stream.codec_context
        full = first.color_range == _RGB_RANGE or first.format.name.startswith("yuvj")
        numbers = (int(context.color_primaries), int(context.color_trc), int(first.colorspace))
        self.colour = None if first.format.is_rgb else Colour(*numbers, full)

    def _rgb(self, index: int, width: int, height: int) -> NDArray[np.uint8]:
        with self._lock:  # the decoder and its frames have one user at a time
            frame = self._decoded(index)
            # Each size has one scaler: a frame that is asked itself keeps one of its own, bigger than a small frame.
            if (width, height) not in self._scalers and len(self._scalers) == _SIZES:
                self._scalers.clear()
            scaler = self._scalers.setdefault((width, height), self._new_scaler())
            # PyAV before 17 minds the matrix only where another one is asked for, and what RGB has for one is nothing.
            rgb: NDArray[Any] = scaler.reformat(
                frame,
                width,
                height,
                "rgb24",
                src_colorspace=int(frame.colorspace),
                dst_colorspace=_BT601 if frame.colorspace == _BT709 else _BT709,
                interpolation="BICUBIC",
                src_color_range=int(frame.color_range),
                dst_color_range=_RGB_RANGE,
            ).to_ndarray()
        if self._transposed:
            rgb = rgb.swapaxes(0, 1)
        return np.ascontiguousarray(rgb[self._flips])

    def _open(self) -> None:
        import av

        self._close()
        try:
            self._file = _Input(self._path)
            self._container = av.open(self._file, buffer_size=2**18)
            self._stream = _moving_pictures(self._container)
            self._is_of_pictures = self._container.format.name.endswith("_pipe")
        except (OSError, ValueError) as error:
            self._close()
            raise ValueError(f"{self._path} is not a video that FFmpeg can read: {_why(error)}") from None
        self._older.update(self._frames)
        self._older_memory += self._memory
        self._memory = 0
        self._stream.thread_type = "AUTO" if self._threads else "NONE"
        self._decoder = self._decode()
        self._next = 0  # the frame that comes next, unless it is missing
        self._begin = 0  # the keyframe that the decoder began at: those before it come incomplete
        self._damaged = 0  # packets that could not be decoded

    def __del__(self) -> None:
        if hasattr(self, "_container"):
            self._close()

    def _close(self) -> None:
        codec = getattr(self._stream, "codec_context", None)
        if codec is not None:
            # Waits for FFmpeg's threads without Python's lock. They take it to drop packets, and PyAV holds it while it
            # waits for them to end.
            codec.flush_buffers()
        self._stream = None
        for each in (self._container, self._file):
            if each is not None:
                each.close()
        self._container = self._file = None

    def _index_packets(self) -> list[int | None]:
        """Count the frames, and find the keyframes, without decoding. Returns when they are shown, in ticks."""
        packets = []
        broken = False
        reached = 0.0
        says_how_long = not _SAY_HOW_LONG.isdisjoint(self._container.format.name.split(","))
        try:
            for packet in self._container.demux(*(() if says_how_long else (self._stream,))):
                if not packet.size:  # the last, which only says that there are no more
                    continue
                began = packet.dts if packet.pts is None else packet.pts
                if began is not None:
                    reached = max(reached, float((began + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == self._stream.index:
                    broken = packet.is_corrupt
                    packets.append(_Packet.of(packet))
                    self._cut = _identity(packet) if broken else None
        except self._error:
            broken = True
        if self._cut is not None:
            packets.pop()
        self._warn_where_it_breaks_off(packets, broken, reached if says_how_long else math.inf)
        times = [packet.pts for packet in packets if not packet.is_discard]
        self._count = len(times)
        codec = self._stream.codec_context
        known = [pts for pts in times if pts is not None]
        order = sorted({*known})
        # AVI has no times of its own: FFmpeg makes some up in the order of decoding.
        made_up = codec.has_b_frames and known == order
        if codec.codec.canonical_name in _ONE_FRAME_A_PACKET and len(order) == len(times) and not made_up:
            self._times = order
            for packet in packets:
                if packet.is_keyframe and packet.pts is not None:
                    self._keys.append(
                        (bisect_left(order, packet.pts), packet.pts if packet.dts is None else packet.dts)
                    )
            self._keys.sort()
        return [*order]

    def _warn_where_it_breaks_off(self, packets: Sequence[_Packet], broken: bool, reached: float) -> None:
        missing = (self._container.duration or 0) / 1e6 - reached
        more = f" of {self._stream.frames}" if self._lacks_some(packets) else ""
        if broken or more:
            warnings.warn(f"{self._path} breaks off after {len(packets)}{more} frames", IncompleteVideoWarning, 6)
        elif missing > max(0.1, 2 / (self.fps or 25)):
            seconds = f"{reached:.2f} of {reached + missing:.2f} s"
            warnings.warn(f"{self._path} breaks off after {len(packets)} frames, {seconds}", IncompleteVideoWarning, 6)

    def _lacks_some(self, packets: Sequence[_Packet]) -> bool:
        """Whether packets are missing of those that the file declares.

        Not so where the others cover the time of all: edit lists leave some out, and AVI counts repetitions too.
        """
        if self._stream.frames <= len(packets):
            return False
        spans = [(at.dts, at.dts + at.duration) for at in packets if at.dts is not None and not at.is_discard]
        # AVI declares ticks, not frames, and FFmpeg takes what it finds of a file that is cut off for its duration.
        length = self._stream.frames if self._container.format.name == "avi" else self._stream.duration
        if not spans or not length:
            return True
        covered = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return float((length - covered) * self.time_base) > _ROUNDED

    def _index_frames(self) -> list[int | None]:
        """Count the frames, and find the keyframes, by decoding all. Returns when they are shown, in ticks."""
        times: list[int | None] = []
        keys = [(0, 0)]
        self._open()
        with suppress(self._error):
            for frame in self._decoder:
                if frame.key_frame and frame.pts is not None:
                    keys.append((len(times), frame.pts if frame.dts is None else min(frame.pts, frame.dts)))
                times.append(frame.pts)
        if len(times) < self._count and self._threads:
            self._threads = False
            return self._index_frames()
        if self._damaged:
            of_them = f"{len(times)} frames can be decoded, {self._damaged} cannot"
            warnings.warn(f"{self._path} is damaged: {of_them}", IncompleteVideoWarning, 5)
        self._count = len(times)
        known = [time for time in times if time is not None]
        if len(known) == len(times) and known == sorted({*known}):
            self._times, self._keys = known, keys
        return times

    def _in_seconds(self, shown: Sequence[int | None], time_base: Fraction) -> list[float]:
        """When each frame is shown after the first. Where that is not known or goes back it follows the one before."""
        usual = 1 / (self.fps or 25)
        seconds: list[float] = []
        before: int | None = None
        now = 0.0
        start = (0.0, 0)  # what a clock showed, and its ticks then
        for ticks in shown:
            if ticks is None:
                now = now + usual if seconds else 0.0
            elif before is None or ticks <= before:
                now = now + usual if seconds else 0.0
                start = (now, ticks)
            else:
                now = start[0] + float((ticks - start[1]) * time_base)
            before = ticks
            seconds.append(now)
        return seconds

    def _decode(self) -> Iterator[VideoFrame]:
        """The frames from here to the end, those of damaged packets left out.

        Raises:
            FFmpegError: for a damaged packet where threads decode.
        """
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except self._error:
                if self._threads:
                    raise
                self._damaged += 1
                continue
            yield from frames

    def _packets(self) -> Iterator[Packet | None]:
        """Those from here to the end, the last of which has the decoder give what it still holds."""
        try:
            for packet in self._container.demux(self._stream):
                # The one that is cut off would cost those before it in the decoder too. Others that FFmpeg has doubts
                # about, as where files were put one behind the other, may well be whole.
                if not packet.is_corrupt or _identity(packet) != self._cut:
                    yield packet
        except self._error:  # the file breaks off
            yield None

    def _decoded(self, index: int) -> VideoFrame:
        if index not in self._frames:
            try:
                self._find(index)
            except (self._error, FrameError):
                if not self._threads:
                    raise
                self._threads = False
                self._open()
                self._find(index)
        return self._frames[index]

    def _find(self, index: int) -> None:
        key, offset = self._keys[bisect_right(self._keys, index, key=operator.itemgetter(0)) - 1]
        if not key <= self._next <= index:
            self._seek(key, offset)
        if not self._reach(index):
            self._open()
            self._reach(index)

    def _seek(self, key: int, offset: int) -> None:
        if key == 0:
            self._open()
        else:
            self._container.seek(offset, stream=self._stream)
            self._decoder = self._decode()
            self._next = self._begin = key

    def _reach(self, index: int) -> bool:
        """Decode to that frame; False where it is not to be had from the keyframe that was sought."""
        before = self._frames.get(self._next - 1) if self._next > self._begin else None
        for frame in self._decoder:
            at = self._next if self._times is None else self._at(frame.pts)
            if at is None or at < self._begin:
                continue
            if at > index and before is None and self._begin > 0:
                return False
            self._next = at + 1
            self._hold(at, frame)
            if at > index:
                damaged = f"frame {index} of {self._path} is damaged: its neighbour stands in for it"
                warnings.warn(damaged, IncompleteVideoWarning, 2)
                self._hold(index, before or frame)
            if at >= index:
                return True
            before = frame
        if self._begin > 0:
            return False
        raise FrameError(f"frame {index} of {self._path} cannot be decoded: it breaks off there")

    def _at(self, time: int | None) -> int | None:
        assert self._times is not None
        at = len(self._times) if time is None else bisect_left(self._times, time)
        return at if at < len(self._times) and self._times[at] == time else None

    def _hold(self, index: int, frame: VideoFrame) -> None:
        if index in self._frames and index not in self._older:
            self._memory -= _taken(self._frames[index])
        self._older.discard(index)
        self._frames[index] = frame
        self._frames.move_to_end(index)
        self._memory += _taken(frame)
        # FFmpeg frees the frames of a decoder that is closed together, once none of them is held any more.
        if self._memory + self._older_memory > MEMORY:
            for older in self._older:
                del self._frames[older]
            self._older.clear()
        if not self._older:
            self._older_memory = 0
        while self._memory > MEMORY and len(self._frames) > 2:
            self._memory -= _taken(self._frames.popitem(last=False)[1])


class _Input:
    """The file that FFmpeg reads from. It is opened here, so that its name is never taken for a protocol.

    Nor for a pattern of pictures' names, or for a picture: such names are not told.
    """

    def __init__(self, path: Path) -> None:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close
        is_safe = path.suffix.lower() not in KINDS and not set("%*") & set(path.name)
        self.name = str(path) if is_safe else "video"

    def __del__(self) -> None:
        if hasattr(self, "close"):
            self.close()


def _taken(frame: VideoFrame) -> int:
    """Bytes of memory."""
    return _EACH + sum(int(plane.buffer_size) for plane in frame.planes)


def _identity(packet: Packet) -> tuple[object, ...]:
    return packet.pos, packet.dts, packet.pts, packet.size


def turned(frame: VideoFrame) -> tuple[bool, tuple[slice, slice]]:
    """How a frame is to be shown: whether its axes change places, and then which of them are to be reversed.

    A display matrix takes the pixel (x, y) to (a x + c y, b x + d y), in its memory a, b, 0, c, d, 0 and three more
    numbers. Of turns that are none of the eight of a square, the nearest is taken; a matrix that makes every picture a
    line or a point, as zeros do, stands for nothing.
    """
    a, b, c, d = _display_matrix(frame)
    transposed = abs(b) > abs(a)
    x, y = (c, b) if transposed else (a, d)
    return transposed, (slice(None, None, -1 if y < 0 else None), slice(None, None, -1 if x < 0 else None))


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV has no name for some side data, as EXIF's, and then gives none at all. This knows turns, but no mirrors.
        cosine, sine = math.cos(math.radians(frame.rotation)), math.sin(math.radians(frame.rotation))
        return round(2**16 * cosine), round(-(2**16) * sine), round(2**16 * sine), round(2**16 * cosine)
    if side_data is not None:
        a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
        if a * d != b * c:
            return a, b, c, d
    return 1, 0, 0, 1


def _moving_pictures(container: InputContainer) -> VideoStream:
    """The video of a file that FFmpeg takes for the main one; pictures of covers are none."""
    from av.stream import Disposition

    videos = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not videos:
        raise ValueError("it has no pictures" if not container.streams.video else "it has a cover and no video")
    best = container.streams.best("video")
    video = best if best in videos else videos[0]
    if video.codec_context is None:
        raise ValueError("it is in a codec that this FFmpeg does not know")
    return video


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
