"""Clips of every kind, and what is made of them: decoded again by PyAV, beside what they were made of."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import HEIGHT, WIDTH, beep_of, picture, shown, turn, write_clip

pytest.importorskip("av", reason="videos need PyAV")

import av

from omniops.sam2.frames import Colour, Frames, IncompleteVideoWarning
from omniops.server import clips
from omniops.server import transcode as transcoding
from omniops.server.errors import ServerError
from omniops.server.jobs import Cancelled, Progress
from omniops.server.transcode import Encoding, output_size, transcode

B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:keyint=6:scenecut=0"}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.mp4"


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height)))


def differs(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def require_plain(path: Path, count: int) -> Frames:
    """All that every browser asks for, read from the file's own packets and boxes."""
    frames = Frames(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert len(packets) == stream.frames == len(frames) == count
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
        assert packets[0].pts == 0
        assert not any(packet.is_discard for packet in packets)
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.sample_aspect_ratio) == ("h264", "yuv420p", 1)
        assert frames.colour.matrix in (1, 6)
        assert not frames.colour.full_range
        assert codec.width % 2 == codec.height % 2 == 0
        assert (codec.width, codec.height) == (frames.width, frames.height)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert clips.look(path).is_plain
    return frames


SIZES = [
    ((1080, 1924), (404, 720)),
    ((1500, 1500), (1280, 1280)),
    ((360, 640), (360, 640)),
    ((1920, 1080), (1280, 720)),
    ((1440, 1080), (1280, 960)),
    ((641, 361), (642, 362)),
    ((3, 1), (4, 2)),
    ((1, 1), (2, 2)),
    ((5000, 2), (1280, 2)),
]


@pytest.mark.parametrize(("size", "expected"), SIZES, ids=str)
def test_the_official_sizes(size, expected):
    assert output_size(*size, 1280, 720) == expected


def test_bounds_that_were_set_hold_for_both_sides():
    assert output_size(1920, 1080, 640, 720) == (640, 360)
    assert output_size(1920, 1080, 1280, 360) == (640, 360)
    assert output_size(1080, 1920, 1280, 360) == (202, 360)
    assert output_size(1080, 1920, 300, 720) == (300, 534)
    assert output_size(1500, 1500, 1920, 1080) == (1080, 1080)
    assert output_size(1000, 1000, 641, 721) == (640, 640)


def ticks_of_the_filter(times: list[float], fps: int) -> list[int]:
    """Which frame FFmpeg's filter fps shows at each tick; the last is shown for 1/25 s."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format="gray", time_base=Fraction(1, 1000))
    graph.link_nodes(source, graph.add("fps", str(fps)), graph.add("buffersink")).configure()
    found: list[int] = []

    def pull():
        with suppress(av.BlockingIOError, EOFError):
            while True:
                found.append(int(graph.pull().to_ndarray()[0, 0]))

    for i, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), i, np.uint8), "gray")
        frame.pts, frame.time_base, frame.duration = round(time * 1000), Fraction(1, 1000), 40
        graph.push(frame)
        pull()
    graph.push(None)
    pull()
    return found


def test_frames_in_order_with_their_times(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 20, options=B_FRAMES, size=(320, 240))
    result = transcode(source, out, Encoding())
    frames = require_plain(out, 20)
    assert result == (20, 320, 240)
    assert [shown(frame) for frame in frames] == list(range(20))
    assert frames.times == pytest.approx([i / 24 for i in range(20)], abs=1e-3)
    assert frames.fps == 24


RATES = {
    "50": [i / 50 for i in range(20)],
    "12": [round(i / 12, 3) for i in range(20)],
    "variable": [0, 0.013, 0.08, 0.081, 0.09, 0.4, 0.42, 0.9, 1.0, 1.001, 1.5],
    "60, with half ticks": [i / 16 for i in range(20)],
}


@pytest.mark.parametrize("fps", [24, 10])
@pytest.mark.parametrize("name", RATES)
def test_a_constant_rate_as_the_filter_makes_it(tmp_path, out, name, fps):
    source = write_clip(tmp_path / "in.mkv", len(RATES[name]), times=RATES[name], rate=25, size=(320, 240))
    expected = ticks_of_the_filter(Frames(source).times, fps)
    transcode(source, out, Encoding(fps=Fraction(fps)))
    frames = require_plain(out, len(expected))
    assert [shown(frame) for frame in frames] == expected


def test_a_part_of_it(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 20, options=B_FRAMES, size=(320, 240), rate=12)
    transcode(source, out, Encoding(), start=0.5, duration=0.5)
    frames = require_plain(out, 12)
    assert [shown(frame) for frame in frames] == [6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]


@pytest.mark.parametrize("name", ["in.mp4", "in.mkv", "in.ts", "in.avi"])
def test_a_start_far_behind_keyframes(tmp_path, out, name):
    pictures = [picture(t % 20, 320, 240) for t in range(240)]
    if name == "in.avi":
        source = write_clip(tmp_path / name, codec="mpeg4", pictures=pictures, size=(320, 240), options={"g": "100"})
    else:
        options = {"x264-params": "keyint=100:scenecut=0"}
        source = write_clip(tmp_path / name, pictures=pictures, size=(320, 240), options=options)
    transcode(source, out, Encoding(), start=7.5, duration=0.25)
    assert [shown(frame) for frame in require_plain(out, 6)] == [0, 1, 2, 3, 4, 5]


def test_every_frame_at_its_own_time(tmp_path, out):
    times = RATES["variable"]
    source = write_clip(tmp_path / "in.mkv", len(times), times=times, rate=25, size=(320, 240))
    transcode(source, out, Encoding(fps=None))
    frames = require_plain(out, len(times))
    assert [shown(frame) for frame in frames] == list(range(len(times)))
    assert frames.times == pytest.approx(times, abs=1e-3)


MATRICES = {
    "nothing": (1, 0, 0, 1),
    "90 clockwise": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "90 counterclockwise": (0, -1, 1, 0),
    "hflip": (-1, 0, 0, 1),
    "vflip": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "the other diagonal": (0, -1, -1, 0),
}


@pytest.mark.parametrize("name", MATRICES)
def test_what_is_turned(tmp_path, out, name):
    source = write_clip(tmp_path / "in.mp4", 6, size=(320, 240))
    turn(source, MATRICES[name])
    expected = Frames(source)
    transcode(source, out, Encoding())
    frames = require_plain(out, 6)
    assert (frames.width, frames.height) == (expected.width, expected.height)
    for i in range(6):
        assert differs(frames[i], expected[i]) < 1
    assert differs(frames[5][::-1, ::-1], expected[5]) > 3 * differs(frames[5], expected[5])


def test_turned_and_made_smaller(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 3, size=(320, 240))
    turn(source, MATRICES["90 clockwise"])
    transcode(source, out, Encoding(max_width=200, max_height=100))
    frames = require_plain(out, 3)
    assert (frames.width, frames.height) == (76, 100)
    assert differs(frames[2], resized(np.rot90(picture(2, 320, 240), -1), 76, 100)) < 4


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name", "size"),
    [
        ("libx264", "yuv444p", "in.mp4", (321, 241)),
        ("libx264", "yuv422p10le", "in.mp4", (320, 241)),
        ("libx264", "gray", "in.mp4", (320, 240)),
        ("ffv1", "bgr0", "in.mkv", (321, 240)),
        ("libvpx-vp9", "yuv420p", "in.webm", (321, 241)),
        ("prores_ks", "yuva444p10le", "in.mov", (320, 240)),
        ("qtrle", "argb", "in.mov", (320, 240)),
        ("mpeg4", "yuv420p", "in.avi", (320, 240)),
        ("mjpeg", "yuvj420p", "in.avi", (320, 240)),
        ("gif", "rgb8", "in.gif", (320, 240)),
        ("mpeg2video", "yuv420p", "in.ts", (320, 240)),
        ("libx265", "yuv420p10le", "in.mp4", (320, 240)),
    ],
)
def test_codecs_layouts_and_odd_sizes(tmp_path, out, codec, pix_fmt, name, size):
    rate = 25 if name == "in.gif" else 24
    options = {"x265-params": "log-level=error"} if codec == "libx265" else {}
    source = write_clip(tmp_path / name, 6, codec=codec, pix_fmt=pix_fmt, size=size, rate=rate, options=options)
    transcode(source, out, Encoding())
    frames = require_plain(out, 6)
    even = tuple(side + side % 2 for side in size)
    assert (frames.width, frames.height) == even
    expected = Frames(source)
    for i in range(6):
        assert shown(frames[i]) == i or pix_fmt == "gray"
        # At a quarter of the size: GIF has dots of few colours.
        assert differs(resized(frames[i], 80, 60), resized(expected[i], 80, 60)) < 2.5


def test_pixels_that_are_not_square(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 3, size=(240, 240), ratio=Fraction(4, 3))
    transcode(source, out, Encoding())
    frames = require_plain(out, 3)
    assert (frames.width, frames.height) == (320, 240)
    assert differs(frames[2], resized(picture(2, 240, 240), 320, 240)) < 4
    turn(source, MATRICES["90 clockwise"])
    transcode(source, out, Encoding())
    upright = require_plain(out, 3)
    assert (upright.width, upright.height) == (240, 320)


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 60, 30), (255, 255, 255), (0, 0, 0)]
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def write_colours(path: Path, matrix: int, full: bool, named: int | None = None, height: int = HEIGHT) -> Path:
    """A frame of each colour, by ITU-T H.273, 8.3; ``named`` is the matrix that the file tells."""
    of_red, of_blue = LUMA[matrix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, height, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix if named is None else named, 2 if full else 1
        for i, colour in enumerate(COLOURS):
            red, green, blue = (value / 255 for value in colour)
            y = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
            u, v = (blue - y) / 2 / (1 - of_blue), (red - y) / 2 / (1 - of_red)
            yuv = [255 * y, 128 + 255 * u, 128 + 255 * v] if full else [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]
            frame = av.VideoFrame(WIDTH, height, "yuv420p")
            for plane, value in zip(frame.planes, yuv, strict=True):
                plane.update(bytes([int(np.clip(round(value), 0, 255))]) * plane.buffer_size)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
def test_colours_are_those_that_the_file_means(tmp_path, out, matrix, full):
    transcode(write_colours(tmp_path / "in.mp4", matrix, full), out, Encoding(crf=1))
    frames = require_plain(out, len(COLOURS))
    assert frames.colour == Colour(1, 1, 6 if matrix == 5 else 1, False)
    for i, colour in enumerate(COLOURS):
        assert np.abs(frames[i][10, 10].astype(int) - colour).max() <= 6


@pytest.mark.parametrize(("height", "matrix"), [(480, 5), (720, 1)])
def test_a_matrix_that_is_not_named(tmp_path, out, height, matrix):
    transcode(write_colours(tmp_path / "in.mp4", matrix, False, named=2, height=height), out, Encoding(crf=1))
    frames = require_plain(out, len(COLOURS))
    for i, colour in enumerate(COLOURS):
        assert np.abs(frames[i][10, 10].astype(int) - colour).max() <= 6


def write_hdr(path: Path, transfer: int, codes: list[tuple[int, int, int]]) -> Path:
    """A frame of each code, in 10 bits of BT.2020."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=24, options={"x265-params": "log-level=error:lossless=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        for code in codes:
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, code, strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
def test_hdr_is_mapped_to_the_range_of_sdr(tmp_path, out):
    """Of HLG: black, reference white at 75 %, which must stay below the highlights, and peak."""
    codes = [(64, 512, 512), (721, 512, 512), (940, 512, 512)]
    transcode(write_hdr(tmp_path / "in.mp4", 18, codes), out, Encoding(crf=1))
    frames = require_plain(out, 3)
    assert frames.colour == Colour(1, 1, 1, False)
    black, white, peak = (frames[i][10, 10].astype(int) for i in range(3))
    assert black.max() <= 2
    assert 150 <= white.min() <= white.max() <= 235
    assert peak.min() >= 245
    assert np.ptp(white) <= 4  # grey stays grey


def test_sound_stays_with_the_pictures(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 48, size=(320, 240), beep=1.2)
    transcode(source, out, Encoding())
    assert beep_of(out) == pytest.approx(beep_of(source), abs=0.03) == pytest.approx(1.2, abs=0.05)
    transcode(source, out, Encoding(), start=0.75, duration=1.0)
    frames = require_plain(out, 24)
    assert shown(frames[0]) == 18
    assert beep_of(out) == pytest.approx(0.45, abs=0.05)
    with av.open(str(out)) as container:
        sound = container.streams.audio[0]
        assert sound.codec_context.name == "aac"
        assert float(sound.duration * sound.time_base) == pytest.approx(1.0, abs=0.05)


def test_what_is_silent_stays_so(tmp_path, out):
    transcode(write_clip(tmp_path / "in.mp4", 3), out, Encoding())
    with av.open(str(out)) as container:
        assert not container.streams.audio


def test_pictures_that_begin_after_the_sound(tmp_path, out):
    times = [0.5 + i / 24 for i in range(20)]
    source = write_clip(tmp_path / "in.mkv", 20, times=times, size=(320, 240), beep=0.7)
    transcode(source, out, Encoding())
    assert [shown(frame) for frame in require_plain(out, 20)] == list(range(20))
    assert beep_of(out) == pytest.approx(0.2, abs=0.05)


def test_a_size_that_changes_on_the_way(tmp_path, out):
    small = write_clip(tmp_path / "a.ts", 6, size=(320, 240))
    large = write_clip(tmp_path / "b.ts", 6, size=(640, 480))
    source = tmp_path / "both.ts"
    source.write_bytes(small.read_bytes() + large.read_bytes())
    transcode(source, out, Encoding())
    frames = require_plain(out, 12)
    assert (frames.width, frames.height) == (320, 240)
    assert differs(frames[10], resized(picture(4, 640, 480), 320, 240)) < 4


def test_damage_and_files_that_break_off(tmp_path, out):
    source = write_clip(tmp_path / "in.mkv", 20, size=(320, 240), options={"x264-params": "keyint=5:scenecut=0"})
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 6 // 10])
    with pytest.warns(IncompleteVideoWarning):
        broken = Frames(source)
    assert [shown(frame) for frame in broken] == [0, 1, 2, 3, 4, 5, 6, 7, 9]  # in the order of decoding 9 came before 8
    transcode(source, out, Encoding(), threads=2)
    assert [shown(frame) for frame in require_plain(out, 10)] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 9]
    damaged = write_clip(
        tmp_path / "in.mp4", 20, size=(320, 240), options={"x264-params": "keyint=5:bframes=0:scenecut=0"}
    )
    data = bytearray(damaged.read_bytes())
    with av.open(str(damaged)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    damaged.write_bytes(data)
    transcode(damaged, out, Encoding(), threads=2)
    found = [shown(frame) for frame in require_plain(out, 20)]
    assert found == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, *found[11:15], 15, 16, 17, 18, 19]


def test_quality_is_as_asked(tmp_path, out):
    noise = list(np.random.default_rng(0).integers(0, 255, (6, 240, 320, 3), dtype=np.uint8))
    source = write_clip(tmp_path / "in.mp4", pictures=noise, size=(320, 240))
    sizes = []
    for crf in (10, 40):
        transcode(source, out, Encoding(crf=crf))
        sizes.append(out.stat().st_size)
    assert sizes[0] > 3 * sizes[1]


@pytest.mark.parametrize("count", [1, 2])
def test_the_threads_that_decode_change_no_byte(tmp_path, out, count):
    source = write_clip(tmp_path / "in.mp4", 20, size=(320, 240), options=B_FRAMES, beep=0.3)
    made = []
    for threads in (1, 2, 3):
        transcode(source, out, Encoding(threads=count), threads=threads)
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]


def message(source: Path, out: Path, **options) -> str:
    with pytest.raises(ServerError) as caught:
        transcode(source, out, Encoding(), **options)
    return caught.value.message


def test_the_official_messages(tmp_path, out):
    text = tmp_path / "text.mp4"
    text.write_bytes(b"hello" * 100)
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    sound = tmp_path / "sound.m4a"
    with av.open(str(sound), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame) + stream.encode(None))
    video = write_clip(tmp_path / "video.mp4", 24)
    assert message(text, out) == message(empty, out) == "not valid video file"
    assert message(sound, out) == "video container does not contain a video stream"
    end = "transcode produced empty video; check seek time or your input video"
    assert message(video, out, start=5) == end
    no_frames = tmp_path / "none.mp4"
    data = video.read_bytes()
    offset = data.index(b"mdat") + 4
    size = int.from_bytes(data[offset - 8 : offset - 4], "big") - 8
    no_frames.write_bytes(data[:offset] + bytes(size) + data[offset + size :])
    assert message(no_frames, out) == end
    assert message(no_frames, out, threads=2) == end


def test_pictures_are_no_videos(tmp_path, out):
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(picture(0)).save(tmp_path / name)
        assert message(tmp_path / name, out) == "not valid video file"


def test_too_many_pixels(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 3, size=(320, 240))
    assert "320 x 240 pixels" in message(source, out, max_pixels=320 * 240 - 1)
    assert transcode(source, out, Encoding(), max_pixels=320 * 240).frames == 3
    large = write_clip(tmp_path / "b.ts", 6, size=(640, 480))
    growing = tmp_path / "both.ts"
    growing.write_bytes(write_clip(tmp_path / "a.ts", 6, size=(320, 240)).read_bytes() + large.read_bytes())
    assert transcode(growing, out, Encoding(), max_pixels=320 * 240).frames == 6  # what is larger is not decoded


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        "<?xml version='1.0'?><MPD><Period><AdaptationSet><Representation><BaseURL>{path}</BaseURL>"
        "</Representation></AdaptationSet></Period></MPD>",
        "v=0\nm=video 9 RTP/AVP 96\nc=IN IP4 127.0.0.1\n",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat"])
def test_lists_of_other_files_are_not_followed(tmp_path, out, text, name):
    secret = write_clip(tmp_path / "secret.ts", 6)
    (tmp_path / name).write_text(text.format(path=secret))
    assert message(tmp_path / name, out) == "not valid video file"


def test_what_is_given_up_stops(tmp_path, out):
    source = write_clip(tmp_path / "in.mp4", 20, size=(320, 240))

    class GivenUp(Progress):
        def update(self, done, total=None, what=None):
            updates.append((done, total))
            if done == 5:
                self.cancel()
            super().update(done, total, what)

    updates: list[tuple[int, int | None]] = []
    with pytest.raises(Cancelled):
        transcode(source, out, Encoding(), progress=GivenUp("converting"))
    assert updates == [(i, 20) for i in range(1, 6)]


def test_without_x264(tmp_path, out, monkeypatch):
    source = write_clip(tmp_path / "in.mp4", 3)
    assert transcoding._encoder("nothing of the kind") == "libx264"
    monkeypatch.setattr(transcoding.av, "codecs_available", {"libopenh264", "mpeg4"})
    assert transcoding._encoder("libx264") == "libopenh264"
    monkeypatch.setattr(transcoding.av, "codecs_available", {"mpeg4"})
    assert message(source, out) == "This server cannot write videos: its FFmpeg has no encoder of H.264."
