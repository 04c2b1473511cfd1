"""Video files of every kind, as tests of the server write them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 64, 48


def picture(t: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A square that moves, and a bar that grows: like no other frame's, and unlike its mirror's."""
    image = np.full((height, width, 3), (40, 90, 160), np.uint8)
    image[10:30, 2 * t : 2 * t + 16] = (230, 40, 30)
    image[-6:, : 3 * t] = 255
    return image


def shown(image: np.ndarray, count: int = 20) -> int:
    """The t whose picture it is."""
    height, width = image.shape[:2]
    return min(range(count), key=lambda t: np.abs(image.astype(int) - picture(t, width, height)).mean())


def write_clip(
    path: Path,
    count: int = 6,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    rate: int = 24,
    times: Sequence[float] | None = None,
    ratio: Fraction | None = None,
    options: dict[str, str] | None = None,
    beep: float | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> Path:
    """Frames of ``picture``, and where ``beep`` is given, sound that is silent but for a tenth of a second from there.

    Args:
        times: when each frame is shown, in seconds.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.bit_rate = 2_000_000
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = (
            container.add_stream("aac" if path.suffix != ".webm" else "libopus", rate=48000)
            if beep is not None
            else None
        )
        for t in range(len(pictures) if pictures is not None else count):
            frame = av.VideoFrame.from_ndarray(picture(t, *size) if pictures is None else pictures[t], "rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = round(times[t] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if beep is not None:
            container.mux(encode_beep(sound, beep, count / rate))
    return path


def encode_beep(sound, begin: float, seconds: float) -> list:
    import av

    times = np.arange(int(48000 * seconds)) / 48000
    samples = (np.sin(2 * np.pi * 1000 * times) * ((times >= begin) & (times < begin + 0.1))).astype(np.float32)
    packets = []
    for i in range(0, len(samples), 960):
        part = np.repeat(samples[None, i : i + 960], 2, axis=0)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", "stereo")
        frame.sample_rate, frame.pts = 48000, i
        packets += sound.encode(frame)
    return packets + sound.encode(None)


def beep_of(path: Path) -> float:
    """When the sound of a file begins to be heard, in seconds."""
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.1)
            if len(loud):
                return float(frame.pts * frame.time_base) + loud[0] / frame.sample_rate
    raise AssertionError("there is no sound")


def turn(path: Path, matrix: tuple[int, ...]) -> None:
    """Set a, b, c and d of the display matrix of an MP4 file, ISO/IEC 14496-12, 8.3.2."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    offset = data.index(b"tkhd") + 44
    data[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
