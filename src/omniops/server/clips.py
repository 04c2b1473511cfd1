"""Video files as they come: opened without trusting them, and their sizes, rates and durations.

A file that someone sends may be a playlist, which FFmpeg would follow to any file and address. So it is opened as an
object, by formats that hold their own data, with no protocol allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.stream import Disposition

from omniops.sam2.display_matrix import display_orientation
from omniops.server.errors import ServerError

_FORMATS = (
    *("3gp", "asf", "avi", "av1", "dv", "flv", "gif", "h264", "hevc", "ivf", "m4v", "matroska", "webm", "mjpeg", "mov"),
    *("mp4", "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "obu", "ogg", "rm", "vc1", "wtv", "yuv4mpegpipe"),
)
"""FFmpeg's names of those that refer to no other file."""
NOT_VALID = "not valid video file"
NO_STREAM = "video container does not contain a video stream"
NO_SIZE = "video container does not contain width or height metadata"
NO_DURATION = "video container does time duration metadata"
EMPTY = "transcode produced empty video; check seek time or your input video"
"""In the official server's words, all of them."""
_FIRST_PACKETS = 48


class Clip(NamedTuple):
    """What a video file is."""

    width: int
    height: int
    """Pixels as they are shown: turned, and square."""
    frames: int
    """As its header says."""
    fps: float | None
    duration: float | None
    """Seconds, as its header says."""
    is_plain: bool
    """Whether all browsers show all of its frames, at their own times, as they are."""


@contextmanager
def opened(path: Path, max_pixels: int | None = None) -> Iterator[tuple[Any, Any]]:
    """The container and its main video, to be decoded by one thread unless that is changed.

    Raises:
        ServerError: in the official server's words, for what is no video.
    """
    options = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "none"}
    with path.open("rb", buffering=0) as file:
        try:
            container = av.open(_Nameless(file), options=options, buffer_size=2**18, metadata_errors="ignore")
        except (av.FFmpegError, OSError, ValueError):
            raise ServerError(NOT_VALID) from None
        try:
            yield container, _main_video(container, max_pixels)
        finally:
            container.close()


def look(path: Path, max_pixels: int | None = None) -> Clip:
    """What a video file is, by its header and its first frame.

    Raises:
        ServerError: in the official server's words, for what is no video.
    """
    with opened(path, max_pixels) as (container, stream):
        first, starts_at_once = _first(container, stream)
        if first is None:
            raise ServerError(EMPTY)
        transposed, flips = display_orientation(first)
        width, height = shown_size(first.width, first.height, stream.sample_aspect_ratio, transposed)
        is_upright = not transposed and all(flip.step is None for flip in flips)
        plain = starts_at_once and is_upright and (width, height) == (stream.width, stream.height)
        rate = stream.average_rate or stream.guessed_rate
        return Clip(
            width,
            height,
            stream.frames,
            float(rate) if rate else None,
            duration_of(container, stream),
            plain and _is_h264_in_mp4(container, stream) and _has_every_frame(stream, path.stat().st_size),
        )


def shown_size(width: int, height: int, ratio: Fraction | None, transposed: bool) -> tuple[int, int]:
    """Width and height in square pixels, upright; ``ratio`` is that of a stored pixel's sides."""
    if ratio and Fraction(1, 16) <= ratio <= 16:
        width = max(1, round(width * ratio))
    return (height, width) if transposed else (width, height)


def duration_of(container: Any, stream: Any) -> float | None:
    """Seconds that a file says it has."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


class _Nameless:
    """A file that FFmpeg reads from, without its real name, by which it would choose a format."""

    name = "video"

    def __init__(self, file: Any) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _main_video(container: Any, max_pixels: int | None) -> Any:
    videos = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
    if not videos:
        raise ServerError(NO_STREAM)
    best = container.streams.best("video")
    stream = best if best in videos else videos[0]
    codec = stream.codec_context
    if codec is None:
        raise ServerError(NOT_VALID)
    if not codec.width or not codec.height:
        raise ServerError(NO_SIZE)
    if max_pixels is not None:
        if codec.width * codec.height > max_pixels:
            raise too_many_pixels(codec.width, codec.height, max_pixels)
        codec.options = {"max_pixels": str(max_pixels)}
    codec.thread_count = 1
    return stream


def too_many_pixels(width: int, height: int, max_pixels: int) -> ServerError:
    """The error of a frame with more pixels than ``max_pixels``."""
    return ServerError(
        f"It has {width} x {height} pixels, more than the {max_pixels / 1e6:.0f} million that are taken.", 413
    )


def _first(container: Any, stream: Any) -> tuple[Any, bool]:
    """The first frame, and whether no frame is shown before the beginning."""
    begins = []
    frame = None
    try:
        for packet in container.demux(stream):
            if packet.pts is not None:
                begins.append(packet.pts)
            if frame is None:
                frame = next(iter(stream.decode(packet)), None)
            if frame is not None and len(begins) >= _FIRST_PACKETS:
                break
    except av.FFmpegError:
        pass
    return frame, bool(begins) and min(begins) >= 0


def _is_h264_in_mp4(container: Any, stream: Any) -> bool:
    codec = stream.codec_context
    return bool(
        "mp4" in container.format.name.split(",")
        and codec.codec.canonical_name == "h264"
        and codec.pix_fmt == "yuv420p"
        and len(container.streams.video) == 1
    )


def _has_every_frame(stream: Any, size: int) -> bool:
    """Whether the header lists all frames, each of which is shown and lies in the file."""
    entries = stream.index_entries
    listed = 0 < stream.frames == len(entries)
    return listed and all(not entry.is_discard and entry.pos + entry.size <= size for entry in entries)


def first_picture(path: Path) -> Any:
    """The first frame of a plain clip as Pillow's picture, (W, H) as it is shown.

    Raises:
        ServerError: for what is no video.
    """
    with opened(path) as (container, stream):
        frame, _ = _first(container, stream)
        if frame is None:
            raise ServerError(EMPTY)
        return frame.to_image()
