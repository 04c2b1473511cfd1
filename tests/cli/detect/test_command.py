"""omniops detect: pictures of every kind, names, results, and every error."""

from __future__ import annotations

import functools
import json
import os
import sys
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from omniops import detection
from omniops.cli import pictures
from omniops.cli.common import CommandError
from omniops.cli.detect import command as detect
from omniops.detection import coco

SMALL = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 5}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """What the detectors look at, not what they are."""
    for name in ("faster_rcnn_resnet50_fpn_carafe", "mask_rcnn_resnet50_fpn_carafe"):
        monkeypatch.setattr(detection, name, functools.partial(getattr(detection, name), **SMALL))


@pytest.fixture
def scripted(monkeypatch):
    """In place of a detector: a surely found truck, an unsure person, masks of the left half; and what it was shown."""
    shown = []

    def detector(images):
        (image,) = images
        shown.append(image)
        height, width = image.shape[1:]
        masks = torch.zeros(2, 1, height, width, dtype=torch.bool)
        masks[:, :, :, : (width + 1) // 2] = True
        boxes = torch.tensor([[0, 0, width / 2, height], [1.5, 2, 3, 5]])
        return [{"boxes": boxes, "labels": torch.tensor([8, 1]), "scores": torch.tensor([0.9, 0.3]), "masks": masks}]

    monkeypatch.setattr(detect, "load_detector", lambda *args, **kwargs: detector)
    return shown


def _picture(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _run(omniops, *arguments):
    return omniops("detect", *map(str, arguments), "--random-weights", "--device", "cpu")


def _results(out):
    return json.loads((out / "detections.json").read_text())


@pytest.mark.parametrize("kind", ["mask", "faster"])
def test_it_detects_with_weights_from_disk(omniops, tmp_path, kind):
    torch.manual_seed(1)
    build = getattr(detection, f"{kind}_rcnn_resnet50_fpn_carafe")
    expected = build(box_score_thresh=0.0, mask_threshold=0.5).eval()
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    path, out = _picture(tmp_path / "street.png"), tmp_path / "out"
    result = omniops(
        "detect", str(path), "--model", f"{kind}-rcnn-r50-carafe", "--weights", str(tmp_path / "weights.pth"),
        "--out", str(out), "--threshold", "0", "--device", "cpu",
    )  # fmt: skip
    assert (result.status, result.err.strip()) == (0, "")
    with torch.no_grad():
        (found,) = expected([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255])
    results = _results(out)
    assert len(results) == len(found["scores"]) > 0
    for record, box, label, score in zip(results, found["boxes"], found["labels"], found["scores"], strict=True):
        assert record["file_name"] == path.as_posix()
        assert record["image_id"] == 1
        assert record["category_id"] == detection.COCO_CATEGORY_IDS[label]
        assert record["score"] == pytest.approx(float(score), abs=1e-5)
        assert record["bbox"][:2] == pytest.approx(box[:2].tolist(), abs=1e-2)
        assert [a + b for a, b in zip(record["bbox"][:2], record["bbox"][2:], strict=True)] == pytest.approx(
            box[2:].tolist(), abs=1e-2
        )
        assert ("segmentation" in record) == (kind == "mask")
    assert f"{path} -> {out / 'street.jpg'}: " in result.out
    with Image.open(out / "street.jpg") as drawn:
        assert drawn.size == (40, 30)


def test_masks_are_coco_s_run_lengths(omniops, scripted, tmp_path):
    _run(omniops, _picture(tmp_path / "a.png", (4, 3)), "--out", tmp_path / "out")
    truck, _ = _results(tmp_path / "out")
    assert truck["category_id"] == 8
    assert truck["bbox"] == [0, 0, 2, 3]
    decoded = coco.rle.decode({**truck["segmentation"], "counts": truck["segmentation"]["counts"].encode()})
    assert decoded.tolist() == [[1, 1, 0, 0]] * 3


def test_the_threshold_is_for_drawing_alone(omniops, scripted, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (200, 150), "grey").save(path)
    drawn = {}
    for threshold in ("0.2", "0.5", "0.95"):
        result = _run(omniops, path, "--out", tmp_path / threshold, "--threshold", threshold)
        assert len(_results(tmp_path / threshold)) == 2
        drawn[threshold] = np.array(Image.open(tmp_path / threshold / "a.jpg")).astype(int)
        words = {"0.2": "1 truck, 1 person", "0.5": "1 truck", "0.95": "nothing that scores 0.95"}[threshold]
        assert result.out.splitlines()[0].endswith(f": {words}")
    assert abs(drawn["0.95"] - 128).max() <= 2
    assert (abs(drawn["0.5"] - 128)[30:, :98].max(axis=2) > 20).all()
    assert abs(drawn["0.5"] - 128)[30:, 120:].max() <= 2
    assert abs(drawn["0.2"] - drawn["0.5"]).max() > 20


def test_same_names_do_not_overwrite_each_other(omniops, scripted, tmp_path):
    paths = [
        _picture(tmp_path / name, seed=seed) for seed, name in enumerate(["a/x.png", "a/x.bmp", "b/x.png", "b/X.png"])
    ]
    out = tmp_path / "out"
    result = _run(omniops, tmp_path / "a", tmp_path / "b", paths[0], "--out", out)
    assert result.status == 0
    names = [path.name for path in out.iterdir()]
    assert len({name.casefold() for name in names}) == len(names) == 5
    assert {result["file_name"] for result in _results(out)} == {path.as_posix() for path in paths}
    assert sorted({result["image_id"] for result in _results(out)}) == [1, 2, 3, 4]


def test_nothing_is_written_outside_out(omniops, scripted, tmp_path, monkeypatch):
    _picture(tmp_path / "outer.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert _run(omniops, "../outer.png", "--out", "out").status == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "outer.png", "work/out/detections.json", "work/out/outer.jpg",
    ]  # fmt: skip


def test_an_input_is_never_overwritten(fails, scripted, tmp_path):
    path = _picture(tmp_path / "a.jpg")
    before = path.read_bytes()
    line = fails("detect", str(tmp_path), "--random-weights", "--out", str(tmp_path), status=2)
    assert f"{path} would be overwritten" in line
    assert path.read_bytes() == before


def test_ids_are_those_of_coco_s_names(omniops, scripted, tmp_path):
    for name in ("000000397133.png", "000000000139.png"):
        _picture(tmp_path / "in" / name)
    _run(omniops, tmp_path / "in", "--out", tmp_path / "out")
    assert {result["image_id"] for result in _results(tmp_path / "out")} == {397133, 139}
    _picture(tmp_path / "in" / "139.png")  # the same number
    _run(omniops, tmp_path / "in", "--out", tmp_path / "out", "--overwrite")
    assert {result["image_id"] for result in _results(tmp_path / "out")} == {1, 2, 3}


def test_bad_pictures_do_not_lose_the_others(omniops, scripted, tmp_path):
    folder = tmp_path / "in"
    for name in ("1.png", "3.png", "5.png"):
        _picture(folder / name)
    (folder / "2.jpg").write_text("hello")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:500])
    (folder / "4.png").symlink_to(folder / "gone.png")
    (folder / "6.gif").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    result = _run(omniops, folder, "--out", tmp_path / "out")
    assert result.status == 1
    *reasons, last = result.err.strip().splitlines()
    assert last == "omniops: error: 4 of 6 images failed"
    assert [next(name for name in ("2.jpg", "3.png", "4.png", "6.gif") if name in line) for line in reasons] == [
        "2.jpg", "3.png", "4.png", "6.gif",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.jpg", "5.jpg", "detections.json"]
    results = _results(tmp_path / "out")
    assert {result["image_id"] for result in results} == {1, 5} or len(results) == 4


def test_broken_files_of_every_format_do_not_lose_the_others(omniops, scripted, tmp_path):
    """Decoders raise what they like: Pillow's of AVIF a SyntaxError."""
    folder = tmp_path / "in"
    for name in ("0.png", "z.png"):
        _picture(folder / name)
    names = [f"broken{ending}" for ending in pictures.KINDS]
    for name in names:
        path = folder / name
        try:
            _picture(path)
            broken = path.read_bytes()[: path.stat().st_size * 9 // 10]
        except (OSError, KeyError, ValueError):  # this Pillow came without the format
            broken = b"\0\0\0\x1cftypavif" + bytes(99)
        path.write_bytes(broken)
    result = _run(omniops, folder, "--out", tmp_path / "out")
    assert result.status == 1
    *reasons, last = result.err.strip().splitlines()
    assert last == f"omniops: error: {len(names)} of {len(names) + 2} images failed"
    for line, name in zip(reasons, sorted(names), strict=True):
        assert name in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.jpg", "detections.json", "z.jpg"]
    assert {result["file_name"] for result in _results(tmp_path / "out")} == {
        (folder / name).as_posix() for name in ("0.png", "z.png")
    }


def test_an_interrupt_keeps_what_was_found(omniops, scripted, tmp_path, monkeypatch):
    paths = [_picture(tmp_path / name) for name in ("a.png", "b.png", "c.png", "d.png")]
    paths[1].write_text("hello")
    read = detect.read_picture

    def interrupted(path, data=None):
        if path == paths[3]:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(detect, "read_picture", interrupted)
    result = _run(omniops, *paths, "--out", tmp_path / "out")
    assert result.status == 130
    reason, last = result.err.strip().splitlines()
    assert "b.png" in reason
    assert last == "omniops: error: interrupted: 2 of 4 images were done"
    assert f"Wrote 4 detections in 2 pictures to {tmp_path / 'out' / 'detections.json'}" in result.out
    assert [result["image_id"] for result in _results(tmp_path / "out")] == [1, 1, 3, 3]


def test_a_picture_that_cannot_be_written_is_named(omniops, scripted, tmp_path, monkeypatch):
    paths = [_picture(tmp_path / name) for name in ("a.png", "b.png")]
    read, out = detect.read_picture, tmp_path / "out"

    def read_while_another_writes(path, data=None):
        if path == paths[0]:
            (out / "a.jpg").write_text("another's")
        return read(path)

    monkeypatch.setattr(detect, "read_picture", read_while_another_writes)
    result = _run(omniops, *paths, "--out", out)
    assert result.status == 1
    assert f"cannot write {out / 'a.jpg'}: meanwhile it is there" in result.err
    assert (out / "a.jpg").read_text() == "another's"
    assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "b.jpg", "detections.json"]


def test_what_is_there_is_replaced_where_that_is_asked_for(omniops, fails, scripted, tmp_path):
    path, out = _picture(tmp_path / "p.png"), tmp_path / "out"
    theirs = [out / name for name in ("p.jpg", "detections.json", "detections.jsonl")]
    out.mkdir()
    for file in theirs:
        file.write_text("another's")
    command = ("detect", str(path), "--out", str(out), "--random-weights", "--device", "cpu")
    line = fails(*command, status=2)
    assert line == (
        f"omniops: error: {', '.join(map(str, theirs))} are there already: --overwrite replaces what is there"
    )
    assert not scripted
    assert all(file.read_text() == "another's" for file in theirs)
    assert omniops(*command, "--overwrite").status == 0
    assert len(_results(out)) == 2
    assert sorted(path.name for path in out.iterdir()) == ["detections.json", "p.jpg"]
    assert f"{out / 'p.jpg'}, {out / 'detections.json'} are there already" in fails(*command, status=2)


def test_many_files_in_the_way_are_not_all_named(fails, tmp_path):
    for i in range(12):
        _picture(tmp_path / "in" / f"{i:02}.png")
        _picture(tmp_path / "out" / f"{i:02}.jpg")
    line = fails("detect", str(tmp_path / "in"), "--random-weights", "--out", str(tmp_path / "out"), status=2)
    assert "09.jpg and 2 more are there already" in line


def test_what_is_found_is_written_and_said_as_it_is_found(omniops, scripted, tmp_path, monkeypatch):
    """While the detector looks at the second picture."""
    paths, out = [_picture(tmp_path / name) for name in ("a.png", "b.png")], tmp_path / "out"
    said, names = [], []
    detector = detect.load_detector()

    def detector_that_waits(images):
        deadline = monotonic() + 20
        while len(scripted) == 1 and not said:
            assert monotonic() < deadline, "the first picture is not done beside the second"
            sleep(0.01)
        if scripted:
            lines = (out / "detections.jsonl").read_text().splitlines()
            names.extend(json.loads(line)["file_name"] for line in lines)
            assert (out / "a.jpg").is_file()
        return detector(images)

    monkeypatch.setattr(detect, "load_detector", lambda *args, **kwargs: detector_that_waits)
    monkeypatch.setattr(detect, "print_lines", lambda *lines, above=None: said.extend(lines))
    assert _run(omniops, *paths, "--out", out).status == 0
    assert names == [paths[0].as_posix()] * 2
    assert not (out / "detections.jsonl").exists()


def test_random_weights_are_named(omniops, tmp_path):
    result = _run(omniops, _picture(tmp_path / "a.png"), "--out", tmp_path / "out")
    assert any("random weights: what it finds means nothing" in note for note in result.notes)


def _gradient(dtype, peak):
    return np.linspace(0, peak, 30 * 40).reshape(30, 40).astype(dtype)


@pytest.mark.parametrize(
    "kind", ["grey", "16-bit", "32-bit", "1-bit", "palette", "transparent palette", "RGBA", "CMYK"]
)
def test_every_kind_of_pixels(scripted, omniops, tmp_path, kind):
    """All show the same: dark above, light below."""
    grey = Image.fromarray(_gradient(np.uint8, 255))
    path = tmp_path / ("a.tif" if kind in ("32-bit", "CMYK") else "a.png")
    if kind == "16-bit":
        grey = Image.fromarray(_gradient(np.uint16, 65535))
    elif kind == "32-bit":
        grey = Image.fromarray(_gradient(np.int32, 65535))
    elif kind == "RGBA":
        grey.putalpha(Image.fromarray(np.eye(30, 40, dtype=np.uint8) * 255))
    elif kind != "grey":
        grey = grey.convert({"1-bit": "1", "CMYK": "CMYK"}.get(kind, "P"))
    grey.save(path, **({"transparency": b"\0" * 20} if kind == "transparent palette" else {}))
    result = _run(omniops, path, "--out", tmp_path / "out")
    assert (result.status, result.err.strip()) == (0, "")
    (image,) = scripted
    assert image.shape == (3, 30, 40)
    tolerance = 1 if kind == "1-bit" else 0.02
    expected = torch.from_numpy(_gradient(np.float64, 1)).float()
    torch.testing.assert_close(image, expected.expand(3, -1, -1), rtol=0, atol=tolerance)
    assert image[:, :10].mean() < 0.25
    assert image[:, 20:].mean() > 0.75


def test_pixels_without_a_white_are_refused(tmp_path):
    for dtype, peak in ((np.float32, 1), (np.int32, 2**30)):
        Image.fromarray(_gradient(dtype, peak)).save(tmp_path / "a.tif")
        with pytest.raises(CommandError, match="neither of 8 nor of 16 bits"):
            pictures.read_picture(tmp_path / "a.tif")


def _rotated(path):
    """Stored 40 x 30, its left half red; to be shown 30 x 40, its top red."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def test_a_picture_is_shown_in_its_exif_orientation(scripted, omniops, tmp_path):
    assert _run(omniops, _rotated(tmp_path / "a.png"), "--out", tmp_path / "out").status == 0
    (image,) = scripted
    assert image.shape == (3, 40, 30)
    assert image[0, :20].min() == 1
    assert image[0, 20:].max() == 0
    with Image.open(tmp_path / "out" / "a.jpg") as drawn:
        assert drawn.size == (30, 40)
        assert 0x0112 not in drawn.getexif()


def test_a_picture_is_rotated_or_not_as_its_annotations_are(tmp_path):
    path = _rotated(tmp_path / "a.png")
    assert pictures.read_picture(path, (30, 40)).size == (30, 40)
    assert pictures.read_picture(path, (40, 30)).size == (40, 30)
    with pytest.raises(CommandError, match="has 30 x 40 pixels, its annotations 31 x 40"):
        pictures.read_picture(path, (31, 40))


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (300, 1)])
def test_a_picture_of_any_size(omniops, tmp_path, size):
    path = _picture(tmp_path / "a.png", size)
    result = _run(omniops, path, "--out", tmp_path / "out", "--threshold", "0")
    assert (result.status, result.err.strip()) == (0, "")
    with Image.open(tmp_path / "out" / "a.jpg") as drawn:
        assert drawn.size == size


def test_paths_without_pictures(fails, tmp_path):
    missing = tmp_path / "none.jpg"
    assert fails("detect", str(missing), "--random-weights", status=2).endswith(f"{missing}: No such file or directory")
    (tmp_path / "notes.txt").write_text("")
    assert f"no pictures in {tmp_path}" in fails("detect", str(tmp_path), "--random-weights", status=2)


def test_weights_that_are_missing_or_wrong(fails, tmp_path):
    out = ("--out", str(tmp_path / "out"), "--device", "cpu")
    path = str(_picture(tmp_path / "a.png"))
    assert "--weights coco" in fails("detect", path, *out, status=2)
    assert "exclude each other" in fails("detect", path, "--weights", "x", "--random-weights", *out, status=2)
    missing = tmp_path / "none.pth"
    assert str(missing) in fails("detect", path, "--weights", str(missing), *out, status=2)
    (tmp_path / "text.pth").write_text("hello")
    assert "no checkpoint" in fails("detect", path, "--weights", str(tmp_path / "text.pth"), *out, status=1)
    torch.save({"state_dict": {}}, tmp_path / "nothing.pth")
    said = fails("detect", path, "--weights", str(tmp_path / "nothing.pth"), *out, status=1)
    assert "missing (backbone." in said
    assert "(--model is mask-rcnn-r50-carafe, here for COCO's 80 classes)" in said
    (tmp_path / "empty.pth").touch()
    assert "no checkpoint" in fails("detect", path, "--weights", str(tmp_path / "empty.pth"), *out, status=1)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    line = fails("detect", path, "--weights", str(tmp_path / "other.pth"), *out, status=1)
    assert "missing" in line
    assert "1 unexpected (weight)" in line
    # Nothing listens there.
    line = fails("detect", path, "--weights", "http://127.0.0.1:9/none-0123abcd.pth", *out, status=1)
    assert "cannot fetch" in line


@pytest.mark.parametrize("command", [("detect", "a.png"), ("detect-eval", "--images", ".", "--annotations", "x.json")])
def test_a_missing_package_is_named_before_the_work(fails, monkeypatch, tmp_path, command):
    _picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "omniops.detection.coco")
    monkeypatch.delattr(detection, "coco")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    line = fails(*command, "--random-weights", status=1)
    assert "faster-coco-eval" in line
    assert line.endswith("pip install 'omniops[detect]'")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_to(fails, tmp_path):
    path = _picture(tmp_path / "a.png")
    (tmp_path / "out").mkdir(mode=0o555)
    assert "permission denied" in fails(
        "detect", str(path), "--random-weights", "--out", str(tmp_path / "out"), status=2
    )


def test_out_below_a_file(fails, tmp_path):
    path = _picture(tmp_path / "a.png")
    assert "cannot write" in fails("detect", str(path), "--random-weights", "--out", str(path / "out"), status=2)
