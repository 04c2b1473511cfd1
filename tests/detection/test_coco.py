"""COCO's figures: right, and those of the other evaluation."""

import doctest
import json

import numpy as np
import pytest
import torch

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from coco_dataset import dataset as dataset
from coco_dataset import perfect_detections, perfect_results
from coco_dataset import truth as truth

from omniops import detection
from omniops.detection import coco, evaluation, inference
from omniops.detection.evaluation import CocoEvaluator


def _ids(truth):
    return [image["id"] for image in truth["images"]]


@pytest.mark.parametrize("masks", [False, True])
def test_perfect_detections_have_precision_1(truth, masks):
    figures = coco.average_precision(truth, perfect_results(truth), _ids(truth), masks)
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
    results = [result for result in perfect_results(truth) if random.random() < 0.8]
    for result in results:
        result["score"] = float(random.random())
        result["bbox"] = (np.array(result["bbox"]) + random.normal(0, 2, 4).clip(-4, 4)).tolist()
        if random.random() < 0.2:
            result["category_id"] = 1
            result["segmentation"] = next(r["segmentation"] for r in results if r["image_id"] == result["image_id"])
    for number, annotation in enumerate(truth["annotations"], 1):
        annotation["id"] = number
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    reference = COCO(str(tmp_path / "truth.json"))
    stripped = [
        {key: result[key] for key in result if key != "bbox" or not masks} for result in json.loads(json.dumps(results))
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
    perfect = perfect_results(truth)
    half = [result for result in perfect if result["image_id"] in (100, 99)]
    assert coco.average_precision(truth, half, _ids(truth))["AR100"] < 1
    assert coco.average_precision(truth, half, [100, 99])["AP"] == pytest.approx(1)


def test_no_detections_and_nothing_to_detect(truth):
    assert coco.average_precision(truth, [], _ids(truth))["AP"] == 0
    assert coco.average_precision({**truth, "annotations": []}, [], _ids(truth))["AP"] is None


def test_area_and_iscrowd_may_be_missing(truth):
    perfect = perfect_results(truth)
    for annotation in truth["annotations"]:
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    assert coco.average_precision(truth, perfect, _ids(truth))["AP"] == pytest.approx(1)


def test_labels_are_coco_s_or_else_the_file_s(truth):
    assert coco.label_ids(truth) == detection.COCO_CATEGORY_IDS
    assert coco.label_ids({"categories": [{"id": 7, "name": "nut"}, {"id": 3, "name": "bolt"}]}) == (0, 3, 7)
    assert coco.label_ids({"categories": [{"id": 1, "name": "balloon"}]}) == (0, 1)


def test_an_evaluator_has_the_figures_in_whatever_order_images_come(truth):
    evaluator = CocoEvaluator(truth)
    for image in reversed(truth["images"]):
        detections = perfect_detections(truth, image)
        detections["scores"][:] = 0.5
        evaluator.update(image["id"], detections)
    figures = evaluator.figures()
    assert list(figures) == ["bbox", "segm"]
    for metrics in figures.values():
        assert tuple(metrics) == coco.FIGURES
        assert metrics["AP"] == metrics["AR100"] == pytest.approx(1)
    in_order = [{**result, "score": 0.5} for result in perfect_results(truth)]
    assert figures["bbox"] == coco.average_precision(truth, in_order, _ids(truth))


def test_an_evaluator_judges_the_images_that_it_was_given(truth):
    evaluator = CocoEvaluator(truth)
    evaluator.update(100, perfect_detections(truth, truth["images"][0]))
    assert evaluator.figures(masks=False) == {"bbox": coco.average_precision(truth, evaluator.results[100], [100])}
    assert evaluator.figures()["bbox"]["AR100"] == pytest.approx(1)


def test_masks_are_judged_where_every_object_has_one(truth):
    del truth["annotations"][3]["segmentation"]
    evaluator = CocoEvaluator(truth)
    evaluator.update(100, perfect_detections(truth, truth["images"][0]))
    assert list(evaluator.figures()) == ["bbox"]


@pytest.mark.parametrize("module", [evaluation, inference])
def test_the_examples_print_what_they_say(module):
    tested = doctest.testmod(module)
    assert tested.attempted
    assert not tested.failed


def test_masks_are_encoded_as_by_the_evaluation():
    random = np.random.default_rng(0)
    masks = torch.from_numpy(random.random((40, 1, 30, 20)) < 0.3)
    masks[0], masks[1] = False, True
    masks[2:30, :, :, :5] = masks[2:30, :, 28:] = masks[2:10, :, :, 15:] = False
    found = {"boxes": torch.zeros(40, 4), "labels": torch.ones(40, dtype=torch.int64), "scores": torch.ones(40)}
    for values in (masks, masks.float() * 0.5):
        results = coco.to_results({**found, "masks": values}, 7)
        for result, mask in zip(results, masks, strict=True):
            expected = coco.rle.encode(np.asfortranarray(mask[0].numpy(), dtype=np.uint8))
            assert result["segmentation"] == {"size": [30, 20], "counts": expected["counts"].decode()}
    # As on a GPU, of many at once.
    at_once = list(coco._encode_columns(masks[:, 0], 0, 20))
    assert at_once == [result["segmentation"] for result in results]
