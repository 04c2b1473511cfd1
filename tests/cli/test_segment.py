"""omniops segment: masks, pictures and videos written, what is kept of a broken one, and every error."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("omniops.sam2.architectures", exc_type=ImportError, reason="needs transformers")
pytest.importorskip("av", reason="needs PyAV")

import av

from omniops import sam2
from omniops.cli import errors, outputs, segment, segment_parts, segment_video
from omniops.drawing import VideoWriter, colour_of
from omniops.sam2 import mask_generator, rle, video_predictor
from omniops.sam2.architectures import new

SMALL = ("--random-weights", "--device", "cpu", "--dtype", "float32", "--image-size", "64")
COLOUR = np.array(colour_of(1))


@pytest.fixture(scope="module")
def model():
    """The one of SMALL."""
    torch.manual_seed(0)
    return new("tiny", image_size=64)


@pytest.fixture
def loaded(monkeypatch, model):
    """The model, made once."""
    monkeypatch.setattr(segment, "load_model", lambda *args: model)
    return model


@pytest.fixture
def never_loaded(monkeypatch):
    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(segment, "load_model", load)


def _pixels(size=(40, 30), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def _picture(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_pixels(size, seed)).save(path)
    return path


def _video(path, frames=6, size=(48, 32)):
    """Grey, brighter with each frame, so that frames can be told apart; its index comes first, so that it may end
    early."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _run(omniops, *arguments):
    return omniops("segment", *map(str, arguments), "--device", "cpu")


def _frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _json(path):
    return json.loads(path.read_text())


def _half(height, width, side):
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = side == "left"
    mask[:, width // 2 :] = side == "right"
    return mask


# Pictures.


@pytest.fixture
def scripted(monkeypatch, loaded):
    """In place of the image predictor: three masks, of which the second is best, or one; and what it was asked."""
    asked = []

    class Scripted:
        device = torch.device("cpu")

        def __init__(self, model):
            pass

        def set_image(self, pixels):
            self.pixels = pixels
            asked.append(pixels.copy())

        def predict(self, points, labels, box, multimask_output):
            asked.append((points, labels, box, multimask_output))
            height, width = self.pixels.shape[:2]
            halves = [_half(height, width, side) for side in ("none", "left", "right")]
            if not multimask_output:
                return np.stack(halves[2:]), np.array([0.75]), None
            return np.stack(halves), np.array([0.1, 0.9, 0.5]), None

    monkeypatch.setattr(sam2, "SAM2ImagePredictor", Scripted)
    return asked


def test_its_masks_are_the_predictors(omniops, tmp_path, model):
    path, out = _picture(tmp_path / "a.png"), tmp_path / "new" / "out.png"
    result = omniops("segment", str(path), "--point", "10,20", *SMALL, "--out", str(out))
    assert (result.status, result.err.strip()) == (0, "")
    predictor = sam2.SAM2ImagePredictor(model)
    predictor.set_image(_pixels())
    masks, scores, _ = predictor.predict([[10, 20]], [1])
    best = scores.argmax()
    (record,) = _json(tmp_path / "new" / "out.json")
    assert np.array_equal(rle.decode(record["segmentation"]), masks[best])
    assert record["predicted_iou"] == pytest.approx(float(scores[best]), rel=1e-5)
    assert (record["id"], record["area"]) == (1, int(masks[best].sum()))
    assert (record["point_coords"], record["point_labels"]) == ([[10, 20]], [1])
    assert np.array_equal(np.array(Image.open(out)), masks[best] * np.uint8(255))
    overlay = out.with_name("out-overlay.jpg")
    assert f"object 1: score {scores[best]:.3f}, {record['area']} pixels" in result.out
    assert f"Wrote {out}, {overlay} and {out.with_suffix('.json')}" in result.out
    with Image.open(overlay) as drawn:
        assert drawn.size == (40, 30)


def test_one_click_takes_the_best_of_three_and_more_prompts_one_mask(omniops, scripted, tmp_path):
    path, out = _picture(tmp_path / "a.png"), tmp_path / "out.png"
    click = ("--point", "1.5,2")
    for prompts, expected in (
        (click, ([(1.5, 2)], [1], None, True)),
        ((*click, "--point", "3,4,0"), ([(1.5, 2), (3, 4)], [1, 0], None, False)),
        (("--box", "1,2,40,30"), (None, None, (1, 2, 40, 30), False)),
        ((*click, "--box", "1,2,30,20"), ([(1.5, 2)], [1], (1, 2, 30, 20), False)),
    ):
        scripted.clear()
        assert _run(omniops, path, *prompts, "--out", out, "--overwrite").status == 0
        pixels, asked = scripted
        assert np.array_equal(pixels, _pixels())
        assert asked == expected
        (record,) = _json(tmp_path / "out.json")
        assert record["predicted_iou"] == (0.9 if expected[3] else 0.75)
        assert np.array_equal(rle.decode(record["segmentation"]), _half(30, 40, "left" if expected[3] else "right"))
        assert ("box" in record) == (expected[2] is not None)


def test_the_overlay_shows_mask_and_prompts(omniops, scripted, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (400, 300), (100, 100, 100)).save(path)
    prompts = ("--point", "100,100", "--point", "300,200,0", "--box", "220,20,380,120")
    assert _run(omniops, path, *prompts, "--out", tmp_path / "out.png").status == 0
    drawn = np.array(Image.open(tmp_path / "out-overlay.jpg")).astype(int)

    def near(x, y, colour, within=12):
        return abs(drawn[y, x] - colour).max() <= within

    assert near(20, 280, (100, 100, 100))  # the left half is not of this mask
    assert near(390, 280, 50 + COLOUR // 2)
    assert near(300, 20, COLOUR, within=60)  # of the box, thin and in a JPEG
    assert drawn[100, 100, 1] > drawn[100, 100, 0] + 80  # green
    assert drawn[200, 300, 0] > drawn[200, 300, 1] + 80  # red


def test_several_objects_are_numbered_in_one_picture(omniops, scripted, tmp_path):
    path, out = _picture(tmp_path / "a.png"), tmp_path / "out.png"
    assert _run(omniops, path, "--point", "1,2#7", "--box", "1,2,30,20#3", "--out", out).status == 0
    assert [(each["id"], each["area"]) for each in _json(tmp_path / "out.json")] == [(3, 600), (7, 600)]
    with Image.open(out) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), np.where(_half(30, 40, "left"), 7, 3))
        assert picture.convert("RGB").getpixel((0, 0)) == colour_of(7)
    assert _run(omniops, path, "--point", "1,2#300", "--point", "1,2,1#2", "--out", out, "--overwrite").status == 0
    assert np.array_equal(np.array(Image.open(out)), _half(30, 40, "left") * np.uint16(300))


def _everything(monkeypatch, *masks):
    made = []

    def generate(self, pixels, *, progress):
        made.append(self)
        progress(4, 4)
        return [
            {"segmentation": rle.encode(mask), "area": int(mask.sum()), "predicted_iou": 0.9, "bbox": [0, 0, 1, 1]}
            for mask in masks
        ]

    monkeypatch.setattr(mask_generator.SAM2AutomaticMaskGenerator, "generate", generate)
    return made


def test_everything_numbers_the_masks_the_smaller_on_top(omniops, loaded, monkeypatch, tmp_path):
    inner, outer = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    inner[10:15, 10:20] = True
    outer[5:25, 5:35] = True
    made = _everything(monkeypatch, inner, outer)
    path, out = _picture(tmp_path / "a.png"), tmp_path / "out.png"
    result = _run(omniops, path, "--everything", "--grid", "2", "--out", out)
    assert (result.status, result.err.strip()) == (0, "")
    assert "2 masks of 4 points in" in result.out
    assert len(made[0].point_grids[0]) == 4
    assert [each["id"] for each in _json(tmp_path / "out.json")] == [1, 2]
    assert set(_json(tmp_path / "out.json")[0]) == {"id", "segmentation", "area", "predicted_iou", "bbox"}
    expected = np.where(inner, 1, np.where(outer, 2, 0))
    assert np.array_equal(np.array(Image.open(out)), expected)


@pytest.mark.parametrize("count", [0, 1])
def test_everything_may_be_nothing_or_one(omniops, loaded, monkeypatch, tmp_path, count):
    mask = _half(30, 40, "left")
    _everything(monkeypatch, *[mask] * count)
    out = tmp_path / "out.png"
    result = _run(omniops, _picture(tmp_path / "a.png"), "--everything", "--out", out)
    assert result.status == 0
    assert len(_json(tmp_path / "out.json")) == count
    assert np.array_equal(np.array(Image.open(out)), (mask if count else ~mask & mask) * np.uint8(255))


def test_everything_runs_with_a_model(omniops, loaded, tmp_path):
    result = _run(omniops, _picture(tmp_path / "a.png"), "--everything", "--grid", "2", "--out", tmp_path / "out.png")
    assert (result.status, result.err.strip()) == (0, "")
    assert all("stability_score" in each for each in _json(tmp_path / "out.json"))


@pytest.mark.parametrize("kind", ["1x1", "grey", "RGBA", "16-bit", "turned"])
def test_every_kind_of_picture(omniops, loaded, tmp_path, kind):
    path, size = tmp_path / "a.png", (40, 30)
    pixels = _pixels()
    if kind == "1x1":
        size = (1, 1)
        Image.fromarray(_pixels(size)).save(path)
    elif kind == "16-bit":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
    elif kind == "turned":
        size = (30, 40)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(path, exif=exif)
    else:
        Image.fromarray(pixels).convert({"grey": "L", "RGBA": "RGBA"}[kind]).save(path)
    point = f"{size[0] - 1},{size[1] - 1}"
    result = _run(omniops, path, "--point", point, "--out", tmp_path / "out.png")
    assert (result.status, result.err.strip()) == (0, "")
    assert Image.open(tmp_path / "out.png").size == size
    assert Image.open(tmp_path / "out-overlay.jpg").size == size


def test_scores_that_are_no_numbers_are_an_error(fails, tmp_path, monkeypatch):
    torch.manual_seed(0)
    broken = new("tiny", image_size=64)
    broken.mask_decoder.iou_prediction_head.proj_out.bias.data.fill_(float("nan"))
    monkeypatch.setattr(segment, "load_model", lambda *args: broken)
    arguments = ("--device", "cpu", "--point", "1,1", "--out")
    line = fails("segment", str(_picture(tmp_path / "a.png")), *arguments, str(tmp_path / "o.png"), status=1)
    assert "no finite numbers" in line
    assert not (tmp_path / "o.png").exists()


# Videos.


@pytest.fixture
def tracker(monkeypatch, loaded):
    """In place of the video predictor: the left half for object 1, the right half for others. What ``at`` says happens
    before a frame."""

    class Tracker:
        def __init__(self, model):
            self.model = model

        def init_state(self, path):
            self.state = type("State", (), {"frames": video_predictor.Frames(path)})()
            self.numbers = []
            return self.state

        def add_new_points_or_box(self, state, frame, number, points, labels, box):
            self.calls.append((frame, number, points, labels, box))
            self.numbers += [number] if number not in self.numbers else []

        def propagate_in_video(self, state, first, reverse=False):
            self.calls.append((first, reverse))
            order = range(first, len(state.frames)) if not reverse else range(first, -1, -1) if first else ()
            height, width = state.frames.height, state.frames.width
            for frame in order:
                happening = self.at.get(frame)
                if isinstance(happening, str):
                    warnings.warn(happening, stacklevel=1)
                    return
                if happening:
                    raise happening
                sides = ["left" if number == 1 else "right" for number in self.numbers]
                masks = np.stack([_half(height, width, side) for side in sides])
                yield frame, self.numbers, torch.from_numpy(masks)[:, None].float() - 0.5

    Tracker.calls, Tracker.at = [], {}
    monkeypatch.setattr(segment_video, "SAM2VideoPredictor", Tracker)
    return Tracker


def test_its_video_masks_are_the_predictors(omniops, loaded, tmp_path):
    path, out = _video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    result = _run(omniops, path, "--point", "10,20@2", "--box", "5,5,40,30@2#2", "--out", out)
    assert (result.status, result.err.strip()) == (0, "")
    predictor = video_predictor.SAM2VideoPredictor(loaded)
    state = predictor.init_state(path)
    predictor.add_new_points_or_box(state, 2, 1, [[10, 20]], [1])
    predictor.add_new_points_or_box(state, 2, 2, box=[5, 5, 40, 30])
    backward = {frame: masks for frame, _, masks in predictor.propagate_in_video(state, 2, reverse=True)}
    forward = {frame: masks for frame, _, masks in predictor.propagate_in_video(state, 2)}
    records = _json(tmp_path / "out.json")
    assert [(each["frame"], each["id"]) for each in records] == [(i, number) for i in range(6) for number in (1, 2)]
    for each in records:
        expected = {**forward, **backward}[each["frame"]][each["id"] - 1, 0] > 0
        assert np.array_equal(rle.decode(each["segmentation"]), expected.numpy())
        assert each["area"] == expected.sum()
    assert len(_frames(out)) == 6
    assert "6 of 6 frames in" in result.out
    assert f"Wrote {out} and {tmp_path / 'out.json'}" in result.out


def test_the_video_shows_the_masks_in_the_order_of_its_frames(omniops, tracker, tmp_path):
    path, out = _video(tmp_path / "v.mp4", size=(960, 640)), tmp_path / "out.mp4"
    prompts = ("--point", "700,200@3", "--point", "800,300,0@5", "--box", "1,2,900,600@4#2")
    assert _run(omniops, path, *prompts, "--out", out).status == 0
    assert tracker.calls == [
        (3, 1, [(700, 200)], [1], None),
        (4, 2, None, None, (1, 2, 900, 600)),
        (5, 1, [(800, 300)], [0], None),
        (3, True),
        (3, False),
    ]
    source, drawn = _frames(path), _frames(out)
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 25
    for i, frame in enumerate(drawn):
        grey = source[i][500, 100].astype(int)
        for x, number in ((100, 1), (860, 2)):
            expected = grey // 2 + np.array(colour_of(number)) // 2
            assert abs(frame[500, x].astype(int) - expected).max() < 25, (i, number)
    # The click shows on its frame alone.
    there = np.array([frame[200, 700] for frame in drawn]).astype(int)
    green = abs(there - segment_parts._GREEN).max(axis=1)
    assert [i for i in range(6) if green[i] < 25] == [3]
    assert len({each["frame"] for each in _json(tmp_path / "out.json")}) == 6


def test_frames_in_a_folder_are_a_video_too(omniops, tracker, tmp_path):
    for i in (1, 2, 10):
        _picture(tmp_path / "frames" / f"{i}.png", (41, 31), seed=i)
    out = tmp_path / "out.mp4"
    assert _run(omniops, tmp_path / "frames", "--point", "40,30@2", "--out", out).status == 0
    frames = _frames(out)
    assert [frame.shape for frame in frames] == [(32, 42, 3)] * 3  # even, as the codec wants it
    assert _json(tmp_path / "out.json")[0]["segmentation"]["size"] == [31, 41]
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 24


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_tiny_frames(omniops, tracker, tmp_path, size):
    _picture(tmp_path / "frames" / "1.png", size)
    assert _run(omniops, tmp_path / "frames", "--point", "0,0", "--out", tmp_path / "out.mp4").status == 0
    assert len(_frames(tmp_path / "out.mp4")) == 1


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
        assert [round(int(frame[16, 24, 0]), -1) for frame in _frames(tmp_path / "out.mp4")] == [0, 50, 100, 150, 200]
    assert "mpeg4" in codecs


def test_a_file_is_what_is_in_it(omniops, tracker, scripted, tmp_path):
    _video(tmp_path / "v.mp4").rename(tmp_path / "v.jpg")
    assert _run(omniops, tmp_path / "v.jpg", "--point", "1,2", "--out", tmp_path / "v-out.mp4").status == 0
    _picture(tmp_path / "p.png").rename(tmp_path / "p.mp4")
    assert _run(omniops, tmp_path / "p.mp4", "--point", "1,2", "--out", tmp_path / "p-out.png").status == 0


def test_an_animation_is_a_video_and_heif_a_picture(omniops, tracker, scripted, tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="the extra heif")
    first, *rest = [Image.fromarray(_pixels(seed=i)) for i in range(3)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert _run(omniops, tmp_path / "a.gif", "--point", "1,2", "--out", tmp_path / "a-out.mp4").status == 0
    assert [each["frame"] for each in _json(tmp_path / "a-out.json")] == [0, 1, 2]
    heif.from_pillow(first).save(tmp_path / "p.heic")
    assert _run(omniops, tmp_path / "p.heic", "--point", "1,2", "--out", tmp_path / "p-out.png").status == 0


def test_what_is_warned_of_at_opening_is_said_as_it_is(omniops, tracker, tmp_path):
    with av.open(str(_video(tmp_path / "v.mp4"))) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    place, size = packets[4]
    data[place : place + size] = bytes(size)
    (tmp_path / "v.mp4").write_bytes(data)
    result = _run(omniops, tmp_path / "v.mp4", "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    damaged, last = result.err.strip().splitlines()
    assert damaged.endswith("v.mp4 is damaged: 5 frames can be decoded, 1 cannot")
    assert last.endswith("v.mp4 is not whole: the masks of 5 of 5 frames were kept")


def test_frames_with_damaged_exif_are_whole(omniops, tracker, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    Image.fromarray(_pixels()).save(tmp_path / "frame.jpg", exif=exif)
    data = bytearray((tmp_path / "frame.jpg").read_bytes())
    data[data.index(b"Exif") + 15] = 40  # entries
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.jpg").write_bytes(data)
    result = _run(omniops, tmp_path / "frames", "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert (result.status, "Corrupt EXIF" in result.err) == (0, True)


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
    path, out = _video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    for where, frames in ((4, list(range(4))), (1, [0] if first == 0 else [2, 3])):
        tracker.at = {where: happening}
        result = _run(omniops, path, "--point", f"1,2@{first}", "--out", out, "--overwrite")
        assert result.status == status
        kept = f"the masks of {len(frames)} of 6 frames were kept"
        assert result.err.strip().splitlines() == [f"omniops: error: {said}: {kept}"]
        assert [each["frame"] for each in _json(tmp_path / "out.json")] == frames
        assert len(_frames(out)) == len(frames)
        assert f"Wrote {out}" in result.out
        assert not (tmp_path / "out.jsonl").exists()


def test_nothing_is_written_before_the_first_mask(omniops, tracker, tmp_path):
    tracker.at = {0: KeyboardInterrupt()}
    result = _run(omniops, _video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert (result.status, result.out) == (130, "")
    assert "the masks of 0 of 6 frames were kept" in result.err
    assert [each.name for each in tmp_path.iterdir()] == ["v.mp4"]


def test_a_frame_that_cannot_be_decoded_ends_the_masks(omniops, loaded, tmp_path):
    for i in range(5):
        _picture(tmp_path / "frames" / f"{i}.png", seed=i)
    damaged = tmp_path / "frames" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = _run(omniops, tmp_path / "frames", "--point", "1,2@1", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    reason, last = result.err.strip().splitlines()
    assert "3.png" in reason
    assert last.endswith("frames is not whole: the masks of 3 of 5 frames were kept")
    assert [each["frame"] for each in _json(tmp_path / "out.json")] == [0, 1, 2]
    assert len(_frames(tmp_path / "out.mp4")) == 3


def test_a_video_that_breaks_off_keeps_its_masks(omniops, loaded, tmp_path):
    path = _video(tmp_path / "v.mp4", frames=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: -len(whole) // 8])
    result = _run(omniops, path, "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    (reason, last) = result.err.strip().splitlines()
    assert "breaks off after" in reason
    assert f"{path} is not whole: the masks of" in last
    frames = [each["frame"] for each in _json(tmp_path / "out.json")]
    assert frames == list(range(len(frames)))
    assert 0 < len(frames) < 8


def test_a_disk_that_is_full_keeps_the_masks_that_are_known(omniops, tracker, tmp_path, monkeypatch):
    def full(self, frame, time=None):
        raise OSError("cannot write out.mp4: No space left on device")

    monkeypatch.setattr(VideoWriter, "write", full)
    result = _run(omniops, _video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 1
    assert "cannot write out.mp4: No space left on device: the masks of 1 of 6 frames were kept" in result.err
    assert len(_json(tmp_path / "out.json")) == 1


def test_records_that_cannot_become_one_file_stay_as_lines(omniops, tracker, tmp_path, monkeypatch):
    def full(path, value, overwrite, indent=None):
        raise errors.CommandError(f"cannot write {path}: No space left on device", status=1)

    monkeypatch.setattr(outputs, "write_json", full)
    result = _run(omniops, _video(tmp_path / "v.mp4"), "--point", "1,2@3", "--out", tmp_path / "out.mp4")
    assert (result.status, result.out) == (1, "")
    (line,) = result.err.splitlines()
    assert f"cannot write {tmp_path}/out.json: No space left on device; {tmp_path}/out.jsonl has what was found" in line
    assert line.endswith("the masks of 6 of 6 frames were kept")
    lines = [json.loads(each) for each in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["frame"] for each in lines] == [3, 2, 1, 0, 4, 5]  # as they were found
    assert not (tmp_path / "out.json").exists()


def test_records_have_the_times_of_their_frames(omniops, tracker, tmp_path):
    assert _run(omniops, _video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4").status == 0
    assert [each["time"] for each in _json(tmp_path / "out.json")] == pytest.approx([i / 25 for i in range(6)])
    _picture(tmp_path / "frames" / "1.png")
    assert _run(omniops, tmp_path / "frames", "--point", "1,2", "--out", tmp_path / "folder.mp4").status == 0
    assert "time" not in _json(tmp_path / "folder.json")[0]


# Wrong use, all of it before the model is loaded.


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing to look for"),
        (("--everything", "--point", "1,2"), "--everything takes no --point and no --box"),
        (("--everything", "--box", "1,2,3,4"), "--everything takes no --point and no --box"),
        (("--point", "40,3"), "--point 40,3: it is outside: PICTURE has 40 x 30 pixels"),
        (("--point", "-1,3"), "--point -1,3: it is outside"),
        (("--point", "nan,3"), "--point nan,3: it is outside"),
        (("--point", "1,2@0"), "is a picture, which has no frames"),
        (("--point", "1,2,2"), "--point must be X,Y or X,Y,LABEL, with LABEL 1 or 0, then @FRAME"),
        (("--point", "1"), "got '1'"),
        (("--point", "one,2"), "got 'one,2'"),
        (("--point", "1,2#0"), "got '1,2#0'"),
        (("--point", "1,2@x"), "got '1,2@x'"),
        (("--point", ""), "got ''"),
        (("--point", "1,2,0"), "object 1 is only told where it is not"),
        (("--point", "1,2", "--point", "1,2,0#2"), "object 2 is only told where it is not"),
        (("--box", "1,2,3"), "--box must be X0,Y0,X1,Y1, then @FRAME"),
        (("--box", "30,2,10,20"), "it is inside out"),
        (("--box", "3,20,10,20"), "it is inside out"),
        (("--box", "3,2,41,20"), "--box 3,2,41,20: it is outside: PICTURE has 40 x 30 pixels"),
        (
            ("--box", "1,2,3,4", "--box", "1,2,5,6"),
            "--box 1,2,5,6: object 1 has a box there: for another object add #2",
        ),
        (("--point", "1,2", "--image-size", "100"), "--image-size must be a positive multiple of 32, got 100"),
        (("--point", "1,2", "--out", "masks.jpg"), "cannot write masks.jpg: what is made of PICTURE ends with .png"),
        (("--point", "1,2", "--out", ".png"), "--out .png: a name is missing before .png"),
        (("--point", "1,2", "--out", "/"), "cannot write /: what is made of PICTURE ends with .png"),
        (("--point", "1,2", "--out", ""), "cannot write .: what is made of PICTURE ends with .png"),
        (("--point", "inf,2"), "--point inf,2: it is outside"),
        (("--box", "nan,2,3,4"), "--box nan,2,3,4: it is inside out"),
        (("--box", "1,2,inf,4"), "--box 1,2,inf,4: it is outside"),
        (("--point", "1,2", "--device", "foo"), "unknown device 'foo'"),
        (
            ("--point", "1,2", "--random-weights", "--model", "x.pt"),
            "--model tiny, small, base-plus, large; got 'x.pt'",
        ),
    ],
)
def test_wrong_use_of_a_picture(fails, never_loaded, tmp_path, monkeypatch, arguments, reason):
    path = _picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert reason.replace("PICTURE", str(path)) in fails("segment", str(path), *arguments, status=2)
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--point", "1,2@6"), "--point 1,2@6: VIDEO has 6 frames, the first of which is 0"),
        (("--box", "1,2,3,4@99"), "--box 1,2,3,4@99: VIDEO has 6 frames"),
        (("--point", "48,2"), "--point 48,2: it is outside: VIDEO has 48 x 32 pixels"),
        (("--point", "1,2,0@1", "--point", "1,2@3"), "object 1 is only told where it is not"),
        (("--everything",), "--everything is for pictures"),
        (
            ("--point", "1,2", "--out", "masks.png"),
            "cannot write masks.png: what is made of VIDEO, which is no picture that Pillow can read, ends with .mp4",
        ),
    ],
)
def test_wrong_use_of_a_video(fails, never_loaded, tmp_path, monkeypatch, arguments, reason):
    path = _video(tmp_path / "v.mp4")
    monkeypatch.chdir(tmp_path)
    assert reason.replace("VIDEO", str(path)) in fails("segment", str(path), *arguments, status=2)
    assert [each.name for each in tmp_path.iterdir()] == ["v.mp4"]


def test_what_is_no_picture_and_no_video(fails, never_loaded, tmp_path):
    point = ("--point", "1,2", "--device", "cpu")
    assert fails("segment", str(tmp_path / "none.jpg"), *point, status=2).endswith(f"no such file: {tmp_path}/none.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    line = fails("segment", str(tmp_path / "text.jpg"), *point, status=2)
    assert f"{tmp_path}/text.jpg has no frame" in line or "text.jpg is not a video that FFmpeg can read" in line
    assert line.endswith("; nor is it a picture that Pillow can read")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "empty.mp4 is not a video" in fails("segment", str(tmp_path / "empty.mp4"), *point, status=2)
    (tmp_path / "frames").mkdir()
    assert "frames has no pictures" in fails("segment", str(tmp_path / "frames"), *point, status=2)
    damaged = _picture(tmp_path / "a.png")
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert f"cannot read {damaged}" in fails("segment", str(damaged), *point, status=2)
    for i, size in enumerate([(40, 30), (30, 40)]):
        _picture(tmp_path / "frames" / f"{i}.png", size)
    assert "must be of one size" in fails("segment", str(tmp_path / "frames"), *point, status=2)


def test_an_input_is_never_overwritten(fails, never_loaded, tmp_path):
    point = ("--point", "1,2", "--device", "cpu", "--out")
    picture, video = _picture(tmp_path / "a.png"), _video(tmp_path / "v.mp4")
    overlay = _picture(tmp_path / "b-overlay.jpg")
    (tmp_path / "link.png").symlink_to(picture)
    before = {each: each.read_bytes() for each in (picture, video, overlay)}
    for source, out in ((picture, "a.png"), (picture, "link.png"), (overlay, "b.png"), (video, "v.mp4")):
        line = fails("segment", str(source), *point, str(tmp_path / out), status=2)
        assert line.endswith("would be overwritten: it is what is read, so --out must be another")
        fails("segment", str(source), *point, str(tmp_path / out), "--overwrite", status=2)
    assert all(each.read_bytes() == content for each, content in before.items())


@pytest.mark.parametrize(("name", "theirs"), [
    ("p.png", ["out.png", "out.json", "out-overlay.jpg"]), ("v.mp4", ["out.mp4", "out.json", "out.jsonl"]),
])  # fmt: skip
def test_what_is_there_is_replaced_where_that_is_asked_for(omniops, fails, scripted, tracker, tmp_path, name, theirs):
    path = _picture(tmp_path / name) if name == "p.png" else _video(tmp_path / name)
    command = ("segment", str(path), "--point", "1,2", "--device", "cpu", "--out", str(tmp_path / theirs[0]))
    for each in theirs:
        (tmp_path / each).write_text("another's")
        line = fails(*command, status=2)
        assert line.endswith(f"{tmp_path / each} is there already: --overwrite replaces what is there")
        assert (tmp_path / each).read_text() == "another's"
        (tmp_path / each).unlink()
    for each in theirs:
        (tmp_path / each).symlink_to("nowhere")
    assert all(each in fails(*command, status=2) for each in theirs)
    for each in theirs:
        (tmp_path / each).unlink()
        (tmp_path / each).write_text("another's")
    assert omniops(*command, "--overwrite").status == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [name, *(each for each in theirs if not each.endswith(".jsonl"))]
    )
    assert len(_json(tmp_path / "out.json")) == (1 if name == "p.png" else 6)


@pytest.mark.parametrize("everything", [False, True])
def test_random_weights_show_something_soon_and_are_named(omniops, tmp_path, everything):
    path, out = _picture(tmp_path / "a.png", (300, 200)), tmp_path / "out.png"
    what = ("--everything",) if everything else ("--point", "1,2", "--image-size", "64")
    result = _run(omniops, path, *what, "--random-weights", "--out", out)
    assert (result.status, result.err) == (0, "")
    assert any("random weights: its masks mean nothing" in each for each in result.notes)
    if everything:
        assert "masks of 16 points" in result.out
        assert "The weights are random" in result.out
        assert len(_json(tmp_path / "out.json")) > 0
        assert np.array(Image.open(out)).any()


def test_results_that_cannot_be_written_are_refused_before_the_work(fails, never_loaded, tmp_path):
    path = _picture(tmp_path / "a.png")
    point = ("segment", str(path), "--point", "1,2", "--device", "cpu", "--out")
    (tmp_path / "x-overlay.jpg").mkdir()
    assert "it is a folder" in fails(*point, str(tmp_path / "x.png"), status=2)
    (tmp_path / "y.json").mkdir()
    assert "it is a folder" in fails(*point, str(tmp_path / "y.png"), status=2)
    assert "cannot write" in fails(*point, str(path / "below.png"), status=2)


@pytest.mark.parametrize(("module", "package"), [("transformers", "transformers"), ("av", "av"), ("PIL", "pillow")])
def test_a_missing_package_is_named_before_the_work(fails, never_loaded, monkeypatch, tmp_path, module, package):
    path = _picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, module, None)
    line = fails("segment", str(path), "--point", "1,2", status=1)
    assert line.endswith(f"SAM 2 needs {package}, which is not installed: pip install 'omniops[sam2]'")


def test_a_version_of_transformers_without_sam_2_is_named(fails, never_loaded, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "omniops.sam2.architectures", None)
    line = fails("segment", str(_picture(tmp_path / "a.png")), "--point", "1,2", status=1)
    assert line.endswith("pip install --upgrade 'omniops[sam2]'")


def test_weights_that_are_missing_or_wrong(fails, monkeypatch, tmp_path):
    point = ("segment", str(_picture(tmp_path / "a.png")), "--point", "1,2", "--device", "cpu")
    out = ("--out", str(tmp_path / "out.png"))
    missing = tmp_path / "none.pt"
    assert f"no checkpoint at {missing}" in fails(*point, *out, "--model", str(missing), status=2)
    (tmp_path / "text.pt").write_text("hello")
    assert "no checkpoint" in fails(*point, *out, "--model", str(tmp_path / "text.pt"), status=1)
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    assert "not a checkpoint of SAM 2" in fails(*point, *out, "--model", str(tmp_path / "other.pt"), status=1)
    seen = []

    def unreachable(name, *args, **kwargs):
        seen.append(name)
        raise ConnectionError("cannot fetch tiny: download it and put it there\nand more")

    monkeypatch.setattr(sam2, "load", unreachable)
    line = fails(*point, *out, status=1)
    assert line == "omniops: error: cannot fetch tiny: download it and put it there"
    assert seen == ["tiny"]


def test_the_names_of_results_without_out(omniops, scripted, tracker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    assert _run(omniops, _picture(Path("in/a.png")), "--point", "1,2").status == 0
    assert _run(omniops, _video(Path("in/v.mp4")), "--point", "1,2").status == 0
    assert sorted(each.name for each in tmp_path.glob("*.*")) == [
        "omniops-mask-overlay.jpg", "omniops-mask.json", "omniops-mask.png", "omniops-video.json", "omniops-video.mp4",
    ]  # fmt: skip


def test_its_help_has_examples(omniops):
    result = omniops("segment", "--help")
    assert result.status == 0
    assert result.out.count("Example: omniops segment") == 3
    assert "[@FRAME][#OBJECT]" in result.out
