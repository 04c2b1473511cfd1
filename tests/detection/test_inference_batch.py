"""A detector on several pictures at once finds what it finds on each."""

import numpy as np
import pytest
import torch

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from omniops.detection import mask_rcnn_resnet50_fpn_carafe
from omniops.detection.inference import detect, detect_batch

CPU = torch.device("cpu")
SIZES = ((48, 64), (64, 48), (96, 125), (48, 64), (30, 40))
"""Which a detector of 64 pixels pads to 64 x 128, but for the second."""


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(3)
    return mask_rcnn_resnet50_fpn_carafe(
        min_size=64, max_size=96, rpn_post_nms_top_n_test=20, box_detections_per_img=5, box_score_thresh=0.0,
        mask_threshold=0.5,
    ).eval()  # fmt: skip


def test_each_picture_has_the_detections_it_has_alone(detector, picture):
    pictures = [picture(*size) for size in SIZES]
    together = detect_batch(detector, pictures, CPU)
    assert len(together) == len(SIZES)
    for found, pixels in zip(together, pictures, strict=True):
        alone = detect(detector, pixels, CPU)
        assert len(found["scores"]) == 5
        assert found["masks"].shape == (5, 1, *pixels.shape[:2])
        assert found["labels"].tolist() == alone["labels"].tolist()
        torch.testing.assert_close(found["scores"], alone["scores"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["boxes"], alone["boxes"], rtol=0, atol=1e-3)
        assert (found["masks"] == alone["masks"]).float().mean() > 0.999


def test_pictures_of_one_padding_go_together(detector, picture, monkeypatch):
    batches = []
    forward = detector.backbone.forward
    monkeypatch.setattr(detector.backbone, "forward", lambda x: batches.append(tuple(x.shape)) or forward(x))
    detect_batch(detector, [picture(*size) for size in SIZES], CPU)
    assert batches == [(4, 3, 64, 128), (1, 3, 128, 64)]


def test_other_detectors_get_pictures_of_one_size_together():
    batches = []

    def detector(images):
        batches.append([tuple(image.shape[1:]) for image in images])
        return [
            {"boxes": torch.full((1, 4), image.shape[1] * 1.0), "scores": torch.ones(1), "labels": torch.ones(1)}
            for image in images
        ]

    sizes = [(5, 7), (6, 7), (5, 7)]
    found = detect_batch(detector, [np.zeros((*size, 3), np.uint8) for size in sizes], CPU)
    assert batches == [[(5, 7), (5, 7)], [(6, 7)]]
    assert [detections["boxes"][0, 0].item() for detections in found] == [5, 6, 5]


def test_no_pictures_have_no_detections():
    assert detect_batch(lambda images: pytest.fail("called"), [], CPU) == []
