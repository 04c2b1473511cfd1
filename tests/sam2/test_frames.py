"""Frames of videos of every kind, in any order, recognised by what they show."""

from __future__ import annotations

import io
import struct
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av", reason="videos need PyAV")

import av

from omniops.sam2 import decoded_frames
from omniops.sam2.decoded_frames import DecodedFrames
from omniops.sam2.frames import FrameError, Frames
from omniops.sam2.video_file import VideoFile

HEIGHT, WIDTH, COUNT = 48, 64, 20


def picture(t: int) -> np.ndarray:
    """A square that moves, and a bar that grows: like no other frame's."""
    image = np.full((HEIGHT, WIDTH, 3), (40, 90, 160), np.uint8)
    image[10:30, 2 * t : 2 * t + 16] = (230, 40, 30)
    image[-6:, : 3 * t] = 255
    return image


def shown(image: np.ndarray) -> int:
    """The t whose picture it is."""
    return min(range(COUNT), key=lambda t: np.abs(image.astype(int) - picture(t)).mean())


def write(path: Path, codec="libx264", *, options=None, times=None, muxer=None, layout="yuv420p", group=6) -> Path:
    """COUNT frames, lossy, with B-frames where the codec has them."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, layout
        stream.codec_context.gop_size = group
        stream.codec_context.bit_rate = 2_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(COUNT):
            frame = av.VideoFrame.from_ndarray(picture(t), "rgb24")
            if times:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:keyint=6:scenecut=0"}
VIDEOS = {
    "b-frames.mp4": {"options": B_FRAMES},
    "open-groups.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=6:scenecut=0"}},
    "keyframes-alone.mp4": {"group": 1},
    "one-group.mkv": {"options": {"x264-params": "bframes=3:b-adapt=0:keyint=99:scenecut=0"}, "group": 99},
    "fragments.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "variable-rate.mp4": {"times": [40 * t + 7 * t * t for t in range(COUNT)]},
    "stream.ts": {"options": B_FRAMES},
    "no-times-of-its-own.avi": {"options": B_FRAMES},
    "no-times.h264": {"options": B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "jpegs.mov": {"codec": "mjpeg", "layout": "yuvj420p"},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_of_a_video_in_any_order(tmp_path, name, monkeypatch):
    frames = Frames(write(tmp_path / name, **VIDEOS[name]))
    assert len(frames) == COUNT
    assert (frames.height, frames.width) == (HEIGHT, WIDTH)
    forward, anyhow = list(range(COUNT)), np.random.default_rng(0).permutation(COUNT).tolist()
    assert [shown(frame) for frame in frames] == forward
    assert [shown(frames[i]) for i in anyhow] == anyhow
    monkeypatch.setattr(decoded_frames, "MAX_DECODED_BYTES", 0)
    assert [shown(frames[i]) for i in forward[::-1]] == forward[::-1]
    assert [shown(frames[i]) for i in anyhow] == anyhow
    assert shown(frames[-1]) == COUNT - 1


def test_frames_are_what_ffmpeg_makes_of_them(tmp_path):
    path = write(tmp_path / "video.mp4", options=B_FRAMES)
    frames = Frames(path)
    with av.open(str(path)) as container:
        assert frames.fps == container.streams.video[0].average_rate == 25
        for i, frame in enumerate(container.decode(video=0)):
            assert frames[i].dtype == np.uint8
            assert np.array_equal(frames[i], frame.to_ndarray(format="rgb24", interpolation="BICUBIC"))
            small = frame.to_ndarray(format="rgb24", width=32, height=32, interpolation="BICUBIC")
            assert np.array_equal(frames.resized(i, 32), small)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
    ids=["90 clockwise", "180", "90 counterclockwise"],
)
def test_a_video_is_turned_as_its_metadata_say(tmp_path, matrix, turns):
    path = write(tmp_path / "video.mp4")
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    offset = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2
    data[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames = Frames(path)
    expected = np.rot90(picture(5), turns)
    assert frames[5].shape == (frames.height, frames.width, 3) == expected.shape
    assert np.abs(frames[5].astype(int) - expected).mean() < 5
    resized = frames.resized(5, 32)
    assert np.abs(resized.astype(int) - np.asarray(Image.fromarray(expected).resize((32, 32)))).mean() < 8


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photographs_as_a_video_are_turned_as_their_camera_was(tmp_path, orientation, turns):
    """Frames with EXIF data, which PyAV does not know."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with av.open(str(tmp_path / "video.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = *picture(0).shape[:2], "yuvj420p"
        for i in range(3):
            data = io.BytesIO()
            Image.fromarray(picture(i)).save(data, "JPEG", exif=exif, quality=95)
            packet = av.Packet(data.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), True
            packet.pts = packet.dts = i
            container.mux(packet)
    frames = Frames(tmp_path / "video.mov")
    for i in range(3):
        expected = np.rot90(picture(i), turns)
        assert frames[i].shape == expected.shape
        assert np.abs(frames[i].astype(int) - expected).mean() < 5


def count_decoded(monkeypatch):
    """A list that becomes longer with every frame that is decoded."""
    decoded, add = [], DecodedFrames.add
    monkeypatch.setattr(DecodedFrames, "add", lambda self, *args: decoded.append(1) or add(self, *args))
    return decoded


def test_going_backwards_decodes_a_group_a_few_times_not_once_a_frame(tmp_path, monkeypatch):
    video = VideoFile(write(tmp_path / "video.mkv", **VIDEOS["one-group.mkv"]))
    decoded = count_decoded(monkeypatch)
    video.frame(0)
    size = sum(plane.buffer_size for plane in video.decoded_frames[0].planes)
    monkeypatch.setattr(decoded_frames, "MAX_DECODED_BYTES", 5 * (size + decoded_frames.FRAME_OVERHEAD))
    for i in reversed(range(COUNT)):
        video.frame(i)
    assert len(decoded) == 1 + 19 + 15 + 10 + 5  # the first of them for its size
    assert len(video.decoded_frames) == 5


def test_frames_in_order_are_decoded_once(tmp_path, monkeypatch):
    frames = Frames(write(tmp_path / "video.mp4", options=B_FRAMES))
    decoded = count_decoded(monkeypatch)
    for i in range(COUNT):
        frames.resized(i, 16)
        frames[i]
    assert len(decoded) == COUNT


def test_threads_share_a_video(tmp_path, monkeypatch):
    frames = Frames(write(tmp_path / "video.mp4", options=B_FRAMES))
    monkeypatch.setattr(decoded_frames, "MAX_DECODED_BYTES", 0)
    wrong = []

    def look(seed):
        order = np.random.default_rng(seed).integers(0, COUNT, 30)
        wrong.extend(i for i in order if shown(frames[i]) != i)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _packets(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def _damage(path, packets):
    data = bytearray(path.read_bytes())
    for packet in packets:
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)


@pytest.fixture(params=[1, 16])
def threads(request, monkeypatch):
    """How many decode, as on a machine of so many cores."""
    opened = VideoFile._open

    def open_and_set(self):
        opened(self)
        self._stream.codec_context.thread_count = request.param

    monkeypatch.setattr(VideoFile, "_open", open_and_set)


@pytest.mark.usefixtures("threads")
def test_a_video_that_breaks_off(tmp_path):
    path = write(tmp_path / "video.mp4", options=B_FRAMES, muxer={"movflags": "faststart"})
    data = path.read_bytes()
    packets = _packets(path)
    path.write_bytes(data[: packets[11].pos + packets[11].size // 2])
    with pytest.warns(UserWarning, match=r"video.mp4 breaks off after 11 of 20 frames"):
        frames = Frames(path)
    assert len(frames) == 11
    assert len({shown(frame) for frame in frames}) == 11
    path.write_bytes(data[: data.index(b"mdat")])
    with (
        pytest.warns(UserWarning, match="breaks off after 0 of 20 frames"),
        pytest.raises(ValueError, match=r"video.mp4 has no frames"),
    ):
        Frames(path)


@pytest.mark.usefixtures("threads")
def test_frames_that_are_damaged(tmp_path):
    path = write(tmp_path / "video.mp4", options=B_FRAMES, muxer={"movflags": "faststart"})
    packets = _packets(path)
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    _damage(path, [*packets[keys[1] : keys[2]], *packets[keys[-1] :]])
    frames = Frames(path)
    assert len(frames) == COUNT
    with pytest.warns(UserWarning, match=r"frame 8 of .*video.mp4 is damaged"):
        assert shown(frames[8]) == 5
    assert [shown(frames[i]) for i in (5, 12, 0)] == [5, 12, 0]
    for _ in range(2):
        with pytest.raises(FrameError, match=r"frame 19 of .*video.mp4 cannot be decoded"):
            frames[19]
    assert shown(frames[12]) == 12


@pytest.mark.usefixtures("threads")
def test_damaged_frames_that_are_counted_by_decoding(tmp_path):
    path = write(tmp_path / "video.avi", "mpeg4")
    packets = _packets(path)
    _damage(path, [packets[9], packets[16]])
    with pytest.warns(UserWarning, match="video.avi is damaged: 18 frames can be decoded, 2 cannot"):
        frames = Frames(path)
    assert len(frames) == COUNT - 2
    assert [shown(frames[i]) for i in (8, -2, -1)] == [8, 18, 19]


@pytest.mark.parametrize("content", [b"", b"no video at all", bytes(5000)])
def test_a_file_that_is_no_video(tmp_path, content):
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"video.mp4 is not a video that FFmpeg can read"):
        Frames(path)


def test_a_file_without_pictures(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match=r"sound.wav is not a video"):
        Frames(path)


def test_paths_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no video at"):
        Frames(tmp_path / "nothing.mp4")
    with pytest.raises(TypeError, match="path must be the path of a video or a folder, got int"):
        Frames(3)
    with pytest.raises(ValueError, match=r"has no pictures: no file ends with \.apng, \.avif"):
        Frames(tmp_path)


def test_indices_that_are_wrong(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "1.jpg")
    frames = Frames(tmp_path)
    for index in (1, -2):
        with pytest.raises(IndexError, match="which has 1"):
            frames[index]
    with pytest.raises(TypeError):
        frames[0.0]


def test_without_pyav(tmp_path, monkeypatch):
    path = write(tmp_path / "video.mp4")
    Image.new("RGB", (4, 3)).save(tmp_path / "1.jpg")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'omniops\[sam2\]'"):
        Frames(path)
    assert len(Frames(tmp_path)) == 1


def test_a_folder_in_natural_order(tmp_path):
    for t, name in enumerate(["1.jpg", "2.JPG", "10.jpeg", "011.jpg", "a2b10.jpg", "a10b1.jpg"]):
        Image.new("RGB", (8, 6), (40 * t, 0, 0)).save(tmp_path / name, format="PNG")
    Image.new("RGB", (5, 5)).save(tmp_path / "10.png")  # as masks lie beside their frames
    (tmp_path / "._1.jpg").write_bytes(b"what macOS leaves")
    (tmp_path / "4.jpg").mkdir()
    frames = Frames(tmp_path)
    assert [frame[0, 0, 0] for frame in frames] == [40 * t for t in range(6)]
    assert (frames.height, frames.width, frames.fps) == (6, 8, None)


def test_a_folder_is_resized_as_the_official_package_does(tmp_path):
    misc = pytest.importorskip("sam2.utils.misc", reason="the oracle: the official package, sam2 from PyPI")
    noise = np.random.default_rng(0)
    for t in range(3):
        Image.fromarray(noise.integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / f"{t}.jpg")
    expected, height, width = misc.load_video_frames(str(tmp_path), 32, True, (0, 0, 0), (1, 1, 1))
    frames = Frames(tmp_path)
    assert (frames.height, frames.width) == (height, width)
    for i in range(3):
        assert torch.equal(torch.from_numpy(frames.resized(i, 32)).permute(2, 0, 1) / 255, expected[i])
        assert np.array_equal(frames[i], np.asarray(Image.open(tmp_path / f"{i}.jpg")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_pictures_of_every_kind(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 12).round().astype(np.uint8), (5, 1))
    if mode.startswith("I"):
        image = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
        assert image.mode == mode
    else:
        grey = grey if mode != "1" else grey // 128 * 255
        image = Image.fromarray(grey).convert("RGB")
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / ("1.tif" if mode in ("CMYK", "I") else "1.png"))
    frame = Frames(tmp_path)[0]
    assert frame.dtype == np.uint8
    assert frame.shape == (5, 12, 3)
    assert np.abs(frame.astype(int) - grey[..., None]).max() <= 3


def test_pictures_of_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "1.png")
    frames = Frames(tmp_path)
    assert frames[0].tolist() == [[[10, 20, 30]]]
    assert frames.resized(0, 4).tolist() == [[[10, 20, 30]] * 4] * 4


def test_pictures_of_different_sizes(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"of one size, got 6x8 in .*2.png and 8x6 in .*1.png"):
        Frames(tmp_path)


def test_pictures_that_are_damaged(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:80])
    frames = Frames(tmp_path)
    assert np.array_equal(frames[0], picture(0))
    with pytest.raises(FrameError, match=r"2.png cannot be read"):
        frames[1]
    (tmp_path / "2.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"2.png cannot be read as a picture"):
        Frames(tmp_path)
    Image.fromarray(np.full((HEIGHT, WIDTH), 9.0, np.float32)).save(tmp_path / "1.tif")
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    with pytest.raises(FrameError, match=r"1.tif cannot be read: .*from 0 to 1"):
        Frames(tmp_path)[0]
