"""What other tools read of our results: supervision, pycocotools, and what FiftyOne's importer asks of a file.

FiftyOne needs a database, and a gigabyte. Its COCODetectionDatasetImporter (1.22.1) was run by hand on the files of
both of COCO's formats that ``data_set`` gives, and read all masks pixel for pixel.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures need Pillow")

from PIL import Image

from omniops.annotations import from_masks, save, to_frame
from omniops.sam2 import rle
from omniops.sam2.checkpoints import load
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator


@pytest.fixture(scope="module")
def supervision():
    return pytest.importorskip("supervision", reason="supervision reads the results")


@pytest.fixture(scope="module")
def generated():
    """The masks of a picture in each output mode."""
    torch.manual_seed(0)
    model = load("tiny", "cpu", "float32", image_size=64, random_weights=True)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    options = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.99}
    found = {}
    for mode in ("binary_mask", "uncompressed_rle", "coco_rle"):
        found[mode] = SAM2AutomaticMaskGenerator(model, **options, output_mode=mode).generate(picture)
    return found


@pytest.fixture
def data_set(masks, pixels, tmp_path):
    """Annotations whose picture is there."""
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    return from_masks(
        masks[:2],
        ids=[4, 9],
        labels=["truck", "wheel"],
        file_name=str(tmp_path / "images" / "a.png"),
        scores=[0.75, 0.5],
    )


@pytest.mark.parametrize("mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
def test_supervision_reads_what_the_generator_returns(supervision, generated, mode):
    detections = supervision.Detections.from_sam(generated[mode])
    expected = sorted(generated["binary_mask"], key=lambda record: -record["area"])
    assert len(detections) == len(expected) >= 5
    assert detections.mask.dtype == bool
    assert np.array_equal(detections.mask, [record["segmentation"] for record in expected])
    assert detections.area.tolist() == [record["area"] for record in expected]
    for box, mask in zip(detections.xyxy, detections.mask, strict=True):
        rows, columns = mask.nonzero()
        ends = [columns.min(), rows.min(), columns.max(), rows.max()] if mask.any() else [0, 0, 0, 0]
        assert box.tolist() == ends  # from the first pixel to the last, as the official generator has it
    assert len(supervision.Detections.from_sam([])) == 0


def test_pycocotools_reads_what_the_generator_returns(generated):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools reads run lengths")
    for record, expected in zip(generated["coco_rle"], generated["binary_mask"], strict=True):
        assert np.array_equal(coco.decode(record["segmentation"]), expected["segmentation"])
        assert coco.area(record["segmentation"]) == record["area"]
    for record, expected in zip(generated["uncompressed_rle"], generated["binary_mask"], strict=True):
        encoded = coco.frPyObjects(record["segmentation"], *record["segmentation"]["size"])
        assert np.array_equal(coco.decode(encoded), expected["segmentation"])


@pytest.mark.parametrize("format", ["coco", "coco-polygons"])
def test_supervision_reads_data_sets_of_coco(supervision, data_set, masks, tmp_path, format):
    (path,) = save(data_set, tmp_path / "labels" / "a", format)
    read = supervision.DetectionDataset.from_coco(str(tmp_path / "images"), str(path), force_masks=True)
    assert read.classes == ["truck", "wheel"]
    ((_, _, detections),) = list(read)
    assert detections.class_id.tolist() == [0, 1]
    assert detections.xyxy.tolist() == [[3, 2, 30, 20], [5, 8, 14, 29]]
    if format == "coco":
        assert np.array_equal(detections.mask, masks[:2])
    else:  # supervision colours the outlines too
        for found, mask in zip(detections.mask, masks, strict=False):
            padded = np.pad(mask, 1)
            beside = padded[:-2, :-2] | padded[:-2, 1:-1] | padded[1:-1, :-2]
            assert found[mask].all()
            assert not (found & ~mask & ~beside).any()


def test_supervision_reads_data_sets_of_yolo(supervision, data_set, masks, tmp_path):
    _, classes = save(data_set, tmp_path / "labels" / "a", "yolo")
    read = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "images"), str(tmp_path / "labels"), str(classes), force_masks=True
    )
    assert read.classes == ["truck", "wheel"]
    ((_, _, detections),) = list(read)
    assert detections.class_id.tolist() == [0, 1]
    assert np.array_equal(detections.mask[0], masks[0])
    # Two parts, and the line between them: from row 9 to row 22.
    assert detections.mask[1][masks[1]].all()
    assert np.argwhere(detections.mask[1] & ~masks[1])[:, 0].tolist() == list(range(10, 22))


@pytest.mark.parametrize("format", ["coco", "coco-polygons"])
def test_files_have_what_the_importer_of_fiftyone_asks_for(data_set, tmp_path, format):
    (path,) = save(data_set, tmp_path / "labels" / "a", format)
    coco = json.loads(path.read_text())
    (image,) = coco["images"]
    assert (tmp_path / "images" / image["file_name"]).exists()
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert len(coco["annotations"]) == 2
    for record, label in zip(coco["annotations"], ("truck", "wheel"), strict=True):
        assert record["image_id"] == image["id"]
        assert names[record["category_id"]] == label
        x, y, width, height = record["bbox"]
        assert 0 <= x < x + width <= image["width"]
        assert 0 <= y < y + height <= image["height"]
        assert record["iscrowd"] == 0
        assert isinstance(record["score"], float)
        if format == "coco":
            assert record["segmentation"]["size"] == [image["height"], image["width"]]
            assert isinstance(record["segmentation"]["counts"], str)
        else:
            assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in record["segmentation"])


def test_pycocotools_reads_the_lines_of_a_video(masks):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools reads run lengths")
    line = json.loads(json.dumps(to_frame(from_masks(masks), 5, 0.2)))
    for found, mask in zip(line["objects"], masks, strict=True):
        assert np.array_equal(coco.decode(found["segmentation"]), mask)
        assert coco.toBbox(found["segmentation"]).tolist() == found["bbox"]
        assert np.array_equal(rle.decode(found["segmentation"]), mask)
