"""What people's own video files have: mirrors, colours, seams, ends that are missing, names, many small frames."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="videos need PyAV")

import av

from omniops.sam2.frames import Colour, Frames, IncompleteVideoWarning

HEIGHT, WIDTH, COUNT = 48, 64, 20
B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:keyint=6:scenecut=0"}
NO_B_FRAMES = {"x264-params": "bframes=0:keyint=6:scenecut=0"}


def picture(t: int) -> np.ndarray:
    """A square that moves, and a bar that grows: like no other frame's, and unlike its mirror's."""
    image = np.full((HEIGHT, WIDTH, 3), (40, 90, 160), np.uint8)
    image[10:30, 2 * t : 2 * t + 16] = (230, 40, 30)
    image[-6:, : 3 * t] = 255
    return image


def shown(image: np.ndarray) -> int:
    """The t whose picture it is."""
    return min(range(COUNT), key=lambda t: np.abs(image.astype(int) - picture(t)).mean())


def write(path: Path, codec="libx264", *, options=None, ratio=None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 6
        stream.codec_context.bit_rate = 2_000_000
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        for t in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), "rgb24")))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: tuple[int, ...]) -> None:
    """Set a, b, c and d of the display matrix of an MP4 file, ISO/IEC 14496-12, 8.3.2."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    offset = data.index(b"tkhd") + 44
    data[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def pyav_decodes(path: Path) -> int:
    with av.open(str(path)) as container:
        return len(list(container.decode(video=0)))


# What ffmpeg's autorotation does: hflip, vflip and the four directions of its filter transpose.
MATRICES = {
    "nothing": ((1, 0, 0, 1), lambda image: image),
    "90 clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "180": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "90 counterclockwise": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "hflip": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "vflip": ((1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "transposed along the other diagonal": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
    "zeros": ((0, 0, 0, 0), lambda image: image),
}


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrices(tmp_path, name):
    matrix, expected = MATRICES[name]
    path = write(tmp_path / "video.mp4", ratio=Fraction(4, 3))
    turn(path, matrix)
    frames = Frames(path)
    rotated = expected(picture(5))
    assert frames[5].shape == (frames.height, frames.width, 3) == rotated.shape
    assert np.abs(frames[5].astype(int) - rotated).mean() < 5
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(rotated)).resize((32, 32)))
    assert np.abs(frames.resized(5, 32).astype(int) - resized).mean() < 8
    assert frames.sample_aspect_ratio == (Fraction(4, 3) if matrix[0] or not any(matrix) else Fraction(3, 4))


LUMA = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
LUMA |= {4: (0.3, 0.11), 9: (0.2627, 0.0593)}
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 60, 30), (255, 255, 255), (0, 0, 0)]


def as_yuv(rgb, matrix: int, full: bool) -> list[float]:
    """ITU-T H.273, 8.3."""
    of_red, of_blue = LUMA[matrix]
    red, green, blue = (value / 255 for value in rgb)
    y = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    u, v = (blue - y) / 2 / (1 - of_blue), (red - y) / 2 / (1 - of_red)
    return [255 * y, 128 + 255 * u, 128 + 255 * v] if full else [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
def test_colours_are_those_that_the_file_means(tmp_path, matrix, full):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full else 1
        context.color_primaries, context.color_trc = 9, 16
        for i, colour in enumerate(COLOURS):
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
            for plane, value in zip(frame.planes, as_yuv(colour, matrix, full), strict=True):
                plane.update(bytes([int(np.clip(round(value), 0, 255))]) * plane.buffer_size)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = Frames(path)
    assert frames.colour == Colour(9, 16, matrix, full)
    for i, colour in enumerate(COLOURS):
        for shown_as in (frames[i], frames.resized(i, 32)):
            assert np.abs(shown_as[10, 10].astype(int) - colour).max() <= 3


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", B_FRAMES), ("libx264", NO_B_FRAMES), ("mpeg2video", None)], ids=str
)
def test_files_put_one_behind_the_other(tmp_path, codec, options):
    once = write(tmp_path / "once.ts", codec, options=options)
    twice = tmp_path / "twice.ts"
    twice.write_bytes(once.read_bytes() * 2)
    frames = Frames(twice)
    expected = [*range(COUNT), *range(COUNT)]
    assert len(frames) == pyav_decodes(twice) == 2 * COUNT
    assert [shown(frame) for frame in frames] == expected
    assert [shown(frames[i]) for i in (39, 3, 20, 19, 0)] == [19, 3, 0, 19, 0]
    assert frames.times == pytest.approx([i / 25 for i in range(2 * COUNT)], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "codec"), [("v.mkv", "libx264"), ("v.webm", "libvpx-vp9"), ("v.flv", "flv"), ("v.mxf", "mpeg2video")]
)
def test_files_that_are_cut_off_say_so(tmp_path, name, codec):
    path = write(tmp_path / name, codec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Frames(path)) == COUNT
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.warns(UserWarning, match=rf"{name} breaks off after \d+ frames") as caught:
        frames = Frames(path)
    assert caught[0].filename == __file__
    assert 0 < len(frames) < COUNT
    assert len(frames) in (pyav_decodes(path), pyav_decodes(path) - 1)  # the last may be half a frame
    assert [shown(frame) for frame in frames] == list(range(len(frames)))


def test_sound_that_is_longer_than_the_pictures_is_no_cut(tmp_path):
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000)
        for t in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), "rgb24")))
        container.mux(stream.encode())
        for i in range(20):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 8000, 800 * i
            container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Frames(path)) == 3


NAMES = [
    "rec-12:30.mp4",
    "-x.mp4",
    "a%03d.mp4",
    "a%03d.jpg",
    "a?b#c.mp4",
    "a\nb.mp4",
    "http:x.mp4",
    "[1]*.png",
    "\udcff",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_will_do(tmp_path, monkeypatch, name):
    shutil.copy(write(tmp_path / "video.mp4"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, os.fsencode(name), tmp_path / name):
        assert shown(Frames(path)[7]) == 7


def test_times_and_rate(tmp_path):
    path = tmp_path / "video.mkv"
    times = [1000 + 40 * t + 7 * t * t for t in range(COUNT)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=B_FRAMES)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(COUNT):
            frame = av.VideoFrame.from_ndarray(picture(t), "rgb24")
            frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = Frames(path)
    assert frames.times == pytest.approx([(time - 1000) / 1000 for time in times])
    assert frames.time_base == Fraction(1, 1000)
    assert Frames(write(tmp_path / "bare.h264", options=B_FRAMES)).times == pytest.approx(
        [t / 25 for t in range(COUNT)], abs=1e-3
    )


GROWTH = """
import sys
from pathlib import Path
from omniops.sam2.video_file import VideoFile

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

video = VideoFile(Path(sys.argv[1]))
video.frame(0), video.resized(0, 256)
before = resident()
for i in range(len(video)):
    video.frame(i), video.resized(i, 256)
print(len(video.decoded_frames), resident() - before, video.nbytes)
"""


BACK_AND_FORTH = """
import sys
from pathlib import Path
from omniops.sam2 import decoded_frames
from omniops.sam2.video_file import VideoFile

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

decoded_frames.MAX_DECODED_BYTES = int(sys.argv[2])
video = VideoFile(Path(sys.argv[1]))
video.frame(0)
before = resident()
for _ in range(3):
    for i in range(len(video)):
        video.frame(i)
print(len(video.decoded_frames), resident() - before, video.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux")
def test_large_frames_take_the_memory_that_is_allowed_from_the_beginning_again(tmp_path):
    path = tmp_path / "video.mp4"
    width, height = 1280, 720
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(120):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([i]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    allowed = 80 * 2**20
    command = [sys.executable, "-c", BACK_AND_FORTH, path, str(allowed)]
    kept, grown, counted = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 40 < kept < 60
    assert counted <= allowed
    assert grown <= allowed + 24 * 2**20  # what the decoder holds besides


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux")
@pytest.mark.parametrize("size", [(32, 32), pytest.param((160, 128), marks=pytest.mark.slow)], ids=str)
def test_many_small_frames_take_the_memory_that_is_counted(tmp_path, size):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(1500):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), i % 250, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    run = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True)
    kept, grown, counted = map(int, run.stdout.split())
    assert kept == 1500
    assert grown <= counted + 16 * 2**20  # what the allocator and the decoder have besides


def write_at(path: Path, codec: str, ticks: list[int]) -> Path:
    """Frames at these 25ths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=B_FRAMES if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(t), "rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_that_an_edit_list_leaves_out_are_no_cut(tmp_path):
    path = write_at(tmp_path / "video.mp4", "libx264", list(range(-8, 12)))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == COUNT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = Frames(path)
    assert len(frames) == pyav_decodes(path) == 12
    assert [shown(frame) for frame in frames] == list(range(8, 20))


def test_repetitions_in_avi_are_no_cut(tmp_path):
    ticks = [0, 1, 2, 7, 8, 20, 21, 22]
    path = write_at(tmp_path / "video.avi", "mpeg4", ticks)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 23
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = Frames(path)
    assert frames.times == pytest.approx([tick / 25 for tick in ticks])
    assert [shown(frame) for frame in frames] == list(range(8))


@pytest.mark.parametrize("name", ["video.mp4", "video.avi"])
def test_a_file_that_is_cut_off_between_two_frames(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w", options={"movflags": "faststart"} if name == "video.mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=25, options=B_FRAMES if name == "video.mp4" else NO_B_FRAMES)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), "rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    for count in (COUNT - 1, 10):
        path.write_bytes(content[: positions[count]])
        with pytest.warns(IncompleteVideoWarning, match=rf"{name} breaks off after {count} of 20 frames"):
            assert len(Frames(path)) == count


def test_covers_are_no_videos(tmp_path):
    def add(container, codec, layout):
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, layout
        return stream

    def encode(container, stream, count):
        for t in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), "rgb24")))
        container.mux(stream.encode())

    for name in ("cover.mp4", "first.mkv", "alone.mp4"):
        with av.open(str(tmp_path / name), "w") as container:
            cover = add(container, "mjpeg", "yuvj420p")
            if name.endswith(".mp4"):
                cover.disposition = av.stream.Disposition.attached_pic
            second = add(container, "libx264", "yuv420p") if name != "alone.mp4" else None
            sound = container.add_stream("pcm_s16le" if name == "first.mkv" else "aac", rate=8000)
            sound.layout = "mono"
            encode(container, cover, 1)
            if second is not None:
                encode(container, second, 9)
    for name in ("cover.mp4", "first.mkv"):
        assert [shown(frame) for frame in Frames(tmp_path / name)] == list(range(9))
    with pytest.raises(ValueError, match=r"alone.mp4 is not a video .*: it has a cover and no video"):
        Frames(tmp_path / "alone.mp4")


def test_a_codec_that_is_not_known(tmp_path):
    path = write(tmp_path / "video.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"Zqzz"))
    with pytest.raises(ValueError, match=r"video.mp4 is not a video .*: it is in a codec that this FFmpeg does not"):
        Frames(path)
