"""The sound of a source in the video that is written of its frames."""

from __future__ import annotations

import io
import os
import shutil
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="videos need PyAV")

import av
from video_files import HEIGHT, WIDTH, beep_of, picture, shown, turn, write_clip

from omniops.drawing import VideoWriter, sound
from omniops.sam2.frames import Frames, IncompleteVideoWarning

RATE = 48000


def tone(seconds: float, beep: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """(channels, samples), silent but for a tenth of a second from ``beep`` on."""
    times = np.arange(int(rate * seconds)) / rate
    samples = np.sin(2 * np.pi * 1000 * times) * ((times >= beep) & (times < beep + 0.1))
    return np.repeat(samples[None].astype(np.float32), channels, 0)


def write_source(
    path: Path,
    *tracks: str,
    begin: float = 0.0,
    video_begin: float = 0.0,
    beep: float = 0.5,
    count: int = 24,
    seconds: float | None = None,
    rate: int = RATE,
    layout: str = "stereo",
) -> Path:
    """A clip of a second with tracks of sound, which begin later, or its pictures do. A beep counts from the sound."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        streams = [container.add_stream(codec, rate=rate, layout=layout) for codec in tracks]
        for language, stream in zip(("deu", "fra"), streams, strict=False):
            stream.metadata["language"] = language
        packets = []
        for t in range(count):
            frame = av.VideoFrame.from_ndarray(picture(t), "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = t + round(24 * video_begin), Fraction(1, 24)
            packets += video.encode(frame)
        packets += video.encode()
        for stream in streams:
            samples = tone(count / 24 - begin if seconds is None else seconds, beep, rate)
            samples = samples[: stream.codec_context.channels]
            for i in range(0, samples.shape[1], 960):
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, i : i + 960]), "fltp", layout)
                frame.sample_rate, frame.pts = rate, i + round(begin * rate)
                frame.time_base = Fraction(1, rate)
                for part in av.AudioResampler(stream.codec_context.format, layout, rate).resample(frame):
                    packets += stream.encode(part)
            packets += stream.encode()
        for packet in packets:
            container.mux(packet)
    return path


def rewrite(source: Path, out: Path, frames: range | None = None) -> Path:
    """As a command writes it: each frame at its time."""
    video = Frames(source)
    with VideoWriter(out, like=video, audio=source) as writer:
        for i in range(len(video)) if frames is None else frames:
            writer.write(video[i], video.times[i])
    return out


def sounds(path: Path, header: int = 0) -> list[tuple[str, bytes]]:
    """Of each track its codec and the bytes of its packets that are heard, without a header of so many bytes."""
    with av.open(str(path)) as container:
        found = {stream.index: b"" for stream in container.streams.audio}
        for packet in container.demux(list(container.streams.audio)) if found else ():
            found[packet.stream.index] += b"" if packet.is_discard else bytes(packet)[header:]
        return [(stream.codec.canonical_name, found[stream.index]) for stream in container.streams.audio]


def check_pictures(path: Path, expected: range, abs_time: float = 2e-3) -> None:
    frames = Frames(path)
    assert [shown(frame, 24) for frame in frames] == list(expected)
    assert frames.times == pytest.approx([i / 24 for i in range(len(expected))], abs=abs_time)
    assert frames.start_time == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("suffix", "codec", "found"),
    [
        (".mp4", "aac", "aac"),
        (".ts", "aac", "aac"),
        (".mkv", "aac", "aac"),
        (".mp4", "libmp3lame", "mp3"),
        (".mkv", "flac", "flac"),
        (".mkv", "libopus", "opus"),
        (".ts", "ac3", "ac3"),
    ],
)
def test_sound_is_copied(tmp_path, suffix, codec, found):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg came without {codec}")
    source = write_source(tmp_path / f"source{suffix}", codec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = rewrite(source, tmp_path / "out.mp4")
    assert set(os.listdir(tmp_path)) == {"out.mp4", source.name}
    check_pictures(out, range(24))
    has_headers = suffix == ".ts" and codec == "aac"  # ADTS, in each packet
    (track,), (expected,) = sounds(out), sounds(source, 7 if has_headers else 0)
    assert track[0] == expected[0] == found
    assert len(track[1]) > 300
    assert track[1] in expected[1]
    begin = beep_of(source) - Frames(source).start_time
    assert beep_of(out) == pytest.approx(begin, abs=2e-3)
    assert begin == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("source_name", "codec", "out_name", "found"),
    [
        ("source.mkv", "pcm_s16le", "out.mp4", "aac"),
        ("source.mkv", "mp2", "out.mp4", "aac"),
        ("source.mp4", "aac", "out.webm", "opus"),
        ("source.mkv", "libopus", "out.webm", "opus"),
    ],
)
def test_sound_is_encoded_where_it_must_be(tmp_path, source_name, codec, out_name, found):
    source = write_source(tmp_path / source_name, codec)
    out = rewrite(source, tmp_path / out_name)
    check_pictures(out, range(24))
    ((name, packets),) = sounds(out)
    assert name == found
    assert (packets in sounds(source)[0][1]) == (codec == "libopus")
    assert beep_of(out) == pytest.approx(0.5, abs=8e-3)


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
@pytest.mark.parametrize(("begin", "video_begin", "expected"), [(0.3, 0, 0.55), (0, 0.25, 0.2), (0, 0, 0.45)])
def test_sound_that_begins_later_or_earlier_than_the_pictures(tmp_path, codec, begin, video_begin, expected):
    beep = expected + video_begin - begin
    source = write_source(tmp_path / "source.mkv", codec, begin=begin, video_begin=video_begin, beep=beep, seconds=1)
    assert Frames(source).start_time == pytest.approx(video_begin, abs=1e-3)
    out = rewrite(source, tmp_path / "out.mp4")
    check_pictures(out, range(24))
    assert beep_of(out) == pytest.approx(expected, abs=5e-3)
    with av.open(str(out)) as container:
        assert container.duration == pytest.approx(1e6, abs=0.03e6)


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_a_part_of_a_video_has_its_part_of_the_sound(tmp_path, codec):
    source = write_source(tmp_path / "source.mkv", codec)
    out = rewrite(source, tmp_path / "out.mp4", range(6, 18))
    check_pictures(out, range(6, 18))
    assert beep_of(out) == pytest.approx(0.25, abs=5e-3)
    with av.open(str(out)) as container:
        assert container.duration == pytest.approx(0.5e6, abs=0.03e6)
        assert container.streams.audio[0].duration * container.streams.audio[0].time_base < 0.53


def test_all_tracks_are_taken_with_their_languages(tmp_path):
    source = write_source(tmp_path / "source.mkv", "aac", "pcm_s16le")
    with av.open(str(rewrite(source, tmp_path / "out.mp4"))) as container:
        tracks = [(stream.codec.canonical_name, stream.metadata["language"]) for stream in container.streams.audio]
    assert tracks == [("aac", "deu"), ("aac", "fra")]


def test_a_track_that_no_decoder_takes_is_left_out_with_a_warning(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source.mkv", "aac", "pcm_s16le")
    data = source.read_bytes()
    assert data.count(b"A_PCM/INT/LIT") == 1
    source.write_bytes(data.replace(b"A_PCM/INT/LIT", b"A_PCM/NOT/LIT"))
    with pytest.warns(UserWarning, match=r"track 2 of .* is left out: this FFmpeg does not know its codec"):
        out = rewrite(source, tmp_path / "out.mp4")
    assert [name for name, _ in sounds(out)] == ["aac"]
    check_pictures(out, range(24))


def test_layouts_and_rates_that_encoders_do_not_take(tmp_path):
    source = write_source(tmp_path / "source.mkv", "pcm_s16le", rate=6000, layout="mono")
    out = rewrite(source, tmp_path / "out.mp4")
    with av.open(str(out)) as container:
        context = container.streams.audio[0].codec_context
        assert (context.sample_rate, context.channels) == (48000, 1)
    assert beep_of(out) == pytest.approx(0.5, abs=5e-3)


def test_a_video_that_is_turned_keeps_shape_colours_and_sound(tmp_path):
    source = write_source(tmp_path / "source.mp4", "aac")
    turn(source, (0, 1, -1, 0))
    video = Frames(source)
    assert (video.height, video.width) == (WIDTH, HEIGHT)
    video.sample_aspect_ratio = Fraction(4, 3)
    with VideoWriter(tmp_path / "out.mp4", like=video, audio=source) as writer:
        for frame, time in zip(video, video.times, strict=True):
            writer.write(frame, time)
    with VideoWriter(tmp_path / "silent.mp4", like=video) as writer:
        for frame, time in zip(video, video.times, strict=True):
            writer.write(frame, time)
    out, silent = Frames(tmp_path / "out.mp4"), Frames(tmp_path / "silent.mp4")
    for name in ("times", "time_base", "fps", "sample_aspect_ratio", "colour", "height", "width"):
        assert getattr(out, name) == getattr(silent, name), name
    assert out.sample_aspect_ratio == Fraction(4, 3)
    assert all(np.array_equal(*pair) for pair in zip(out, silent, strict=True))
    assert beep_of(tmp_path / "out.mp4") == pytest.approx(0.5, abs=5e-3)


def test_transparency_and_mpeg_4_stay(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source.mp4", "aac", count=6)
    with VideoWriter(tmp_path / "out.webm", fps=24, audio=source) as writer:
        for t in range(6):
            writer.write(np.dstack([picture(t), np.full((HEIGHT, WIDTH), 255 * (t % 2), np.uint8)]))
    decoder = av.CodecContext.create("libvpx-vp9", "r")
    with av.open(str(tmp_path / "out.webm")) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1"
        frames = [frame for packet in container.demux(video=0) if packet.size for frame in decoder.decode(packet)]
    alpha = [frame.to_ndarray(format="rgba")[..., 3].mean() for frame in (*frames, *decoder.decode(None))]
    assert alpha == pytest.approx([0, 255] * 3, abs=8)
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    check_pictures(rewrite(source, tmp_path / "out.mp4"), range(6))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.codec.canonical_name for stream in container.streams] == ["mpeg4", "aac"]


def test_times_that_vary_are_kept(tmp_path):
    times = [0.0, 0.05, 0.3, 0.31, 0.7, 0.9]
    source = write_clip(tmp_path / "source.mkv", 6, times=times, beep=0.1)
    out = rewrite(source, tmp_path / "out.mp4")
    assert Frames(out).times == pytest.approx(times, abs=1e-3)
    assert beep_of(out) == pytest.approx(beep_of(source), abs=3e-3)


def test_sources_without_sound(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 4)
    (tmp_path / "folder").mkdir()
    still = io.BytesIO()
    from PIL import Image

    Image.fromarray(picture(0)).save(still, "PNG")
    (tmp_path / "still.png").write_bytes(still.getvalue())
    for source in (clip, tmp_path / "folder", tmp_path / "still.png"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with VideoWriter(tmp_path / "out.mp4", fps=24, audio=source) as writer:
                for t in range(3):
                    writer.write(picture(t))
        assert sounds(tmp_path / "out.mp4") == []
        check_pictures(tmp_path / "out.mp4", range(3))


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.wav to take sound from"):
        VideoWriter(tmp_path / "out.mp4", audio=tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no sound")
    writer = VideoWriter(tmp_path / "out.mp4", audio=tmp_path / "text.wav")
    writer.write(picture(0))
    with pytest.warns(UserWarning, match=r"out.mp4 is without the sound of .*text.wav: Invalid data"):
        writer.close()
    check_pictures(tmp_path / "out.mp4", range(1))


def test_a_file_of_sound_alone_begins_with_the_first_frame(tmp_path):
    source = tmp_path / "sound.wav"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        samples = (tone(3, 0.6) * 32767).astype(np.int16).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "s16", "stereo")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with VideoWriter(tmp_path / "out.mp4", fps=24, audio=source) as writer:
        for t in range(24):
            writer.write(picture(t))
    check_pictures(tmp_path / "out.mp4", range(24))
    assert beep_of(tmp_path / "out.mp4") == pytest.approx(0.6, abs=5e-3)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration == pytest.approx(1e6, abs=0.03e6)


def test_a_source_that_breaks_off_gives_the_sound_up_to_there(tmp_path):
    source = write_source(tmp_path / "source.ts", "aac", beep=0.2)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteVideoWarning)
        out = rewrite(source, tmp_path / "out.mp4")
    assert len(Frames(out)) > 10
    assert beep_of(out) == pytest.approx(0.2, abs=0.03)


def test_joined_files_whose_times_start_again(tmp_path):
    source = write_source(tmp_path / "source.ts", "aac")
    source.write_bytes(source.read_bytes() * 2)
    out = rewrite(source, tmp_path / "out.mp4")
    assert len(Frames(out)) == 48
    with av.open(str(out)) as container:
        frames = [(frame.time, np.abs(frame.to_ndarray()).max()) for frame in container.decode(audio=0)]
    beeps = [time for time, loudness in frames if loudness > 0.1]
    assert beeps[0] == pytest.approx(0.5, abs=0.05)
    assert beeps[-1] == pytest.approx(1.6, abs=0.1)


def test_a_writer_that_is_given_up_leaves_the_frames(tmp_path):
    source = write_source(tmp_path / "source.mp4", "aac")
    writer = VideoWriter(tmp_path / "out.mp4", like=Frames(source), audio=source)
    for t in range(6):
        writer.write(picture(t), t / 24)
    shutil.copy(tmp_path / "out.mp4", tmp_path / "copy.mp4")
    writer.abort()
    writer.close()
    for name in ("out.mp4", "copy.mp4"):
        check_pictures(tmp_path / name, range(5))
        assert sounds(tmp_path / name) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_where_the_sound_cannot_be_written_the_video_stays(tmp_path, monkeypatch, error):
    source = write_source(tmp_path / "source.mp4", "aac")
    video = Frames(source)
    writer = VideoWriter(tmp_path / "out.mp4", like=video, audio=source)
    for t in range(24):
        writer.write(video[t], video.times[t])
    packets = sound._sound_packets

    def failing(*args):
        yield from [packet for packet, _ in zip(packets(*args), range(5), strict=False)]
        raise error

    monkeypatch.setattr(sound, "_sound_packets", failing)
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match=r"out.mp4 is without the sound of .*source.mp4: No space left on device"):
            writer.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    writer.close()
    assert sorted(os.listdir(tmp_path)) == ["out.mp4", "source.mp4"]
    check_pictures(tmp_path / "out.mp4", range(24))
    assert sounds(tmp_path / "out.mp4") == []


def test_links_names_and_permissions_stay(tmp_path, monkeypatch):
    write_source(tmp_path / "a%03d:source.mp4", "aac")
    (tmp_path / "real").mkdir()
    out = tmp_path / "real" / "b?c#:%d.png"
    out.write_bytes(b"")
    out.chmod(0o640)
    (tmp_path / "link.mp4").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    rewrite(Path("a%03d:source.mp4"), Path("link.mp4"))
    assert (tmp_path / "link.mp4").is_symlink()
    assert os.listdir(tmp_path / "real") == [out.name]
    assert out.stat().st_mode & 0o777 == 0o640
    assert [name for name, _ in sounds(tmp_path / "link.mp4")] == ["aac"]


def test_a_pipe_has_no_sound(tmp_path):
    source = write_source(tmp_path / "source.mp4", "aac")
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    writer = VideoWriter(tmp_path / "pipe", like=Frames(source), audio=source)
    for t in range(3):
        writer.write(picture(t), t / 24)
    with pytest.warns(UserWarning, match=r"pipe is without sound: it is a pipe"):
        writer.close()
    reader.join()
    (tmp_path / "out.mp4").write_bytes(read[0])
    check_pictures(tmp_path / "out.mp4", range(3))
