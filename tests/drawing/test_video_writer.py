"""Videos as they are written: read again, whole and cut."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av", reason="videos need PyAV")

import av

from omniops.drawing import VideoWriter, video_writer
from omniops.sam2.frames import Colour, Frames

HEIGHT, WIDTH = 48, 64


def grey(value: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), value, np.uint8)


def like(**said) -> SimpleNamespace:
    """What the writer asks of ``Frames``."""
    nothing = {"fps": 25.0, "times": [0.0], "time_base": Fraction(1, 1000), "sample_aspect_ratio": Fraction(1)}
    return SimpleNamespace(**{**nothing, "colour": None, **said})


def values(path) -> list[int]:
    """Of grey frames, to the next ten."""
    return [round(int(frame[20, 20, 1]), -1) for frame in Frames(path)]


@pytest.mark.parametrize("has_x264", [True, False])
@pytest.mark.parametrize("clock", [Fraction(1, 1000), Fraction(1, 90000), Fraction(1001, 30000)])
def test_times_are_kept(tmp_path, monkeypatch, clock, has_x264):
    if not has_x264:
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    ticks = [0, 1, 3, 7, 8, 20, 21, 40]
    times = [7.5 + float(tick * clock * (1 if clock > Fraction(1, 100) else Fraction(1, 40) / clock)) for tick in ticks]
    with VideoWriter(tmp_path / "v.mp4", like=like(time_base=clock)) as writer:
        for i, time in enumerate(times):
            writer.write(grey(10 * i), time)
    frames = Frames(tmp_path / "v.mp4")
    assert frames.times == pytest.approx([time - 7.5 for time in times], abs=2e-5)
    assert values(tmp_path / "v.mp4") == [10 * i for i in range(8)]
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].codec.canonical_name == ("h264" if has_x264 else "mpeg4")
        assert container.streams.video[0].frames == 8


@pytest.mark.parametrize("fps", [24000 / 1001, 30000 / 1001, 25, 12.5])
def test_without_times_the_rate_is_kept(tmp_path, fps):
    with VideoWriter(tmp_path / "v.mp4", fps=fps) as writer:
        for i in range(10):
            writer.write(grey(i))
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(fps).limit_denominator(1001)
        assert container.duration == pytest.approx(10 / fps * 1e6, abs=200)


def test_times_that_do_not_go_on(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", like=like()) as writer:
        for i, time in enumerate([1.0, 1.0, 0.5, 1.2]):
            writer.write(grey(50 * i), time)
    assert Frames(tmp_path / "v.mp4").times == pytest.approx([0, 0.001, 0.002, 0.2])
    assert values(tmp_path / "v.mp4") == [0, 50, 100, 150]


@pytest.mark.parametrize("has_x264", [True, False])
def test_pixels_keep_their_shape(tmp_path, monkeypatch, has_x264):
    if not has_x264:
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with VideoWriter(tmp_path / "v.mp4", like=like(sample_aspect_ratio=Fraction(16, 11))) as writer:
        writer.write(grey(0))
    assert Frames(tmp_path / "v.mp4").sample_aspect_ratio == Fraction(16, 11)


RED = (200, 60, 30)
LUMA = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
LUMA |= {4: (0.3, 0.11), 9: (0.2627, 0.0593)}


def as_yuv(rgb, matrix: int, full: bool) -> list[float]:
    """ITU-T H.273, 8.3."""
    of_red, of_blue = LUMA[matrix]
    red, green, blue = (value / 255 for value in rgb)
    y = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    u, v = (blue - y) / 2 / (1 - of_blue), (red - y) / 2 / (1 - of_red)
    return [255 * y, 128 + 255 * u, 128 + 255 * v] if full else [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
def test_colours_are_kept_and_so_are_their_numbers(tmp_path, matrix, full):
    colour = Colour(9, 16, matrix, full)
    with VideoWriter(tmp_path / "v.mp4", like=like(colour=colour)) as writer:
        for _ in range(2):
            writer.write(np.broadcast_to(np.array(RED, np.uint8), (HEIGHT, WIDTH, 3)))
    frames = Frames(tmp_path / "v.mp4")
    assert frames.colour == colour
    assert np.abs(frames[1][20, 20].astype(int) - RED).max() <= 4
    with av.open(str(tmp_path / "v.mp4")) as container:
        frame = next(container.decode(video=0))
    stored = [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes]
    assert stored == pytest.approx(as_yuv(RED, matrix, full), abs=2.5)


@pytest.mark.parametrize("source", [None, like(colour=None), like(colour=Colour(1, 13, 0, False))])
def test_pictures_are_written_as_srgb_in_bt_709(tmp_path, source):
    with VideoWriter(tmp_path / "v.mp4", like=source) as writer:
        writer.write(np.broadcast_to(np.array(RED, np.uint8), (HEIGHT, WIDTH, 3)))
    frames = Frames(tmp_path / "v.mp4")
    assert frames.colour == Colour(1, 13, 1, False)
    assert np.abs(frames[0][20, 20].astype(int) - RED).max() <= 4


def test_a_video_that_is_read_and_written_keeps_all_of_it(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", like=like(sample_aspect_ratio=Fraction(4, 3))) as writer:
        for i in range(12):
            writer.write(grey(10 * i), i * i / 100)
    first = Frames(tmp_path / "a.mp4")
    with VideoWriter(tmp_path / "b.mp4", like=first) as writer:
        for frame, time in zip(first, first.times, strict=True):
            writer.write(frame, time)
    second = Frames(tmp_path / "b.mp4")
    for name in ("times", "sample_aspect_ratio", "colour", "height", "width"):
        assert getattr(second, name) == getattr(first, name)


@pytest.mark.parametrize(
    "name", ["rec-12:30.mp4", "-x.mp4", "a%03d.mp4", "a?b#c.mp4", "a\nb.mp4", "http:x.mp4", "v.png"]
)
def test_any_name_will_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        with VideoWriter(path) as writer:
            writer.write(grey(100))
        assert os.listdir(tmp_path) == [name]
        assert values(path) == [100]
        os.unlink(path)


def test_a_copy_taken_on_the_way_has_all_frames_but_the_last(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4", like=like())
    for i in range(20):
        writer.write(grey(10 * i), i / 25)
        shutil.copy(tmp_path / "v.mp4", tmp_path / "copy.mp4")
        if i:
            assert values(tmp_path / "copy.mp4") == [10 * j for j in range(i)]
    writer.close()
    assert values(tmp_path / "v.mp4") == [10 * j for j in range(20)]


def test_a_file_that_is_given_up_has_all_frames_but_the_last(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4")
    for i in range(6):
        writer.write(grey(40 * i))
    writer.abort()
    assert values(tmp_path / "v.mp4") == [0, 40, 80, 120, 160]


def test_a_process_that_is_killed_leaves_what_it_had_written(tmp_path):
    code = """
import os, signal, sys
import numpy as np
from omniops.drawing import VideoWriter
writer = VideoWriter(sys.argv[1])
for i in range(9):
    writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "v.mp4"], check=False).returncode == -9
    assert values(tmp_path / "v.mp4") == [20 * i for i in range(8)]


@pytest.mark.parametrize("call", [1, 2, 4, 6, 8])
def test_an_interrupt_while_it_writes_loses_no_byte(tmp_path, monkeypatch, call):
    write, calls = video_writer._Output.write, []

    def interrupted(self, data):
        calls.append(data)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(video_writer._Output, "write", interrupted)
    writer, written = VideoWriter(tmp_path / "v.mp4"), []

    def write_all():
        for value in (0, 40, 80, 120, 160, 200):
            written.append(value)
            writer.write(grey(value))
        writer.close()

    with pytest.raises(KeyboardInterrupt):
        write_all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    writer.close()
    assert values(tmp_path / "v.mp4") == written


class _SmallDisk:
    """A file on a disk with so much room, which is used up to the last byte."""

    def __init__(self, file, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data) -> int:
        left = self._room - self._file.tell()
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data[:left])

    def __getattr__(self, name):
        return getattr(self._file, name)


def _write_noise(writer: VideoWriter, written: list[int]) -> None:
    noise = np.random.default_rng(0)
    for i in range(6):
        writer.write(noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        written.append(i)
    writer.close()


def test_a_disk_that_is_full_at_any_byte_leaves_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "v.mp4"
    _write_noise(VideoWriter(path), [])
    size = path.stat().st_size
    for room in (*range(0, size, 301), *range(size - 1000, size, 97)):

        def opened(*args, room=room, **more):
            return _SmallDisk(open(*args, **more), room)

        monkeypatch.setattr(video_writer, "open", opened, raising=False)
        writer, written = VideoWriter(path), []
        with pytest.raises(OSError, match=r"^cannot write .*v.mp4: No space left on device$") as caught:
            _write_noise(writer, written)
        assert caught.value.errno == errno.ENOSPC
        writer.close()
        if len(written) > 1:
            with av.open(str(path)) as container:
                assert len(list(container.decode(video=0))) >= len(written) - 1


def test_files_that_cannot_be_written(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none" / "v.mp4", "No such file or directory")):
        with pytest.raises(OSError, match=f"cannot write {path}: {why}"):
            VideoWriter(path).write(grey(0))


def test_frames_of_different_sizes(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4")
    writer.write(grey(0))
    with pytest.raises(ValueError, match=r"frames must be of one size, got \(10, 64, 3\) after \(48, 64, 3\)"):
        writer.write(grey(0)[:10])
    writer.close()


def test_a_pipe_can_be_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    with VideoWriter(tmp_path / "pipe") as writer:
        for i in range(5):
            writer.write(grey(20 * i))
    reader.join()
    (tmp_path / "v.mp4").write_bytes(read[0])
    assert values(tmp_path / "v.mp4") == [20 * i for i in range(5)]


def test_nothing_is_there_before_the_first_frame(tmp_path):
    with VideoWriter(tmp_path / "v.mp4"):
        pass
    assert not os.listdir(tmp_path)


def as_rgba(path) -> tuple[np.ndarray, list[float]]:
    """Frames of a VP9 file with their transparency, which FFmpeg's own decoder does not read, and their times."""
    decoder = av.CodecContext.create("libvpx-vp9", "r")
    with av.open(str(path)) as container:
        found = [frame for packet in container.demux(video=0) if packet.size for frame in decoder.decode(packet)]
    found += decoder.decode(None)
    return np.stack([frame.to_ndarray(format="rgba") for frame in found]), [frame.time for frame in found]


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (HEIGHT - 1, WIDTH - 1)])
def test_webm_is_transparent(tmp_path, size):
    path = tmp_path / "v.webm"
    frames = []
    for i in range(6):
        frame = np.full((*size, 4), (200, 60, 30, 0), np.uint8)
        frame[8:40, 8 + 4 * i : 24 + 4 * i, 3] = 255
        frames.append(frame)
    with VideoWriter(path, like=like(time_base=Fraction(1, 90000))) as writer:
        for i, frame in enumerate(frames):
            writer.write(frame, i * 0.04 + (0.1 if i == 5 else 0))
    found, times = as_rgba(path)
    assert found.shape == (6, HEIGHT, WIDTH, 4)
    assert times == pytest.approx([0, 0.04, 0.08, 0.12, 0.16, 0.3], abs=1e-3)
    for frame, expected in zip(found, frames, strict=True):
        inside = expected[..., 3] == 255
        alpha = frame[: size[0], : size[1], 3].astype(int)
        assert np.abs(alpha - expected[..., 3]).mean() < 4
        assert np.abs(frame[: size[0], : size[1]][inside][:, :3].astype(int) - (200, 60, 30)).mean() < 8
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1"
        assert container.format.name == "matroska,webm"


def test_webm_that_is_not(tmp_path):
    path = tmp_path / "v.WEBM"
    with VideoWriter(path, fps=25) as writer:
        for i in range(5):
            writer.write(grey(40 * i))
    frames = Frames(path)
    assert values(path) == [0, 40, 80, 120, 160]
    assert frames.times == pytest.approx([i / 25 for i in range(5)], abs=1e-3)
    with av.open(str(path)) as container:
        assert "alpha_mode" not in container.streams.video[0].metadata


def test_mp4_has_no_transparency(tmp_path):
    with VideoWriter(tmp_path / "v.mp4") as writer, pytest.raises(ValueError, match="MP4 has no transparency"):
        writer.write(np.zeros((HEIGHT, WIDTH, 4), np.uint8))
