"""Cameras, network streams and pipes, read by PyAV."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from omniops.sam2.display_matrix import display_orientation
from omniops.sam2.frame_reader import FrameError
from omniops.sam2.rgb_conversion import RGBConverter
from omniops.sam2.video_container import main_video_stream

if TYPE_CHECKING:
    from av import VideoFrame

PROTOCOLS = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
DEVICE_FORMATS = ("avfoundation", "decklink", "dshow", "gdigrab", "lavfi", "v4l2", "x11grab")
"""Of FFmpeg's input devices, those with pictures."""
_CAMERAS = {"Linux": "v4l2:/dev/video{}", "Darwin": "avfoundation:{}"}
_TIMEOUT = 10.0
"""Seconds until a stream that cannot be reached, or has fallen silent, is an error."""
_OPTIONS = {
    "protocol_whitelist": ",".join((*PROTOCOLS, "crypto", "httpproxy", "srtp", "tls")),  # no files of this machine
    "rtsp_transport": "tcp",  # a packet that UDP loses damages every frame until the next keyframe
}


def is_stream(source: str) -> bool:
    """Whether it names a stream or a device, and not a file that is there."""
    return _split(source) is not None and not Path(source).exists()


def open_stream(source: int | str | BinaryIO) -> Iterator[NDArray[np.uint8]]:
    """The frames of a camera by its number, of a URL or ``FORMAT:DEVICE``, or of an open binary file.

    They are (H, W, 3), RGB, turned as the video's metadata say.

    Raises:
        ImportError: without PyAV.
        ValueError: where it cannot be opened.
        FrameError: from the iterator, where it breaks off.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading a live video needs PyAV ({error}): pip install 'omniops[sam2]'") from error
    name, arguments = _arguments(source)
    try:
        container = av.open(**arguments)
        try:
            stream = main_video_stream(container)
        except BaseException:
            container.close()
            raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{name} cannot be opened as a live video: {reason}") from None
    stream.thread_type = "SLICE"  # threads that decode a frame each would keep frames back
    return _frames(container, stream, name)


def _frames(container: Any, stream: Any, name: str) -> Iterator[NDArray[np.uint8]]:
    import av

    converter = RGBConverter()
    orientation = None
    with container:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.EOFError:
                return
            except av.FFmpegError as error:
                raise FrameError(f"{name} breaks off: {error.strerror}") from None
            if packet is None:
                return
            try:
                frames: list[VideoFrame] = packet.decode()
            except av.FFmpegError:  # a damaged packet, after which others come
                continue
            for frame in frames:
                if orientation is None:
                    orientation = display_orientation(frame)
                rgb = converter.convert(frame, frame.width, frame.height)
                yield np.ascontiguousarray(orientation.apply(rgb))


def _arguments(source: int | str | BinaryIO) -> tuple[str, dict[str, Any]]:
    """What it is called in errors, and the arguments of ``av.open``."""
    if not isinstance(source, (int, str)):
        return "the file", {"file": source}
    if isinstance(source, int):
        if platform.system() not in _CAMERAS:
            raise ValueError(f"camera {source} needs its name on {platform.system()}: 'dshow:video=NAME'")
        name, source = f"camera {source}", _CAMERAS[platform.system()].format(source)
    else:
        name = source
    split = _split(source)
    if split is None:
        known = f"{', '.join(PROTOCOLS)} with ://, or {', '.join(DEVICE_FORMATS)} with : and a device"
        raise ValueError(f"{source} is no live video: one begins with {known}")
    if split[0] in DEVICE_FORMATS:
        return name, {"file": split[1], "format": split[0]}
    return name, {"file": source, "options": _OPTIONS, "timeout": _TIMEOUT}


def _split(source: str) -> tuple[str, str] | None:
    """The protocol or the device's format, and what follows."""
    match = re.fullmatch(r"([a-z0-9]+):(//)?(.+)", source, re.DOTALL)
    if match is None:
        return None
    is_known = match[1] in (PROTOCOLS if match[2] else DEVICE_FORMATS)
    return (match[1], match[3]) if is_known else None
