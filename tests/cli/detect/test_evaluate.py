"""omniops detect-eval: right figures, the same on several processes, and every error."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from coco_dataset import dataset as dataset
from coco_dataset import perfect_results
from coco_dataset import truth as truth

from omniops import detection
from omniops.cli.detect import evaluate
from omniops.detection import coco

BUILD = "mask_rcnn_resnet50_fpn_carafe"
SMALL = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "changed.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(getattr(detection, BUILD)().state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(detection, BUILD, functools.partial(getattr(detection, BUILD), **SMALL))


@pytest.fixture
def scripted(monkeypatch, truth):
    """In place of a detector: it finds all, told by the picture's size."""
    perfect = perfect_results(truth)

    def detector(images):
        size = tuple(images[0].shape[:0:-1])
        image = next(image for image in truth["images"] if (image["width"], image["height"]) == size)
        results = [result for result in perfect if result["image_id"] == image["id"]]
        masks = np.stack(
            [
                coco.rle.decode({**result["segmentation"], "counts": result["segmentation"]["counts"].encode()})
                for result in results
            ]
        )
        boxes = torch.tensor([result["bbox"] for result in results])
        boxes[:, 2:] += boxes[:, :2]
        labels = [detection.COCO_CATEGORY_IDS.index(result["category_id"]) for result in results]
        scores = torch.tensor([result["score"] for result in results])
        masks = torch.from_numpy(masks)[:, None].bool()
        return [{"boxes": boxes, "labels": torch.tensor(labels), "scores": scores, "masks": masks}]

    monkeypatch.setattr(evaluate, "load_detector", lambda *args, **kwargs: detector)


def _arguments(dataset, *more, annotations=None):
    annotations = annotations or dataset / "annotations.json"
    inputs = ("--images", str(dataset / "images"), "--annotations", str(annotations))
    return ("detect-eval", *inputs, "--device", "cpu", *map(str, more))


def test_it_reports_boxes_and_masks(omniops, dataset, scripted, tmp_path):
    path = tmp_path / "new" / "figures.json"
    result = omniops(*_arguments(dataset, "--random-weights", "--json", path))
    assert (result.status, result.err.strip()) == (0, "")
    for kind in ("boxes", "masks"):
        assert re.search(rf"{kind} +100\.0 +100\.0 +100\.0 ", result.out)
    report = json.loads(path.read_text())
    assert report["bbox"]["AP"] == report["segm"]["AP"] == pytest.approx(1)
    assert report["images"] == 5
    assert report["failed"] == []


def test_annotations_without_masks(omniops, dataset, scripted, truth, write, tmp_path):
    del truth["annotations"][3]["segmentation"]
    result = omniops(*_arguments(dataset, "--random-weights", annotations=write(truth)))
    assert result.status == 0
    assert "Masks were not judged" in result.out
    assert not re.search(r"masks +\d", result.out)


def test_bad_images_are_left_out_and_named(omniops, dataset, scripted, truth, write, tmp_path):
    truth["images"] += [
        {"id": 1, "file_name": "gone.png", "width": 5, "height": 5},
        {"id": 2, "file_name": "0.png", "width": 61, "height": 40},
    ]
    truth["annotations"] += [{"id": 77, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}]
    path = tmp_path / "figures.json"
    result = omniops(*_arguments(dataset, "--random-weights", "--json", path, annotations=write(truth)))
    assert result.status == 1
    gone, wrong, last = result.err.strip().splitlines()
    assert gone.endswith(f"no such file: {dataset / 'images' / 'gone.png'}")
    assert "60 x 40 pixels, its annotations 61 x 40" in wrong
    assert last == "omniops: error: 2 of 7 images failed"
    report = json.loads(path.read_text())
    assert report["bbox"]["AP"] == pytest.approx(1)
    assert report["images"] == 5
    assert [os.path.basename(name) for name in report["failed"]] == ["gone.png", "0.png"]


def test_only_bad_images_give_no_figures(omniops, dataset, scripted, truth, write, tmp_path):
    for image in truth["images"]:
        image["width"] += 1
        image["file_name"] = f"./{image['file_name']}"
    truth["annotations"] = []
    path = tmp_path / "figures.json"
    result = omniops(*_arguments(dataset, "--random-weights", "--json", path, annotations=write(truth)))
    assert (result.status, result.out) == (1, "")
    *reasons, last = result.err.strip().splitlines()
    assert len(reasons) == 5
    assert last == "omniops: error: 5 of 5 images failed"
    assert not path.exists()


@pytest.mark.parametrize("name", ["{outside}", "../secret.png", "a/../../secret.png", "../images/0.png"])
def test_names_that_lead_out_of_the_folder_are_refused(fails, dataset, scripted, truth, write, tmp_path, name):
    outside = dataset / "secret.png"
    Image.new("RGB", (60, 40)).save(outside)
    truth["images"][1]["file_name"] = name = name.format(outside=outside)
    path = write(truth)
    line = fails(*_arguments(dataset, "--random-weights", annotations=path), status=2)
    assert f"{path} is refused: it names the picture {name}, which is not in the folder" in line


def test_names_of_pictures_in_folders_of_the_folder(omniops, dataset, scripted, truth, write, tmp_path):
    (tmp_path / "images" / "..val").mkdir(parents=True)
    for image in truth["images"]:
        (tmp_path / "images" / "..val" / image["file_name"]).symlink_to(dataset / "images" / image["file_name"])
        image["file_name"] = f"..val/{image['file_name']}"
    result = omniops(*_arguments(tmp_path, "--random-weights", annotations=write(truth)))
    assert (result.status, result.err.strip()) == (0, "")


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(omniops, dataset, weights, truth, write, tmp_path):
    """The truth is made of what the random weights find, so that the figures are neither 0 nor 1."""
    truth["annotations"] = _found_by(weights, dataset, truth)
    arguments = _arguments(dataset, "--weights", weights, annotations=write(truth))
    one = tmp_path / "one.json"
    assert omniops(*arguments, "--json", str(one)).status == 0

    script = tmp_path / "small.py"
    script.write_text(
        "import functools, sys, torch\n"
        "from omniops import detection\n"
        "from omniops.cli import main\n"
        "torch.set_num_threads(1)\n"
        f"detection.{BUILD} = functools.partial(detection.{BUILD}, **{SMALL})\n"
        "main(sys.argv[1:])\n"
    )
    two = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(
        [*command, *arguments, "--json", str(two)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("boxes") == 1
    reports = [json.loads(path.read_text()) for path in (one, two)]
    assert reports[0] == reports[1]
    assert 0 < reports[0]["bbox"]["AP"] < 1
    assert 0 < reports[0]["segm"]["AP"] <= 1


def _found_by(weights, dataset, truth):
    """What the weights find, masks and boxes a little too wide, as annotations."""
    model = getattr(detection, BUILD)(weights, mask_threshold=0.5).eval()
    annotations = []
    ids = {category["id"] for category in truth["categories"]}
    for image in truth["images"]:
        pixels = np.array(Image.open(dataset / "images" / image["file_name"]))
        with torch.no_grad():
            (found,) = model([torch.from_numpy(pixels).permute(2, 0, 1) / 255])
        for result in coco.to_results(found, image["id"]):
            x, y, w, h = result["bbox"]
            annotations.append({**result, "bbox": [x, y, 1.2 * w, h]})
            if result["category_id"] not in ids:
                number = detection.COCO_CATEGORY_IDS.index(result["category_id"])
                truth["categories"].append({"id": result["category_id"], "name": detection.COCO_CATEGORIES[number]})
                ids.add(result["category_id"])
    return annotations


def _changed(truth, key, **fields):
    truth[key][-1].update(fields)
    return truth


def _segmented(truth, segmentation):
    return _changed(truth, "annotations", segmentation=segmentation)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda truth: "no json", "is not JSON"),
        (lambda truth: "[" * 100_000, "is not JSON"),
        (lambda truth: [{"image_id": 1}], "it holds a list, not an object"),
        (lambda truth: {"images": truth["images"]}, "it has no list of categories"),
        (lambda truth: {**truth, "images": []}, "its list of images is empty"),
        (lambda truth: {**truth, "categories": []}, "its list of categories is empty"),
        (lambda truth: {**truth, "annotations": {}}, "it has no list of annotations"),
        (lambda truth: {**truth, "annotations": [5]}, "annotations[0] is not an object"),
        (lambda truth: _changed(truth, "images", id="1"), "images[4] must have an integer as 'id', got '1'"),
        (lambda truth: _changed(truth, "images", width=0), "must have a positive integer as 'width', got 0"),
        (lambda truth: _changed(truth, "images", id=100), "several of its images have the same id, 100"),
        (lambda truth: _changed(truth, "categories", id=8), "several of its categories have the same id, 8"),
        (lambda truth: _changed(truth, "annotations", image_id=5), "annotations[19] is of an image that is not"),
        (lambda truth: _changed(truth, "annotations", category_id=2), "annotations[19] is of a category that is not"),
        (lambda truth: _changed(truth, "annotations", bbox=[1, 2, 3]), "[x, y, width, height] as 'bbox'"),
        (lambda truth: _changed(truth, "annotations", bbox=[1, 2, 3, -1]), "[x, y, width, height] as 'bbox'"),
        (lambda truth: _changed(truth, "annotations", bbox=[1, 2, 3, float("nan")]), "as 'bbox'"),
        (lambda truth: _changed(truth, "annotations", bbox=[1, 2, 3, 10**401]), "as 'bbox'"),
        (lambda truth: _changed(truth, "annotations", area="big"), "a number as 'area'"),
        (lambda truth: _changed(truth, "annotations", area=10**401), "a number as 'area'"),
        (lambda truth: _segmented(truth, [[1, 2, 3, 4, 5, 1e9]]), "'segmentation'"),
        (lambda truth: _changed(truth, "annotations", iscrowd=2), "0 or 1 as 'iscrowd'"),
        (lambda truth: _segmented(truth, [[1, 2, 3, 4]]), "annotations[19] must have polygons or run lengths"),
        (lambda truth: _segmented(truth, [[1, 2, 3, 4, 5, "6"]]), "'segmentation'"),
        (lambda truth: _segmented(truth, {"size": [1, 1], "counts": "1"}), "'segmentation'"),
        (lambda truth: _segmented(truth, {"size": [30, 64], "counts": [7]}), "'segmentation'"),
        (lambda truth: _segmented(truth, {"size": [30, 64], "counts": "1"}), "'segmentation'"),
        (lambda truth: _segmented(truth, {"size": [30, 64], "counts": "P"}), "'segmentation'"),
        (lambda truth: _segmented(truth, {"size": [30, 64]}), "'segmentation'"),
        (lambda truth: _changed(truth, "images", id=10**30), "must have an integer as 'id'"),
    ],
)
def test_annotations_that_are_not_coco_s(fails, dataset, truth, write, change, words):
    path = write(change(truth))
    line = fails(*_arguments(dataset, "--random-weights", annotations=path), status=2)
    assert words in line
    assert str(path) in line


def test_annotations_that_are_not_text(fails, dataset, tmp_path):
    path = tmp_path / "picture.json"
    path.write_bytes(b"\x89PNG\r\n\xff\xd8")
    line = fails(*_arguments(dataset, "--random-weights", annotations=path), status=2)
    assert f"{path} is not JSON" in line
    assert "codec" not in line


def test_paths_that_are_missing_or_wrong(fails, dataset, tmp_path, weights):
    missing = tmp_path / "none.json"
    assert str(missing) in fails(*_arguments(dataset, "--random-weights", annotations=missing), status=2)
    assert "--weights coco" in fails(*_arguments(dataset), status=2)
    inputs = ("--annotations", str(dataset / "annotations.json"), "--random-weights")
    assert "no such folder" in fails("detect-eval", "--images", str(missing), *inputs, status=2)
    assert f"{tmp_path} has none of the 5 images" in fails("detect-eval", "--images", str(tmp_path), *inputs, status=2)


def test_weights_of_other_classes(fails, dataset, truth, write, weights):
    truth["categories"][0]["name"] = "balloon"
    line = fails(*_arguments(dataset, "--weights", weights, annotations=write(truth)), status=1)
    assert "of another shape" in line
