"""A detector on one picture."""

import numpy as np
import pytest
import torch

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from omniops.detection.inference import detect

CPU = torch.device("cpu")


def test_a_detector_gets_a_picture_from_0_to_1():
    shown = []

    def detector(images):
        assert torch.is_inference_mode_enabled()
        shown.extend(images)
        return [{"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64)}]

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert set(detect(detector, pixels, CPU)) == {"boxes", "scores", "labels"}
    (image,) = shown
    torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_what_is_no_number_is_an_error(name):
    detections = {"boxes": torch.zeros(1, 4), "scores": torch.ones(1)}
    detections[name].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no finite numbers"):
        detect(lambda images: [detections], np.zeros((5, 7, 3), np.uint8), CPU)
