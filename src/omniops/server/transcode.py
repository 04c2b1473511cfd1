"""Videos made such that every browser shows them, frame for frame as ``Frames`` counts them.

H.264 in MP4 with its index in front: yuv420p of limited range, square pixels, even sides, no B-frames, the first frame
at 0. Pictures are turned as the file says. BT.709 and BT.601 stay what they are, all else becomes BT.709: HDR (PQ and
HLG) and wide gamuts by tone mapping of the perceptual intent of FFmpeg's scaler. A video that does not name its matrix
is taken for BT.709 where it is higher than 576, else for BT.601, as players do, and named so. Of alpha the colours
stay. Sound becomes AAC of two channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av

from omniops.sam2.display_matrix import display_orientation
from omniops.server import clips
from omniops.server.errors import ServerError, full_disk_errors
from omniops.server.jobs import Progress
from omniops.server.settings import Settings
from omniops.server.sound import Sound

__all__ = ["Encoding", "Transcoded", "output_size", "transcode"]

_OFFICIAL_WIDTH, _OFFICIAL_HEIGHT = 1280, 720
_OTHERS = ("h264_videotoolbox", "libopenh264", "h264_mf", "h264_nvenc", "h264_qsv", "h264_vaapi")
"""What encodes H.264 where FFmpeg came without x264."""
_HAVE_CRF = ("libx264", "libx264rgb", "libx265", "libvpx", "libvpx-vp9", "libaom-av1", "libsvtav1")
_FINEST = Fraction(1, 90000)
_BT709, _BT601, _UNSPECIFIED, _LIMITED = 1, 6, 2, 1
_KEPT = {1: ("bt709", _BT709), 5: ("smpte170m", _BT601), 6: ("smpte170m", _BT601)}
"""The matrices that stay, as FFmpeg's scaler calls them."""
_SD_HEIGHT = 576
_BT2020_AND_P3 = (9, 11, 12)
"""Primaries of wide gamuts, and below transfer functions of HDR, by the numbers of ITU-T H.273."""
_PQ_AND_HLG = (16, 18)
_PREROLL = 20.0
"""Seconds before the start from which a keyframe is sought, if seeking to the start found a later one."""
_ROUNDED = 1e-5
_MAX_EARLY_SOUND = 1000
"""Frames of sound that are kept until the first picture comes."""


@dataclass(frozen=True)
class Encoding:
    """How videos are written."""

    codec: str = "libx264"
    crf: int = 23
    fps: Fraction | None = Fraction(24)
    """Frames a second; None keeps every frame at its own time."""
    max_width: int = _OFFICIAL_WIDTH
    max_height: int = _OFFICIAL_HEIGHT
    threads: int = 1
    """Of the encoder: x264 writes other bytes for another number of them."""

    @classmethod
    def of(cls, settings: Settings, *, own_times: bool = False) -> Encoding:
        """As the settings say; with the frames' own times by one thread, as the gallery is converted."""
        fps = None if own_times else Fraction(settings.video_encode_fps).limit_denominator(1001)
        size = settings.video_encode_max_width, settings.video_encode_max_height
        threads = 1 if own_times else settings.ffmpeg_num_threads
        return cls(settings.video_encode_codec, settings.video_encode_crf, fps, *size, threads)


class Transcoded(NamedTuple):
    """What was written."""

    frames: int
    width: int
    height: int


class _DecodingError(Exception):
    """A packet that several threads could not decode; the file is decoded again, by one thread."""


def output_size(width: int, height: int, max_width: int, max_height: int) -> tuple[int, int]:
    """Width and height of what is written, both even.

    The official rule bounds the height of what is higher than wide, and the width of all else. The other side is
    bounded too where its bound is not the official one: somebody has set it.
    """
    max_width, max_height = (max(2, side - side % 2) for side in (max_width, max_height))
    ratio = Fraction(width, height)
    is_upright = ratio < 1
    if is_upright:
        out = min(max_height, height) * ratio, Fraction(min(max_height, height))
    else:
        out = Fraction(min(max_width, width)), min(max_width, width) / ratio
    if max_width != _OFFICIAL_WIDTH and out[0] > max_width:
        out = Fraction(max_width), max_width / ratio
    if max_height != _OFFICIAL_HEIGHT and out[1] > max_height:
        out = max_height * ratio, Fraction(max_height)
    return _even(out[0]), _even(out[1])


def transcode(
    source: Path,
    out: Path,
    encoding: Encoding,
    *,
    start: float = 0.0,
    duration: float = math.inf,
    max_pixels: int | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Transcoded:
    """Write ``source`` from ``start`` on, for at most ``duration`` seconds, to ``out``; the same file at every call.

    Args:
        max_pixels: of a frame, where these are bounded.
        threads: how many decode.
        progress: gets the number of frames that are written.

    Raises:
        ServerError: in the official server's words, for what is no video or has no frame there.
        Cancelled: where the job was cancelled. ``out`` is left unfinished then, as after any error.
    """

    def run(count: int) -> Transcoded:
        work = _Transcoding(source, out, encoding, start, duration, progress or Progress("converting"))
        return work.run(count, max_pixels)

    with full_disk_errors("videos"):
        try:
            return run(threads)
        except _DecodingError:  # FFmpeg's threads lose whole frames beside damage
            return run(1)


class _Transcoding:
    """One, from its beginning to its end."""

    def __init__(
        self, source: Path, out: Path, encoding: Encoding, start: float, duration: float, progress: Progress
    ) -> None:
        self._source, self._out, self._encoding, self._progress = source, out, encoding, progress
        self._start, self._duration = start, duration
        self._output: Any = None
        self._sound: Sound | None = None
        self._early: list[Any] = []  # sound that came before the first picture
        self._count = 0
        self._last = -1  # tick

    def run(self, threads: int, max_pixels: int | None) -> Transcoded:
        """Write all. Where seeking finds a frame behind the start, it is repeated with a preroll, then left out."""
        prerolls = (0.0, _PREROLL, None) if self._start > 0 else (None,)
        for preroll in prerolls:
            try:
                with clips.opened(self._source, max_pixels) as (container, stream):
                    if threads > 1:
                        stream.codec_context.thread_count, stream.codec_context.thread_type = threads, "AUTO"
                    if self._copy(container, stream, threads, preroll):
                        break
            finally:
                self._early.clear()
                if self._output is not None:
                    with suppress(Exception):
                        self._output.close()
        if not self._count:
            raise ServerError(clips.EMPTY)
        return Transcoded(self._count, *self._size)

    def _copy(self, container: Any, stream: Any, threads: int, preroll: float | None) -> bool:
        """Write all, after seeking to ``preroll`` seconds before the start, where that is not None.

        Returns:
            False where the first frame after seeking lies behind the start, and nothing was written.
        """
        # Times are sums of ticks, and FFmpeg rounds the beginning of the file to microseconds.
        self._begin = (container.start_time or 0) / 1e6 + self._start - _ROUNDED
        self._end = self._begin + self._duration
        if preroll is not None:
            with suppress(av.FFmpegError):
                container.seek(int(max(0.0, self._begin - preroll) * 1e6), backward=True)
        sound = container.streams.best("audio")
        if sound is not None and (sound.codec_context is None or not sound.codec_context.sample_rate):
            sound = None
        self._input, self._input_sound, self._threads = stream, sound, threads
        self._expect(clips.duration_of(container, stream))
        times = _Timestamps(container, stream)
        converter = None
        is_first = True
        for frame in self._decoded(container):
            begin, end = times.of(frame)
            if is_first and preroll is not None and begin > self._begin + 2 * _ROUNDED:
                return False
            is_first = False
            if begin < self._begin:
                continue
            if converter is None:
                self._open(frame, begin)
                converter = _FrameRateConverter(self._encoding.fps, self._origin, self._end)
            for picture, time in converter.push(frame, begin, end):
                self._write(picture, time)
            if begin >= self._end:
                break
            self._progress.check()
        if converter is None:
            return preroll is None
        for picture, time in converter.flush():
            self._write(picture, time)
        self._close()
        return True

    def _expect(self, duration: float | None) -> None:
        """Tell how many frames will come, where that is known."""
        rate = self._encoding.fps or self._input.average_rate
        seconds = min(self._duration, math.inf if duration is None else max(0.0, duration - self._start))
        self._total = round(seconds * rate) if rate and math.isfinite(seconds) else None

    def _decoded(self, container: Any) -> Iterator[Any]:
        """The pictures; sound is passed on as it comes."""
        streams = [self._input] if self._input_sound is None else [self._input, self._input_sound]
        with suppress(av.FFmpegError):  # where the file breaks off
            for packet in _without_cut_end(container.demux(streams), self._input.index):
                is_sound = packet.stream.index != self._input.index
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    if self._threads > 1 and not is_sound:
                        raise _DecodingError from None
                    continue
                if not is_sound:
                    yield from frames
                    continue
                for frame in frames:
                    self._hear(frame)

    def _hear(self, frame: Any) -> None:
        if self._sound is not None:
            self._mux(self._sound.packets(frame))
        elif self._output is None and len(self._early) < _MAX_EARLY_SOUND:
            self._early.append(frame)

    def _open(self, first: Any, begin: float) -> None:
        """Begin the file with the size of this frame, which is shown at once."""
        self._pictures = _PictureFilter(self._encoding, first, self._input)
        self._size = self._pictures.size
        options = {"movflags": "+faststart"}
        self._output = av.open(f"file:{self._out}", "w", format="mp4", options=options)
        self._stream = _add_video(self._output, self._encoding, self._size, self._input)
        self._pictures.describe(self._stream.codec_context)
        fps = self._encoding.fps
        # What comes late by whole frames comes at once. Of a part of a frame the clock stays the file's own.
        self._origin = begin if fps is None else self._begin + _nearest((begin - self._begin) * fps) / fps
        if self._input_sound is not None:
            self._sound = Sound(self._output, self._origin, self._end)
            for frame in self._early:
                self._mux(self._sound.packets(frame))
            self._early.clear()

    def _write(self, frame: Any, time: Fraction) -> None:
        picture = self._pictures.converted(frame)
        picture.time_base = self._stream.codec_context.time_base
        self._last = picture.pts = max(self._last + 1, round(time / picture.time_base))
        picture.pict_type = 0  # not that of the source, which the encoder would follow
        self._mux(self._stream.encode(picture))
        self._count += 1
        self._progress.update(self._count, self._total)

    def _close(self) -> None:
        self._mux(self._stream.encode(None))
        if self._sound is not None:
            self._mux(self._sound.packets(None))
        self._output.close()

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if not packet.duration and packet.stream is self._stream:
                packet.duration = max(1, round(1 / (self._stream.average_rate or 24) / packet.time_base))
            self._output.mux(packet)


def _without_cut_end(packets: Iterator[Any], index: int) -> Iterator[Any]:
    """The packets without the last of that stream, where it is cut off. Others may seem to be so and are not."""
    doubtful: list[Any] = []
    for packet in packets:
        if packet.stream.index != index:
            yield packet
        elif packet.size and packet.is_corrupt:
            yield from doubtful
            doubtful = [packet]
        else:
            if packet.size:
                yield from doubtful
            doubtful = []
            yield packet


class _Timestamps:
    """When frames are shown, in seconds. Those without times follow the one before; times that start again go on."""

    def __init__(self, container: Any, stream: Any) -> None:
        # AVI has no times: with B-frames FFmpeg gives those of decoding.
        self._has_times = container.format.name != "avi" or not stream.codec_context.has_b_frames
        self._usual = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        self._shift = 0.0
        self._next: float | None = None
        self._last = -math.inf

    def of(self, frame: Any) -> tuple[float, float]:
        """When a frame is shown, and until when."""
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else self._usual
        if frame.pts is None or (self._next is not None and not self._has_times):
            begin = 0.0 if self._next is None else self._next
        else:
            begin = float(frame.pts * frame.time_base) + self._shift
            if begin <= self._last and self._next is not None:
                self._shift += self._next - begin
                begin = self._next
        self._last, self._next = begin, begin + length
        return begin, begin + length


class _FrameRateConverter:
    """Which frame is shown at which tick of a constant rate, as FFmpeg's filter fps has it; or each at its own time."""

    def __init__(self, fps: Fraction | None, origin: float, end: float) -> None:
        self._fps, self._origin, self._end = fps, origin, end
        self._frame: Any = None
        self._tick = 0
        self._until = 0
        self._any = False

    def push(self, frame: Any, begin: float, end: float) -> Iterator[tuple[Any, Fraction]]:
        """Give the frame that comes next. Yields the ones to be written, and when: seconds after the first."""
        if self._fps is None:
            if begin < self._end:
                yield frame, Fraction(begin - self._origin).limit_denominator(10**6)
            return
        tick = self._nearest(min(begin, self._end))
        yield from self._show(tick)
        if begin < self._end:
            self._frame, self._tick = frame, tick
            self._until = self._nearest(min(end, self._end))

    def flush(self) -> Iterator[tuple[Any, Fraction]]:
        """The last frame, as long as it is shown."""
        if self._fps is not None:
            yield from self._show(self._until if self._any else max(self._until, self._tick + 1))

    def _show(self, until: int) -> Iterator[tuple[Any, Fraction]]:
        if self._frame is not None and self._fps is not None:
            for tick in range(self._tick, until):
                self._any = True
                yield self._frame, tick / self._fps
            self._tick = max(self._tick, until)

    def _nearest(self, time: float) -> int:
        assert self._fps is not None
        return _nearest((time - self._origin) * self._fps)


class _PictureFilter:
    """Frames as they are encoded: upright, of one size and in one kind of yuv420p. What comes may change on the way."""

    def __init__(self, encoding: Encoding, first: Any, stream: Any) -> None:
        self._transposed, self._flips = display_orientation(first)
        ratio = stream.sample_aspect_ratio
        shown = clips.shown_size(first.width, first.height, ratio, self._transposed)
        self.size = output_size(*shown, encoding.max_width, encoding.max_height)
        self._codec = stream.codec_context
        self._kind: tuple[Any, ...] | None = None
        self._graph: Any = None
        self._last: tuple[Any, Any] | None = None
        self._matrix, self._tag = _KEPT.get(_matrix_of(first), _KEPT[_BT709])
        self._maps = int(self._codec.color_trc) in _PQ_AND_HLG or int(self._codec.color_primaries) in _BT2020_AND_P3

    def describe(self, context: Any) -> None:
        """Say in the file what its numbers stand for."""
        context.colorspace, context.color_range = self._tag, _LIMITED
        named = (int(self._codec.color_primaries), int(self._codec.color_trc))
        context.color_primaries, context.color_trc = (
            _BT709 if self._maps or number == _UNSPECIFIED else number for number in named
        )

    def converted(self, frame: Any) -> Any:
        """A frame as it is encoded; the same for the same."""
        if self._last is not None and self._last[0] is frame:
            return self._last[1]
        matrix = frame.colorspace = _matrix_of(frame)
        colour = (int(frame.color_primaries), int(frame.color_trc))
        kind = (frame.width, frame.height, frame.format.name, matrix, int(frame.color_range), *colour)
        if kind != self._kind:
            self._graph, self._kind = self._new_graph(frame, matrix), kind
        self._graph.push(frame)
        picture = self._graph.pull()
        self._last = (frame, picture)
        return picture

    def _new_graph(self, frame: Any, matrix: int) -> Any:
        width, height = self.size[::-1] if self._transposed else self.size
        colours = f"out_color_matrix={self._matrix}:out_range=limited"
        if self._maps:
            colours += ":out_primaries=bt709:out_transfer=bt709:intent=perceptual"
        graph = av.filter.Graph()
        source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base=str(frame.time_base),
            pixel_aspect="1/1",
            colorspace=str(matrix),
            range=str(int(frame.color_range)),
        )
        nodes = [
            source,
            graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd+full_chroma_int:{colours}"),
            graph.add("format", "yuv420p"),
        ]
        if self._transposed:
            nodes.append(graph.add("transpose", "cclock_flip"))  # rows and columns change places
        nodes += [graph.add(name) for name, flip in zip(("vflip", "hflip"), self._flips, strict=True) if flip.step]
        nodes += [graph.add("setsar", "1"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph


def _matrix_of(frame: Any) -> int:
    """That of a frame, or the one that it is taken to have, by its number in ITU-T H.273."""
    matrix = int(frame.colorspace)
    if matrix != _UNSPECIFIED or frame.format.is_rgb:
        return matrix
    return _BT709 if frame.height > _SD_HEIGHT else _BT601


def _add_video(output: Any, encoding: Encoding, size: tuple[int, int], source: Any) -> Any:
    codec = _encoder(encoding.codec)
    own = Fraction(source.average_rate or source.guessed_rate or 25)
    rate = encoding.fps or min(Fraction(240), max(Fraction(1), own)).limit_denominator(1001)
    stream = output.add_stream(codec, rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = encoding.threads
    context.max_b_frames = 0
    context.gop_size = max(1, round(rate))  # a second: what is scrubbed through is near
    context.time_base = 1 / rate if encoding.fps else _FINEST
    context.sample_aspect_ratio = Fraction(1)
    if codec in _HAVE_CRF:
        stream.options = {"crf": str(encoding.crf)} | ({"preset": "veryfast"} if codec.startswith("libx26") else {})
    else:
        context.bit_rate = int(size[0] * size[1] * rate / 8)
    return stream


def _encoder(wanted: str) -> str:
    """The codec that was asked for, or one that writes H.264 too."""
    found = next((codec for codec in (wanted, "libx264", *_OTHERS) if codec in av.codecs_available), None)
    if found is None:
        raise ServerError("This server cannot write videos: its FFmpeg has no encoder of H.264.", 501)
    return found


def _even(side: Fraction) -> int:
    pixels = max(1, int(side))
    return pixels + pixels % 2


def _nearest(value: float | Fraction) -> int:
    """Half a tick goes up."""
    # Times are sums of floats: what is meant to be half a tick may be less by their rounding.
    return math.floor(float(value) + 0.5 + 1e-6)
