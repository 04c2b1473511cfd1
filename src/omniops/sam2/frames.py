"""The frames of a video file or of a folder of pictures, decoded when they are asked for.

As the official package reads them for the network: pictures resized by PIL's default filter, a video's frames resized
by swscale's bicubic filter on their way to RGB. decord, which the official package reads videos with, resizes by that
filter too, but brings an FFmpeg of its own: single pixels may differ by a few steps of 255.

What differs: any video that FFmpeg reads; any pictures that PIL reads where a folder has no JPEGs; names sorted as
people count, numbers or not; and never more than 256 MiB of decoded frames in memory.

The frames of a video are counted, not believed: by the packets of the whole file, which are read but not decoded, where
a codec puts one frame into each and they carry distinct times; else by decoding the video once. The times give the
order of frames, so B-frames and variable frame rates need nothing more. A frame is reached from the keyframe before it,
and the frames decoded on the way are kept, as many as the 256 MiB hold: going backwards decodes a group of N frames
about 1 + N / 2K times, where K of them are kept, not N times. Where packets carry no times of their own (few do so: AVI
with B-frames, bare streams) the way is from the beginning.

A frame whose data are damaged, in a video that goes on after it, is replaced by its neighbour, with a warning. Several
threads decode a video until damage shows; from then on one does, because FFmpeg's threads lose whole frames beside it.
"""

from __future__ import annotations

import operator
import os
import re
import threading
import warnings
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniops.sam2.pictures import as_rgb

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from PIL.Image import Image

_MEMORY = 256 * 2**20
"""Bytes of decoded frames that a video keeps."""
_JPEG = (".jpeg", ".jpg")
_ENDINGS = (".avif", ".bmp", ".gif", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_ONE_FRAME_A_PACKET = ("av1", "ffv1", "h264", "hevc", "mjpeg", "png", "prores", "vp9")


class FrameError(ValueError):
    """A frame that cannot be decoded, of a video or a folder that could be opened."""


class Frames:
    """The frames of a video.

    ``len(frames)``, iteration, and ``frames[i]``, from 0 or backwards from -1: RGB, uint8, (H, W, 3), turned as the
    video's metadata say. Several threads may use it.

    Args:
        path: a video file, or a folder of pictures of one size. Of the folder the JPEGs count, or else all other
            pictures, in natural order of their names: 2.jpg before 10.jpg.

    Raises:
        FileNotFoundError: where nothing is there.
        ImportError: for a video file without PyAV.
        TypeError: where ``path`` is no path.
        ValueError: for a file that is no video, a folder without pictures, a video without frames, or pictures that
            cannot be read or differ in size.

    Warns:
        UserWarning: where a video breaks off; the frames until then count.
    """

    fps: float | None
    """Frames a second, on average; None of a folder."""
    times: Sequence[float] | None
    """When each frame is shown, in seconds after the first; None of a folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(os.fsdecode(path))
        except TypeError:
            raise TypeError(f"path must be the path of a video or a folder, got {type(path).__name__}") from None
        if not self.path.exists():
            raise FileNotFoundError(f"there is no video at {self.path}")
        self._source = _Folder(self.path) if self.path.is_dir() else _Video(self.path)
        self.height, self.width = self._source.height, self._source.width
        self.fps = self._source.fps
        self.times = self._source.times

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self._source.frame(self._index(index))

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[i] for i in range(len(self)))

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        """A frame for the network: (side, side, 3), as the official package resizes it."""
        return self._source.resized(self._index(index), side)

    def _index(self, index: int) -> int:
        count = len(self)
        at = operator.index(index)
        if not -count <= at < count:
            raise IndexError(f"frame {at} of {self.path}, which has {count}")
        return at % count


class _Folder:
    fps = None
    times = None

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        inside = [each for each in folder.iterdir() if not each.name.startswith(".") and each.is_file()]
        found = [[each for each in inside if each.suffix.lower() in endings] for endings in (_JPEG, _ENDINGS)]
        self._paths = sorted(found[0] or found[1], key=_natural)
        if not self._paths:
            raise ValueError(f"{folder} has no pictures: no file ends with {', '.join((*_JPEG, *_ENDINGS))}")
        sizes = []
        for path in self._paths:
            try:
                with Image.open(path) as picture:
                    sizes.append(picture.size)
            except OSError as error:
                raise ValueError(f"{path} cannot be read as a picture: {error}") from None
            if sizes[-1] != sizes[0]:
                raise ValueError(
                    f"the pictures of a video must be of one size, got {'x'.join(map(str, sizes[-1]))} in {path} "
                    f"and {'x'.join(map(str, sizes[0]))} in {self._paths[0]}"
                )
        self.width, self.height = sizes[0]

    def __len__(self) -> int:
        return len(self._paths)

    def frame(self, index: int) -> NDArray[np.uint8]:
        return np.array(self._picture(index))

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        return np.array(self._picture(index).resize((side, side)))

    def _picture(self, index: int) -> Image:
        from PIL import Image

        path = self._paths[index]
        try:
            with Image.open(path) as picture:
                if picture.mode == "RGB":
                    picture.load()
                    whole: Image.Image = picture  # not a copy: that would hold up the other threads
                    return whole
                rgb = as_rgb(picture)
        except Exception as error:  # Pillow's decoders raise what they like on damaged files
            raise FrameError(f"{path} cannot be read: {error}") from None
        if rgb.dtype != np.uint8:
            white = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
            rgb = np.rint(rgb * (255 / white)).astype(np.uint8)
        return Image.fromarray(rgb)


def _natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Numbers in names by their value, 2 before 10, and before letters."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts], path.name


class _Video:
    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise ImportError(f"reading {path} needs PyAV ({error}): pip install 'omniops[sam2]'") from error
        self._path = path
        self._error = av.FFmpegError
        self._lock = threading.Lock()
        self._frames: OrderedDict[int, VideoFrame] = OrderedDict()
        self._threads = True
        self._open()
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 0) or None
        self._times: list[int] | None = None  # of the frames in order, where they have such
        self._keys = [(0, 0)]  # keyframes: index, and where to seek to
        self._index_packets()
        if self._times is None:
            self._index_frames()
        if not self._count:
            raise ValueError(f"{path} has no frames")
        self._open()
        try:
            first = self._decoded(0)
        except FrameError:
            raise ValueError(f"{path} has no frame that can be decoded") from None
        self._size = first.width, first.height
        self._turns = round(first.rotation / 90) % 4  # counterclockwise
        self.width, self.height = self._size if self._turns % 2 == 0 else self._size[::-1]
        if self._times is None:
            self.times = [i / (self.fps or 25.0) for i in range(self._count)]
        else:
            self.times = [float((time - self._times[0]) * self._stream.time_base) for time in self._times]

    def __len__(self) -> int:
        return self._count

    def frame(self, index: int) -> NDArray[np.uint8]:
        return self._rgb(index, *self._size)

    def resized(self, index: int, side: int) -> NDArray[np.uint8]:
        return self._rgb(index, side, side)

    def _rgb(self, index: int, width: int, height: int) -> NDArray[np.uint8]:
        with self._lock:  # the decoder and its frames have one user at a time
            frame = self._decoded(index).reformat(width, height, "rgb24", interpolation="BICUBIC")
            rgb: NDArray[Any] = frame.to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, self._turns))

    def _open(self) -> None:
        import av

        try:
            self._container = av.open(str(self._path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{self._path} is not a video that FFmpeg can read: {error}") from None
        self._stream.thread_type = "AUTO" if self._threads else "NONE"
        self._decoder = self._decode()
        self._next = 0  # the frame that comes next, unless it is missing
        self._begin = 0  # the keyframe that the decoder began at: those before it come incomplete

    def _index_packets(self) -> None:
        """Count the frames, and find the keyframes, without decoding."""
        packets = []
        broken = False
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:  # not the last, which only says that there are no more
                    broken = packet.is_corrupt
                    packets.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
        except self._error:
            broken = True
        declared = self._stream.frames
        if packets and broken:
            packets.pop()
        if broken or declared > len(packets):
            of = f" of {declared}" if declared > len(packets) else ""
            warnings.warn(f"{self._path} breaks off after {len(packets)}{of} frames", stacklevel=4)
        times = [pts for pts, _, _, discarded in packets if not discarded]
        self._count = len(times)
        codec = self._stream.codec_context
        known = [pts for pts in times if pts is not None]
        order = sorted({*known})
        # AVI has no times of its own: FFmpeg makes some up in the order of decoding.
        made_up = codec.has_b_frames and known == order
        if codec.codec.canonical_name in _ONE_FRAME_A_PACKET and len(order) == len(times) and not made_up:
            self._times = order
            for pts, dts, is_key, _ in packets:
                if is_key and pts is not None:
                    self._keys.append((bisect_left(self._times, pts), pts if dts is None else dts))
            self._keys.sort()

    def _index_frames(self) -> None:
        """Count the frames, and find the keyframes, by decoding all."""
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
            self._index_frames()
            return
        self._count = len(times)
        known = [time for time in times if time is not None]
        if len(known) == len(times) and known == sorted({*known}):
            self._times, self._keys = known, keys

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
                continue
            yield from frames

    def _packets(self) -> Iterator[Packet | None]:
        """Those from here to the end, the last of which has the decoder give what it still holds."""
        try:
            for packet in self._container.demux(self._stream):
                if not packet.is_corrupt:  # cut off, mostly; it would cost those before it in the decoder too
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
                warnings.warn(f"frame {index} of {self._path} is damaged: its neighbour stands in for it", stacklevel=2)
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
        self._frames[index] = frame
        self._frames.move_to_end(index)
        while len(self._frames) > max(2, _MEMORY // sum(plane.buffer_size for plane in frame.planes)):
            self._frames.popitem(last=False)
