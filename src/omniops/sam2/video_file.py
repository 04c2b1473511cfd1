"""The frames of a video file, counted when it is opened, and decoded when they are asked for.

The number of frames that a file declares is not relied on. Where a codec puts one frame into each packet, and packets
have distinct times, the packets of the whole file are read and counted, without decoding; else the video is decoded
once. Frames are in the order of their times, so that B-frames and variable frame rates need nothing more. A frame is
decoded from the keyframe before it on, and the frames between them are kept, within 256 MiB: going backwards decodes a
group of N frames about 1 + N / 2K times, where K of them are kept, not N times. Where packets have no times (in AVI
with B-frames, and streams without a container) or times that start again (in concatenated files, as MPEG-TS may be)
frames are decoded from the beginning of the file on: in order they cost no more, but a frame far from those that are
kept costs all before it.

A damaged frame, in a video that goes on after it, is replaced by its neighbour, with a warning. Several threads decode
a video until one is damaged; then one thread does, because FFmpeg's threads lose whole frames beside a damaged one.
"""

from __future__ import annotations

import math
import operator
import threading
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniops.sam2.decoded_frames import DecodedFrames
from omniops.sam2.display_matrix import display_orientation
from omniops.sam2.frame_reader import Colour, FrameError, IncompleteVideoWarning
from omniops.sam2.rgb_conversion import RGB_RANGE, RGBConverter
from omniops.sam2.video_container import InputFile, PacketRecord, main_video_stream, packet_identity

if TYPE_CHECKING:
    from av import Packet, VideoFrame

_ONE_FRAME_PER_PACKET = ("av1", "ffv1", "h264", "hevc", "mjpeg", "png", "prores", "vp9")
"""Codecs, as FFmpeg calls them."""
_DECLARE_DURATION = frozenset(("asf", "flv", "live_flv", "matroska", "mxf", "webm"))
"""Formats whose header has the duration of the file. In others FFmpeg measures it."""
_DURATION_TOLERANCE = 0.002
"""Seconds by which the durations that a file declares may be greater than those of its packets."""


class VideoFile:
    """A ``FrameReader`` of a video file.

    Raises:
        ImportError: without PyAV.
        ValueError: for a file that is no video, or has no frame that can be decoded.

    Warns:
        IncompleteVideoWarning: where the file breaks off, or frames of it are damaged.
    """

    _stream: Any = None

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise ImportError(f"reading {path} needs PyAV ({error}): pip install 'omniops[sam2]'") from error
        self._path = path
        self._error = av.FFmpegError
        self._lock = threading.Lock()
        self.decoded_frames = DecodedFrames()
        self._converter = RGBConverter()
        self._use_threads = True
        self._container: Any = None
        self._file: Any = None
        self._truncated_packet: tuple[object, ...] | None = None  # the identity of the packet in which the file ends
        self._open()
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 0) or None
        time_base: Fraction = self._stream.time_base
        self.time_base: Fraction | None = time_base
        self._times: list[int] | None = None  # of the frames in order, None where they do not tell the order
        self._keyframes = [(0, 0)]  # their indices, and the times to seek to
        ticks = self._index_packets()
        if self._times is None:
            ticks = self._index_frames()
        if not self._count:
            raise ValueError(f"{path} has no frames")
        self.times: list[float] | None = self._in_seconds(ticks, time_base)
        start = next((time for time in ticks if time is not None), None)
        self.start_time = None if start is None else float(start * time_base)
        if self._count == 1 and self._is_of_pictures:  # FFmpeg makes up a rate for one picture
            self.fps = self.times = self.time_base = self.start_time = None
        self._open()
        try:
            first = self._get(0)
        except FrameError:
            raise ValueError(f"{path} has no frame that can be decoded") from None
        self._describe(first)
        # A frame whose side data were read refers to itself, and would keep its decoder's memory for long.
        self.decoded_frames.clear()
        self._open()

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory."""
        return self.decoded_frames.nbytes

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""
        return self._rgb(index, *self._size)

    def resized(self, index: int, image_size: int) -> NDArray[np.uint8]:
        """(S, S, 3), RGB, for the network."""
        return self._rgb(index, image_size, image_size)

    def _describe(self, first: VideoFrame) -> None:
        self._size = first.width, first.height
        self._orientation = display_orientation(first)
        is_transposed = self._orientation.is_transposed
        self.width, self.height = self._size[::-1] if is_transposed else self._size
        ratio = Fraction(self._stream.sample_aspect_ratio or 1)
        self.sample_aspect_ratio = 1 / ratio if is_transposed else ratio
        context = self._stream.codec_context
        full_range = first.color_range == RGB_RANGE or first.format.name.startswith("yuvj")
        numbers = (int(context.color_primaries), int(context.color_trc), int(first.colorspace))
        self.colour = None if first.format.is_rgb else Colour(*numbers, full_range)

    def _rgb(self, index: int, width: int, height: int) -> NDArray[np.uint8]:
        with self._lock:  # a decoder and its frames are for one thread at a time
            rgb = self._converter.convert(self._get(index), width, height)
        return np.ascontiguousarray(self._orientation.apply(rgb))

    def _open(self) -> None:
        import av

        self._close()
        try:
            self._file = InputFile(self._path)
            self._container = av.open(self._file, buffer_size=2**18)
            self._stream = main_video_stream(self._container)
            self._is_of_pictures = self._container.format.name.endswith("_pipe")
        except (OSError, ValueError) as error:
            self._close()
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"{self._path} is not a video that FFmpeg can read: {reason}") from None
        self.decoded_frames.mark_decoder_closed()
        self._stream.thread_type = "AUTO" if self._use_threads else "NONE"
        self._decoder = self._decode()
        self._next = 0  # the frame that the decoder returns next, unless it is missing
        self._first = 0  # the keyframe that the decoder began at, before which it returns incomplete frames
        self._num_damaged = 0  # packets that could not be decoded

    def __del__(self) -> None:
        if hasattr(self, "_container"):
            self._close()

    def _close(self) -> None:
        codec = getattr(self._stream, "codec_context", None)
        if codec is not None:
            # This waits for FFmpeg's threads without Python's lock, which they need to drop packets. Closing would wait
            # for them with the lock.
            codec.flush_buffers()
        self._stream = None
        for resource in (self._container, self._file):
            if resource is not None:
                resource.close()
        self._container = self._file = None

    def _index_packets(self) -> list[int | None]:
        """Count the frames, and find the keyframes, without decoding. Returns the frames' times in ticks."""
        packets = []
        is_broken = False
        end = 0.0  # of the last packet, in seconds
        declares_duration = not _DECLARE_DURATION.isdisjoint(self._container.format.name.split(","))
        try:
            for packet in self._container.demux(*(() if declares_duration else (self._stream,))):
                if not packet.size:  # the last packet is an empty one
                    continue
                start = packet.dts if packet.pts is None else packet.pts
                if start is not None:
                    end = max(end, float((start + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == self._stream.index:
                    is_broken = packet.is_corrupt
                    packets.append(PacketRecord.of(packet))
                    self._truncated_packet = packet_identity(packet) if is_broken else None
        except self._error:
            is_broken = True
        if self._truncated_packet is not None:
            packets.pop()
        self._warn_if_incomplete(packets, is_broken, end if declares_duration else math.inf)
        times = [packet.pts for packet in packets if not packet.is_discard]
        self._count = len(times)
        codec = self._stream.codec_context
        known = [pts for pts in times if pts is not None]
        order = sorted({*known})
        # AVI has no times: FFmpeg makes them up in the order of decoding.
        are_made_up = codec.has_b_frames and known == order
        if codec.codec.canonical_name in _ONE_FRAME_PER_PACKET and len(order) == len(times) and not are_made_up:
            self._times = order
            for packet in packets:
                if packet.is_keyframe and packet.pts is not None:
                    self._keyframes.append(
                        (bisect_left(order, packet.pts), packet.pts if packet.dts is None else packet.dts)
                    )
            self._keyframes.sort()
        return [*order]

    def _warn_if_incomplete(self, packets: Sequence[PacketRecord], is_broken: bool, end: float) -> None:
        missing = (self._container.duration or 0) / 1e6 - end
        of_declared = f" of {self._stream.frames}" if self._lacks_packets(packets) else ""
        if is_broken or of_declared:
            warnings.warn(
                f"{self._path} breaks off after {len(packets)}{of_declared} frames", IncompleteVideoWarning, 6
            )
        elif missing > max(0.1, 2 / (self.fps or 25)):
            seconds = f"{end:.2f} of {end + missing:.2f} s"
            warnings.warn(f"{self._path} breaks off after {len(packets)} frames, {seconds}", IncompleteVideoWarning, 6)

    def _lacks_packets(self, packets: Sequence[PacketRecord]) -> bool:
        """Whether packets are missing of those that the file declares.

        Not so where the others cover the declared duration: edit lists leave packets out, and AVI counts repetitions.
        """
        if self._stream.frames <= len(packets):
            return False
        spans = [(p.dts, p.dts + p.duration) for p in packets if p.dts is not None and not p.is_discard]
        # AVI declares ticks, not frames, and FFmpeg takes the packets of a truncated file for its duration.
        length = self._stream.frames if self._container.format.name == "avi" else self._stream.duration
        if not spans or not length:
            return True
        covered = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return float((length - covered) * self.time_base) > _DURATION_TOLERANCE

    def _index_frames(self) -> list[int | None]:
        """Count the frames, and find the keyframes, by decoding all. Returns the frames' times in ticks."""
        times: list[int | None] = []
        keyframes = [(0, 0)]
        self._open()
        with suppress(self._error):
            for frame in self._decoder:
                if frame.key_frame and frame.pts is not None:
                    keyframes.append((len(times), frame.pts if frame.dts is None else min(frame.pts, frame.dts)))
                times.append(frame.pts)
        if len(times) < self._count and self._use_threads:
            self._use_threads = False
            return self._index_frames()
        if self._num_damaged:
            counts = f"{len(times)} frames can be decoded, {self._num_damaged} cannot"
            warnings.warn(f"{self._path} is damaged: {counts}", IncompleteVideoWarning, 5)
        self._count = len(times)
        known = [time for time in times if time is not None]
        if len(known) == len(times) and known == sorted({*known}):
            self._times, self._keyframes = known, keyframes
        return times

    def _in_seconds(self, ticks: Sequence[int | None], time_base: Fraction) -> list[float]:
        """The frames' times after the first. An unknown time, or one that goes back, follows the one before."""
        usual = 1 / (self.fps or 25)
        seconds: list[float] = []
        before: int | None = None
        now = 0.0
        start = (0.0, 0)  # seconds and ticks of the last frame whose ticks went back
        for time in ticks:
            if time is None:
                now = now + usual if seconds else 0.0
            elif before is None or time <= before:
                now = now + usual if seconds else 0.0
                start = (now, time)
            else:
                now = start[0] + float((time - start[1]) * time_base)
            before = time
            seconds.append(now)
        return seconds

    def _decode(self) -> Iterator[VideoFrame]:
        """The frames from the current position to the end, without those of damaged packets.

        Raises:
            FFmpegError: for a damaged packet, where several threads decode.
        """
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except self._error:
                if self._use_threads:
                    raise
                self._num_damaged += 1
                continue
            yield from frames

    def _packets(self) -> Iterator[Packet | None]:
        """The packets from the current position to the end, and one that has the decoder return its last frames."""
        try:
            for packet in self._container.demux(self._stream):
                # The truncated packet would cost the frames before it in the decoder too. Others that FFmpeg marks as
                # corrupt, as where files were concatenated, may well be whole.
                if not packet.is_corrupt or packet_identity(packet) != self._truncated_packet:
                    yield packet
        except self._error:  # the file breaks off
            yield None

    def _get(self, index: int) -> VideoFrame:
        if index not in self.decoded_frames:
            try:
                self._decode_to(index)
            except (self._error, FrameError):
                if not self._use_threads:
                    raise
                self._use_threads = False
                self._open()
                self._decode_to(index)
        return self.decoded_frames[index]

    def _decode_to(self, index: int) -> None:
        """Decode a frame, from the current position or from the keyframe before it, and keep it."""
        keyframe, time = self._keyframes[bisect_right(self._keyframes, index, key=operator.itemgetter(0)) - 1]
        if not keyframe <= self._next <= index:
            self._seek(keyframe, time)
        if not self._go_on_to(index):
            self._open()
            self._go_on_to(index)

    def _seek(self, keyframe: int, time: int) -> None:
        if keyframe == 0:
            self._open()
        else:
            self._container.seek(time, stream=self._stream)
            self._decoder = self._decode()
            self._next = self._first = keyframe

    def _go_on_to(self, index: int) -> bool:
        """Decode from the current position to that frame; False where seeking has missed it."""
        before = self.decoded_frames.get(self._next - 1) if self._next > self._first else None
        for frame in self._decoder:
            current = self._next if self._times is None else self._index_of(frame.pts)
            if current is None or current < self._first:
                continue
            if current > index and before is None and self._first > 0:
                return False
            self._next = current + 1
            self.decoded_frames.add(current, frame)
            if current > index:
                damaged = f"frame {index} of {self._path} is damaged: its neighbour stands in for it"
                warnings.warn(damaged, IncompleteVideoWarning, 2)
                self.decoded_frames.add(index, before or frame)
            if current >= index:
                return True
            before = frame
        if self._first > 0:
            return False
        raise FrameError(f"frame {index} of {self._path} cannot be decoded: it breaks off there")

    def _index_of(self, time: int | None) -> int | None:
        """The frame of that time; None where there is none."""
        assert self._times is not None
        if time is None:
            return None
        index = bisect_left(self._times, time)
        return index if index < len(self._times) and self._times[index] == time else None
