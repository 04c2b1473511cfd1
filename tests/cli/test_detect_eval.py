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

from omniops import detection
from omniops.cli import detect_eval
from omniops.detection import coco

BUILD = "mask_rcnn_resnet50_fpn_carafe"
SMALL = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10}
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


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "changed.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def _perfect(truth):
    """The truth as detections, through the same function as a detector's."""
    labels = {number: label for label, number in enumerate(coco.label_ids(truth)) if label}
    results = []
    for image in truth["images"]:
        here = [each for each in truth["annotations"] if each["image_id"] == image["id"] and not each["iscrowd"]]
        masks = np.zeros((len(here), 1, image["height"], image["width"]), dtype=bool)
        for mask, each in zip(masks, here, strict=True):
            x, y, w, h = each["bbox"]
            mask[0, y : y + h, x : x + w] = True
        boxes = torch.tensor([each["bbox"] for each in here], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found = {
            "boxes": boxes,
            "labels": torch.tensor([labels[each["category_id"]] for each in here]),
            "scores": torch.linspace(0.9, 0.6, len(here)),
            "masks": torch.from_numpy(masks),
        }
        results += coco.to_results(found, image["id"], coco.label_ids(truth))
    return results


def _ids(truth):
    return [image["id"] for image in truth["images"]]


@pytest.mark.parametrize("masks", [False, True])
def test_perfect_detections_have_precision_1(truth, masks):
    figures = coco.average_precision(truth, _perfect(truth), _ids(truth), masks)
    assert tuple(figures) == coco.FIGURES
    for name in ("AP", "AP50", "AP75", "AR100"):
        assert figures[name] == pytest.approx(1)
    assert figures["APl"] is None or figures["APl"] == pytest.approx(1)


@pytest.mark.parametrize("masks", [False, True])
def test_figures_are_those_of_pycocotools(truth, masks, tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    random = np.random.default_rng(0)
    results = [each for each in _perfect(truth) if random.random() < 0.8]
    for each in results:
        each["score"] = float(random.random())
        each["bbox"] = (np.array(each["bbox"]) + random.normal(0, 2, 4).clip(-4, 4)).tolist()
        if random.random() < 0.2:
            each["category_id"] = 1
            each["segmentation"] = next(r["segmentation"] for r in results if r["image_id"] == each["image_id"])
    for number, each in enumerate(truth["annotations"], 1):
        each["id"] = number
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    reference = COCO(str(tmp_path / "truth.json"))
    stripped = [
        {key: each[key] for key in each if key != "bbox" or not masks} for each in json.loads(json.dumps(results))
    ]
    evaluation = COCOeval(reference, reference.loadRes(stripped), "segm" if masks else "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = coco.average_precision(truth, results, _ids(truth), masks)
    assert 0 < figures["AP"] < 1
    values = [-1 if value is None else value for value in figures.values()]
    assert values == pytest.approx(evaluation.stats[:12].tolist(), abs=1e-12)


def test_only_the_images_that_count_count(truth):
    perfect = _perfect(truth)
    half = [each for each in perfect if each["image_id"] in (100, 99)]
    assert coco.average_precision(truth, half, _ids(truth))["AR100"] < 1
    assert coco.average_precision(truth, half, [100, 99])["AP"] == pytest.approx(1)


def test_no_detections_and_nothing_to_detect(truth):
    assert coco.average_precision(truth, [], _ids(truth))["AP"] == 0
    assert coco.average_precision({**truth, "annotations": []}, [], _ids(truth))["AP"] is None


def test_area_and_iscrowd_may_be_missing(truth):
    perfect = _perfect(truth)
    for each in truth["annotations"]:
        del each["area"]
        if not each["iscrowd"]:
            del each["iscrowd"]
    assert coco.average_precision(truth, perfect, _ids(truth))["AP"] == pytest.approx(1)


def test_labels_are_coco_s_or_else_the_file_s(truth):
    assert coco.label_ids(truth) == detection.COCO_CATEGORY_IDS
    assert coco.label_ids({"categories": [{"id": 7, "name": "nut"}, {"id": 3, "name": "bolt"}]}) == (0, 3, 7)
    assert coco.label_ids({"categories": [{"id": 1, "name": "balloon"}]}) == (0, 1)


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
    perfect = _perfect(truth)

    def detector(images):
        size = tuple(images[0].shape[:0:-1])
        image = next(each for each in truth["images"] if (each["width"], each["height"]) == size)
        here = [each for each in perfect if each["image_id"] == image["id"]]
        masks = np.stack(
            [
                coco.rle.decode({**each["segmentation"], "counts": each["segmentation"]["counts"].encode()})
                for each in here
            ]
        )
        boxes = torch.tensor([each["bbox"] for each in here])
        boxes[:, 2:] += boxes[:, :2]
        labels = [detection.COCO_CATEGORY_IDS.index(each["category_id"]) for each in here]
        scores = torch.tensor([each["score"] for each in here])
        masks = torch.from_numpy(masks)[:, None].bool()
        return [{"boxes": boxes, "labels": torch.tensor(labels), "scores": scores, "masks": masks}]

    monkeypatch.setattr(detect_eval, "load_detector", lambda *args, **kwargs: detector)


def _arguments(dataset, *more, annotations=None):
    annotations = annotations or dataset / "annotations.json"
    places = ("--images", str(dataset / "images"), "--annotations", str(annotations))
    return ("detect-eval", *places, "--device", "cpu", *map(str, more))


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
    for each in truth["images"]:
        each["width"] += 1
        each["file_name"] = f"./{each['file_name']}"
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
    for each in truth["images"]:
        (tmp_path / "images" / "..val" / each["file_name"]).symlink_to(dataset / "images" / each["file_name"])
        each["file_name"] = f"..val/{each['file_name']}"
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
    ids = {each["id"] for each in truth["categories"]}
    for image in truth["images"]:
        pixels = np.array(Image.open(dataset / "images" / image["file_name"]))
        with torch.no_grad():
            (found,) = model([torch.from_numpy(pixels).permute(2, 0, 1) / 255])
        for each in coco.to_results(found, image["id"]):
            x, y, w, h = each["bbox"]
            annotations.append({**each, "bbox": [x, y, 1.2 * w, h]})
            if each["category_id"] not in ids:
                number = detection.COCO_CATEGORY_IDS.index(each["category_id"])
                truth["categories"].append({"id": each["category_id"], "name": detection.COCO_CATEGORIES[number]})
                ids.add(each["category_id"])
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
        (lambda truth: _changed(truth, "images", id=100), "several of its images have the same id"),
        (lambda truth: _changed(truth, "categories", id=8), "several of its categories have the same id"),
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


def test_places_that_are_missing_or_wrong(fails, dataset, tmp_path, weights):
    missing = tmp_path / "none.json"
    assert str(missing) in fails(*_arguments(dataset, "--random-weights", annotations=missing), status=2)
    assert "--weights coco" in fails(*_arguments(dataset), status=2)
    places = ("--annotations", str(dataset / "annotations.json"), "--random-weights")
    assert "no such folder" in fails("detect-eval", "--images", str(missing), *places, status=2)
    assert f"{tmp_path} has none of the 5 images" in fails("detect-eval", "--images", str(tmp_path), *places, status=2)


def test_weights_of_other_classes(fails, dataset, truth, write, weights):
    truth["categories"][0]["name"] = "balloon"
    line = fails(*_arguments(dataset, "--weights", weights, annotations=write(truth)), status=1)
    assert "of another shape" in line
