"""CocoDataset: boxes, labels and masks of every kind of annotation, what is left out, and every error."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from shapes_dataset import run_lengths

from omniops.detection import coco
from omniops.detection.trained import Categories
from omniops.detection.training import CocoDataset, hold_out


def _made(tmp_path, objects, size=(8, 6), **more):
    Image.new("RGB", size).save(tmp_path / "a.png")
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "categories": [{"id": 5, "name": "boat"}],
        "annotations": [{"image_id": 1, "category_id": 5, **entry} for entry in objects],
    }
    return CocoDataset(tmp_path, annotations, **{"masks": True, **more})


def test_items_are_what_the_annotations_say(shapes, annotations):
    dataset = CocoDataset(shapes / "images", annotations, masks=True)
    assert (len(dataset), dataset.object_count) == (6, 7)
    assert dataset.categories == Categories((0, 3, 20), ("__background__", "square", "disc"))
    for number, entry in enumerate(annotations["images"]):
        image, target = dataset[number]
        pixels = np.array(Image.open(shapes / "images" / entry["file_name"]))
        assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
        own = [x for x in annotations["annotations"] if x["image_id"] == entry["id"]]
        assert target["labels"].tolist() == [{3: 1, 20: 2}[x["category_id"]] for x in own]
        x, y, w, h = torch.tensor([x["bbox"] for x in own], dtype=torch.float32).view(-1, 4).unbind(1)
        assert torch.equal(target["boxes"], torch.stack([x, y, x + w, y + h], dim=1))
        assert target["masks"].shape == (len(own), entry["height"], entry["width"])
        assert target["masks"].dtype == torch.uint8
        assert ("masks" in CocoDataset(shapes / "images", annotations, masks=False)[number][1]) is False


def test_polygons_and_both_run_lengths_are_the_same_mask(tmp_path):
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:7] = 1
    compressed = coco.rle.encode(np.asfortranarray(mask))
    kinds = [
        [[2, 1, 7, 1, 7, 4, 2, 4]],
        [[2, 1, 5, 1, 5, 4, 2, 4], [5, 1, 7, 1, 7, 4, 5, 4]],
        {"size": [6, 8], "counts": compressed["counts"].decode()},
        run_lengths(mask),
    ]
    dataset = _made(tmp_path, [{"bbox": [2, 1, 5, 3], "segmentation": kind} for kind in kinds])
    for found in dataset[0][1]["masks"]:
        assert np.array_equal(found, mask)


def test_crowds_and_boxes_without_area_are_left_out(tmp_path):
    polygon = [[0, 0, 4, 0, 4, 4]]
    objects = [
        {"bbox": [0, 0, 4, 4], "segmentation": {"size": [6, 8], "counts": [48]}, "iscrowd": 1},
        {"bbox": [3, 3, 0, 2], "segmentation": polygon},
        {"bbox": [3, 3, 2, 0], "segmentation": polygon},
        {"bbox": [9, 1, 4, 4], "segmentation": polygon},
        {"bbox": [-2, -3, 5, 5.5], "segmentation": polygon},
        {"bbox": [4.5, 1, 100, 100], "segmentation": polygon},
    ]
    dataset = _made(tmp_path, objects)
    assert dataset.left_out == {"crowds": 1, "objects without area": 3}
    assert dataset.object_count == 2
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 3, 2.5], [4.5, 1, 8, 6]]


def test_a_category_of_id_0_is_none_of_the_background(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 6}],
        "categories": [{"id": 0, "name": "buoy"}, {"id": 4, "name": "boat"}],
        "annotations": [{"image_id": 1, "category_id": number, "bbox": [1, 1, 3, 3]} for number in (4, 0)],
    }
    dataset = CocoDataset(tmp_path, annotations, masks=False)
    assert dataset.categories.ids == (0, 0, 4)
    assert dataset[0][1]["labels"].tolist() == [2, 1]


@pytest.mark.parametrize(("size", "turned"), [((6, 8), True), ((8, 6), False)])
def test_a_picture_is_turned_where_its_annotations_are(tmp_path, size, turned):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
    annotations = {
        "images": [{"id": 1, "file_name": "b.png", "width": size[0], "height": size[1]}],
        "categories": [{"id": 5, "name": "boat"}],
        "annotations": [],
    }
    found = CocoDataset(tmp_path, annotations, masks=False).picture(0)
    assert np.array_equal(found, np.rot90(pixels, -1) if turned else pixels)


def test_grey_pictures_of_16_bits(tmp_path):
    dataset = _made(tmp_path, [])
    values = np.linspace(0, 65535, 48).reshape(6, 8)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(dataset.picture(0), np.repeat((values // 256).astype(np.uint8)[..., None], 3, 2))
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(ValueError, match=r"cannot read .*a\.png: its pixels have neither 8 nor 16 bits"):
        dataset.picture(0)


def test_a_picture_of_another_size_is_refused(tmp_path):
    dataset = _made(tmp_path, [])
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 9 x 6 pixels, its annotations 8 x 6"):
        dataset[0]
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read .*a\.png"):
        dataset[0]


def test_missing_pictures_are_named(shapes, annotations):
    for number in (1, 2, 3, 4):
        annotations["images"][number]["file_name"] = f"gone/{number}.png"
    with pytest.raises(FileNotFoundError, match=r"4 of 6 pictures are not in .*/1\.png, .*/2\.png, .*/3\.png, \.\.\."):
        CocoDataset(shapes / "images", annotations, masks=False)


def test_names_that_lead_out_of_the_folder(shapes, annotations):
    annotations["images"][0]["file_name"] = "../annotations.json"
    with pytest.raises(ValueError, match=r"the picture \.\./annotations\.json is not in the folder"):
        CocoDataset(shapes / "images", annotations, masks=False)


def test_objects_without_masks(shapes, annotations):
    del annotations["annotations"][2]["segmentation"]
    assert len(CocoDataset(shapes / "images", annotations, masks=False)) == 6
    with pytest.raises(ValueError, match=r"annotations\[2\] has no 'segmentation'.* train Faster R-CNN"):
        CocoDataset(shapes / "images", annotations, masks=True)


def test_no_picture_is_left(shapes, annotations):
    with pytest.raises(ValueError, match="no picture is left"):
        CocoDataset(shapes / "images", annotations, masks=False, image_ids=[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [({"name": "ball"}, "'ball' of id 20 is 'disc' of the detector's"), ({"id": 21}, "'disc' of id 21 is none of")],
)
def test_other_categories_than_the_detector_s(shapes, annotations, change, words):
    categories = Categories.of(annotations)
    annotations["categories"][0].update(change)
    annotations["annotations"] = []
    with pytest.raises(ValueError, match=words):
        CocoDataset(shapes / "images", annotations, masks=False, categories=categories)


def test_fewer_categories_keep_the_detector_s_labels(shapes, annotations):
    categories = Categories.of(annotations)
    annotations["categories"] = annotations["categories"][:1]
    annotations["annotations"] = [entry for entry in annotations["annotations"] if entry["category_id"] == 20]
    dataset = CocoDataset(shapes / "images", annotations, masks=False, categories=categories)
    assert {label for _, target in map(dataset.__getitem__, range(6)) for label in target["labels"].tolist()} == {2}


def test_the_digest_is_of_what_is_trained_on(shapes, annotations):
    def digest(content, **more):
        return CocoDataset(shapes / "images", content, **{"masks": False, **more}).digest()

    first = digest(annotations)
    assert digest(copy.deepcopy(annotations)) == first
    assert digest(annotations, masks=True) != first
    assert digest(annotations, image_ids=[0, 7]) != first
    changed = copy.deepcopy(annotations)
    changed["annotations"][0]["bbox"][0] += 1
    assert digest(changed) != first


def test_what_is_held_out():
    annotations = {"images": [{"id": 3 * number} for number in range(10)]}
    train, validation = hold_out(annotations, 0.3)
    assert (len(train), len(validation)) == (7, 3)
    assert train | validation == {3 * number for number in range(10)}
    assert hold_out({"images": annotations["images"][::-1]}, 0.3) == (train, validation)
    assert hold_out(annotations, 0.3, seed=1) != (train, validation)
    for share, count in ((0.001, 1), (0.99, 9)):
        assert len(hold_out(annotations, share)[1]) == count
    for share in (0, 1, -1):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            hold_out(annotations, share)
    with pytest.raises(ValueError, match="a single picture"):
        hold_out({"images": [{"id": 1}]}, 0.5)
