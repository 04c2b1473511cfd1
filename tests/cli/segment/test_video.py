"""omniops segment of a video: masks and videos written, and what is kept of a broken one."""

from __future__ import annotations

import json
import signal
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="needs PyAV")

import av
from segment_files import noise, read_frames, read_json, run, write_picture, write_video

from omniops.cli import errors, outputs
from omniops.drawing import VideoWriter, colour_of
from omniops.drawing.prompts import FOREGROUND_COLOUR
from omniops.sam2 import rle, video_predictor


def test_its_video_masks_are_the_predictors(omniops, loaded, tmp_path):
    path, out = write_video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    result = run(omniops, path, "--point", "10,20@2", "--box", "5,5,40,30@2#2", "--out", out)
    assert (result.status, result.err.strip()) == (0, "")
    predictor = video_predictor.SAM2VideoPredictor(loaded)
    state = predictor.init_state(path)
    predictor.add_new_points_or_box(state, 2, 1, [[10, 20]], [1])
    predictor.add_new_points_or_box(state, 2, 2, box=[5, 5, 40, 30])
    backward = {frame: masks for frame, _, masks in predictor.propagate_in_video(state, 2, reverse=True)}
    forward = {frame: masks for frame, _, masks in predictor.propagate_in_video(state, 2)}
    records = read_json(tmp_path / "out.json")
    assert [(record["frame"], record["id"]) for record in records] == [(i, j) for i in range(6) for j in (1, 2)]
    for record in records:
        expected = {**forward, **backward}[record["frame"]][record["id"] - 1, 0] > 0
        assert np.array_equal(rle.decode(record["segmentation"]), expected.numpy())
        assert record["area"] == expected.sum()
    assert len(read_frames(out)) == 6
    assert "6 of 6 frames in" in result.out
    assert f"Wrote {out} and {tmp_path / 'out.json'}" in result.out


def test_the_video_shows_the_masks_in_the_order_of_its_frames(omniops, tracker, tmp_path):
    path, out = write_video(tmp_path / "v.mp4", size=(960, 640)), tmp_path / "out.mp4"
    prompts = ("--point", "700,200@3", "--point", "800,300,0@5", "--box", "1,2,900,600@4#2")
    assert run(omniops, path, *prompts, "--out", out).status == 0
    assert tracker.calls == [
        (3, 1, [(700, 200)], [1], None),
        (4, 2, None, None, (1, 2, 900, 600)),
        (5, 1, [(800, 300)], [0], None),
        (3, True),
        (4, False),
    ]
    source, drawn = read_frames(path), read_frames(out)
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 25
    for i, frame in enumerate(drawn):
        grey = source[i][500, 100].astype(int)
        for x, number in ((100, 1), (860, 2)):
            expected = grey // 2 + np.array(colour_of(number)) // 2
            assert abs(frame[500, x].astype(int) - expected).max() < 25, (i, number)
    # The click shows on its frame alone.
    there = np.array([frame[200, 700] for frame in drawn]).astype(int)
    green = abs(there - FOREGROUND_COLOUR).max(axis=1)
    assert [i for i in range(6) if green[i] < 25] == [3]
    assert len({record["frame"] for record in read_json(tmp_path / "out.json")}) == 6


def test_frames_in_a_folder_are_a_video_too(omniops, tracker, tmp_path):
    for i in (1, 2, 10):
        write_picture(tmp_path / "frames" / f"{i}.png", (41, 31), seed=i)
    out = tmp_path / "out.mp4"
    assert run(omniops, tmp_path / "frames", "--point", "40,30@2", "--out", out).status == 0
    frames = read_frames(out)
    assert [frame.shape for frame in frames] == [(32, 42, 3)] * 3  # even, as the codec wants it
    assert read_json(tmp_path / "out.json")[0]["segmentation"]["size"] == [31, 41]
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 24


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_tiny_frames(omniops, tracker, tmp_path, size):
    write_picture(tmp_path / "frames" / "1.png", size)
    assert run(omniops, tmp_path / "frames", "--point", "0,0", "--out", tmp_path / "out.mp4").status == 0
    assert len(read_frames(tmp_path / "out.mp4")) == 1


def test_without_x264_it_is_mpeg_4(tmp_path, monkeypatch):
    codecs = set()
    for available in (av.codecs_available, {"mpeg4"}):
        monkeypatch.setattr(av, "codecs_available", available)
        writer = VideoWriter(tmp_path / "out.mp4", fps=30000 / 1001)
        for i in range(5):
            writer.write(np.full((32, 48, 3), 50 * i, np.uint8))
        writer.close()
        with av.open(str(tmp_path / "out.mp4")) as container:
            stream = container.streams.video[0]
            codecs.add(stream.codec.canonical_name)
            assert stream.average_rate == Fraction(30000, 1001)
        assert [round(int(frame[16, 24, 0]), -1) for frame in read_frames(tmp_path / "out.mp4")] == [
            0,
            50,
            100,
            150,
            200,
        ]
    assert "mpeg4" in codecs


def test_a_file_is_what_is_in_it(omniops, tracker, scripted, tmp_path):
    write_video(tmp_path / "v.mp4").rename(tmp_path / "v.jpg")
    assert run(omniops, tmp_path / "v.jpg", "--point", "1,2", "--out", tmp_path / "v-out.mp4").status == 0
    write_picture(tmp_path / "p.png").rename(tmp_path / "p.mp4")
    assert run(omniops, tmp_path / "p.mp4", "--point", "1,2", "--out", tmp_path / "p-out.png").status == 0


def test_an_animation_is_a_video_and_heif_a_picture(omniops, tracker, scripted, tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="the extra heif")
    first, *rest = [Image.fromarray(noise(seed=i)) for i in range(3)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert run(omniops, tmp_path / "a.gif", "--point", "1,2", "--out", tmp_path / "a-out.mp4").status == 0
    assert [record["frame"] for record in read_json(tmp_path / "a-out.json")] == [0, 1, 2]
    heif.from_pillow(first).save(tmp_path / "p.heic")
    assert run(omniops, tmp_path / "p.heic", "--point", "1,2", "--out", tmp_path / "p-out.png").status == 0


def test_what_is_warned_of_at_opening_is_said_as_it_is(omniops, tracker, tmp_path):
    with av.open(str(write_video(tmp_path / "v.mp4"))) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    offset, size = packets[4]
    data[offset : offset + size] = bytes(size)
    (tmp_path / "v.mp4").write_bytes(data)
    result = run(omniops, tmp_path / "v.mp4", "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    assert result.notes[-1].endswith("v.mp4 is damaged: 5 frames can be decoded, 1 cannot\n")
    (last,) = result.err.splitlines()
    assert last.endswith("v.mp4 is not whole: the masks of 5 of 5 frames were kept")


def test_frames_with_damaged_exif_are_read(omniops, tracker, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    Image.fromarray(noise()).save(tmp_path / "frame.jpg", exif=exif)
    data = bytearray((tmp_path / "frame.jpg").read_bytes())
    data[data.index(b"Exif") + 15] = 40  # entries
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.jpg").write_bytes(data)
    result = run(omniops, tmp_path / "frames", "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert (result.status, result.err, "Corrupt EXIF" in result.notes[-1]) == (0, "", True)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(
    ("happening", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("out of memory\nlong story"), 1, "out of memory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (errors.Terminated(signal.SIGTERM), 143, "terminated"),
    ],
)
def test_what_was_found_is_kept_when_it_stops(omniops, tracker, tmp_path, first, happening, status, said):
    path, out = write_video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    for frame, frames in ((4, list(range(4))), (1, [0] if first == 0 else [2, 3])):
        tracker.happenings = {frame: happening}
        result = run(omniops, path, "--point", f"1,2@{first}", "--out", out, "--overwrite")
        assert result.status == status
        kept = f"the masks of {len(frames)} of 6 frames were kept"
        assert result.err.strip().splitlines() == [f"omniops: error: {said}: {kept}"]
        assert [record["frame"] for record in read_json(tmp_path / "out.json")] == frames
        assert len(read_frames(out)) == len(frames)
        assert f"Wrote {out}" in result.out
        assert not (tmp_path / "out.jsonl").exists()


def test_nothing_is_written_before_the_first_mask(omniops, tracker, tmp_path):
    tracker.happenings = {0: KeyboardInterrupt()}
    result = run(omniops, write_video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert (result.status, result.out) == (130, "")
    assert "the masks of 0 of 6 frames were kept" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_a_frame_that_cannot_be_decoded_ends_the_masks(omniops, loaded, tmp_path):
    for i in range(5):
        write_picture(tmp_path / "frames" / f"{i}.png", seed=i)
    damaged = tmp_path / "frames" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = run(omniops, tmp_path / "frames", "--point", "1,2@1", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    assert "3.png" in result.notes[-1]
    (last,) = result.err.splitlines()
    assert last.endswith("frames is not whole: the masks of 3 of 5 frames were kept")
    assert [record["frame"] for record in read_json(tmp_path / "out.json")] == [0, 1, 2]
    assert len(read_frames(tmp_path / "out.mp4")) == 3


def test_a_video_that_breaks_off_keeps_its_masks(omniops, loaded, tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=8)
    data = path.read_bytes()
    path.write_bytes(data[: -len(data) // 8])
    result = run(omniops, path, "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    assert "breaks off after" in result.notes[-1]
    (last,) = result.err.splitlines()
    assert f"{path} is not whole: the masks of" in last
    frames = [record["frame"] for record in read_json(tmp_path / "out.json")]
    assert frames == list(range(len(frames)))
    assert 0 < len(frames) < 8


def test_a_disk_that_is_full_keeps_the_masks_that_are_known(omniops, tracker, tmp_path, monkeypatch):
    def full(self, frame, time=None):
        raise OSError("cannot write out.mp4: No space left on device")

    monkeypatch.setattr(VideoWriter, "write", full)
    result = run(omniops, write_video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    assert "cannot write out.mp4: No space left on device: the masks of 1 of 6 frames were kept" in result.err
    assert len(read_json(tmp_path / "out.json")) == 1


def test_records_that_cannot_become_one_file_stay_as_lines(omniops, tracker, tmp_path, monkeypatch):
    def full(path, value, overwrite, indent=None):
        raise errors.CommandError(f"cannot write {path}: No space left on device", status=1)

    monkeypatch.setattr(outputs, "write_json", full)
    result = run(omniops, write_video(tmp_path / "v.mp4"), "--point", "1,2@3", "--out", tmp_path / "out.mp4")
    assert (result.status, result.out) == (1, "")
    (line,) = result.err.splitlines()
    assert f"cannot write {tmp_path}/out.json: No space left on device; {tmp_path}/out.jsonl has what was found" in line
    assert line.endswith("the masks of 6 of 6 frames were kept")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["frame"] for record in lines] == [3, 2, 1, 0, 4, 5]  # as they were found
    assert not (tmp_path / "out.json").exists()


def test_records_have_the_times_of_their_frames(omniops, tracker, tmp_path):
    assert run(omniops, write_video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4").status == 0
    assert [record["time"] for record in read_json(tmp_path / "out.json")] == pytest.approx([i / 25 for i in range(6)])
    write_picture(tmp_path / "frames" / "1.png")
    assert run(omniops, tmp_path / "frames", "--point", "1,2", "--out", tmp_path / "folder.mp4").status == 0
    assert "time" not in read_json(tmp_path / "folder.json")[0]
