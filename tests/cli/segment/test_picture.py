"""omniops segment of a picture: masks and pictures written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av", reason="needs PyAV")

from segment_files import half, noise, read_json, run, write_picture

from omniops import sam2
from omniops.cli.segment import model as segment_model
from omniops.drawing import colour_of
from omniops.sam2 import mask_generator, rle
from omniops.sam2.architectures import new

SMALL = ("--random-weights", "--device", "cpu", "--dtype", "float32", "--image-size", "64")
COLOUR = np.array(colour_of(1))


def test_its_masks_are_the_predictors(omniops, tmp_path, model):
    path, out = write_picture(tmp_path / "a.png"), tmp_path / "new" / "out.png"
    result = omniops("segment", str(path), "--point", "10,20", *SMALL, "--out", str(out))
    assert (result.status, result.err.strip()) == (0, "")
    predictor = sam2.SAM2ImagePredictor(model)
    predictor.set_image(noise())
    masks, scores, _ = predictor.predict([[10, 20]], [1])
    best = scores.argmax()
    (record,) = read_json(tmp_path / "new" / "out.json")
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
    path, out = write_picture(tmp_path / "a.png"), tmp_path / "out.png"
    click = ("--point", "1.5,2")
    for prompts, expected in (
        (click, ([(1.5, 2)], [1], None, True)),
        ((*click, "--point", "3,4,0"), ([(1.5, 2), (3, 4)], [1, 0], None, False)),
        (("--box", "1,2,40,30"), (None, None, (1, 2, 40, 30), False)),
        ((*click, "--box", "1,2,30,20"), ([(1.5, 2)], [1], (1, 2, 30, 20), False)),
    ):
        scripted.clear()
        assert run(omniops, path, *prompts, "--out", out, "--overwrite").status == 0
        pixels, asked = scripted
        assert np.array_equal(pixels, noise())
        assert asked == expected
        (record,) = read_json(tmp_path / "out.json")
        assert record["predicted_iou"] == (0.9 if expected[3] else 0.75)
        assert np.array_equal(rle.decode(record["segmentation"]), half(30, 40, "left" if expected[3] else "right"))
        assert ("box" in record) == (expected[2] is not None)


def test_the_overlay_shows_mask_and_prompts(omniops, scripted, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (400, 300), (100, 100, 100)).save(path)
    prompts = ("--point", "100,100", "--point", "300,200,0", "--box", "220,20,380,120")
    assert run(omniops, path, *prompts, "--out", tmp_path / "out.png").status == 0
    drawn = np.array(Image.open(tmp_path / "out-overlay.jpg")).astype(int)

    def near(x, y, colour, within=12):
        return abs(drawn[y, x] - colour).max() <= within

    assert near(20, 280, (100, 100, 100))  # the left half is not of this mask
    assert near(390, 280, 50 + COLOUR // 2)
    assert near(300, 20, COLOUR, within=60)  # of the box, thin and in a JPEG
    assert drawn[100, 100, 1] > drawn[100, 100, 0] + 80  # green
    assert drawn[200, 300, 0] > drawn[200, 300, 1] + 80  # red


def test_several_objects_are_numbered_in_one_picture(omniops, scripted, tmp_path):
    path, out = write_picture(tmp_path / "a.png"), tmp_path / "out.png"
    assert run(omniops, path, "--point", "1,2#7", "--box", "1,2,30,20#3", "--out", out).status == 0
    assert [(record["id"], record["area"]) for record in read_json(tmp_path / "out.json")] == [(3, 600), (7, 600)]
    with Image.open(out) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), np.where(half(30, 40, "left"), 7, 3))
        assert picture.convert("RGB").getpixel((0, 0)) == colour_of(7)
    assert run(omniops, path, "--point", "1,2#300", "--point", "1,2,1#2", "--out", out, "--overwrite").status == 0
    assert np.array_equal(np.array(Image.open(out)), half(30, 40, "left") * np.uint16(300))


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
    path, out = write_picture(tmp_path / "a.png"), tmp_path / "out.png"
    result = run(omniops, path, "--everything", "--grid", "2", "--out", out)
    assert (result.status, result.err.strip()) == (0, "")
    assert "2 masks of 4 points in" in result.out
    assert len(made[0].point_grids[0]) == 4
    assert [record["id"] for record in read_json(tmp_path / "out.json")] == [1, 2]
    assert set(read_json(tmp_path / "out.json")[0]) == {"id", "segmentation", "area", "predicted_iou", "bbox"}
    expected = np.where(inner, 1, np.where(outer, 2, 0))
    assert np.array_equal(np.array(Image.open(out)), expected)


@pytest.mark.parametrize("count", [0, 1])
def test_everything_may_be_nothing_or_one(omniops, loaded, monkeypatch, tmp_path, count):
    mask = half(30, 40, "left")
    _everything(monkeypatch, *[mask] * count)
    out = tmp_path / "out.png"
    result = run(omniops, write_picture(tmp_path / "a.png"), "--everything", "--out", out)
    assert result.status == 0
    assert len(read_json(tmp_path / "out.json")) == count
    assert np.array_equal(np.array(Image.open(out)), (mask if count else ~mask & mask) * np.uint8(255))


def test_everything_runs_with_a_model(omniops, loaded, tmp_path):
    result = run(
        omniops, write_picture(tmp_path / "a.png"), "--everything", "--grid", "2", "--out", tmp_path / "out.png"
    )
    assert (result.status, result.err.strip()) == (0, "")
    assert all("stability_score" in record for record in read_json(tmp_path / "out.json"))


@pytest.mark.parametrize("kind", ["1x1", "grey", "RGBA", "16-bit", "turned"])
def test_every_kind_of_picture(omniops, loaded, tmp_path, kind):
    path, size = tmp_path / "a.png", (40, 30)
    pixels = noise()
    if kind == "1x1":
        size = (1, 1)
        Image.fromarray(noise(size)).save(path)
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
    result = run(omniops, path, "--point", point, "--out", tmp_path / "out.png")
    assert (result.status, result.err.strip()) == (0, "")
    assert Image.open(tmp_path / "out.png").size == size
    assert Image.open(tmp_path / "out-overlay.jpg").size == size


def test_scores_that_are_no_numbers_are_an_error(fails, tmp_path, monkeypatch):
    torch.manual_seed(0)
    broken = new("tiny", image_size=64)
    broken.sam_mask_decoder.iou_prediction_head.layers[-1].bias.data.fill_(float("nan"))
    monkeypatch.setattr(segment_model, "load_model", lambda *args: broken)
    arguments = ("--device", "cpu", "--point", "1,1", "--out")
    line = fails("segment", str(write_picture(tmp_path / "a.png")), *arguments, str(tmp_path / "o.png"), status=1)
    assert "no finite numbers" in line
    assert not (tmp_path / "o.png").exists()
