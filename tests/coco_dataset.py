"""A small data set in COCO's format, and detections that are all right."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from omniops.detection import coco

SIZES = [(60, 40), (40, 60), (50, 50), (120, 110), (64, 30)]

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 8, "name": "truck"}, {"id": 90, "name": "toothbrush"}]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Five pictures with rectangles, and their annotations: polygons, run lengths of both kinds, a crowd."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "images").mkdir()
    random = np.random.default_rng(3)
    images, annotations = [], []
    for number, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
        image_id = 100 - number
        for kind in range(4):
            w, h = int(random.integers(8, width * 0.8)), int(random.integers(8, height * 0.8))
            x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
            pixels[y : y + h, x : x + w] = random.integers(60, 256, 3)
            mask = np.zeros((height, width), dtype=np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            compressed = coco.rle.encode(mask)
            plain = np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=0)))
            start = y + x * height
            counts = [start, *plain.tolist(), height * width - start - int(plain.sum())]
            segmentation = {
                0: [[x, y, x + w, y, x + w, y + h, x, y + h]],
                1: {"size": [height, width], "counts": compressed["counts"].decode()},
                2: {"size": [height, width], "counts": counts},
                3: {"size": [height, width], "counts": counts},
            }[kind]
            annotations.append(
                {
                    "id": len(annotations),  # 0 too
                    "image_id": image_id,
                    "category_id": CATEGORIES[kind % 3]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(kind == 3),
                    "segmentation": segmentation,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": image_id, "file_name": f"{number}.png", "width": width, "height": height})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def truth(dataset):
    return json.loads((dataset / "annotations.json").read_text())


def perfect_detections(truth, image):
    """What is on an image, as a detector gives it."""
    labels = {number: label for label, number in enumerate(coco.label_ids(truth)) if label}
    annotations = [x for x in truth["annotations"] if x["image_id"] == image["id"] and not x["iscrowd"]]
    masks = np.zeros((len(annotations), 1, image["height"], image["width"]), dtype=bool)
    for mask, annotation in zip(masks, annotations, strict=True):
        x, y, w, h = annotation["bbox"]
        mask[0, y : y + h, x : x + w] = True
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "labels": torch.tensor([labels[annotation["category_id"]] for annotation in annotations]),
        "scores": torch.linspace(0.9, 0.6, len(annotations)),
        "masks": torch.from_numpy(masks),
    }


def perfect_results(truth):
    """The same of all images as COCO's results, through the same function as a detector's."""
    return [
        result
        for image in truth["images"]
        for result in coco.to_results(perfect_detections(truth, image), image["id"], coco.label_ids(truth))
    ]
