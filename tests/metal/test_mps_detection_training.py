"""A step of the detectors' training, from the data set to the optimizer, keeps the rules of MPS, without autocast."""

from __future__ import annotations

import json

import pytest
import torch
from mps_device import mps_device

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

import shapes_dataset
import tiny_detectors

from omniops.detection.training import CocoDataset, Settings, Training


@pytest.mark.parametrize("masks", [False, True])
def test_a_step_keeps_the_rules(tmp_path, masks):
    annotations = json.loads(shapes_dataset.make(tmp_path, 3).read_text())
    dataset = CocoDataset(tmp_path / "images", annotations, masks=masks, image_ids=[0, 7])
    settings = Settings(epochs=1, batch=2)
    with mps_device(values=False):
        model = tiny_detectors.build(masks, num_classes=3).to("meta")
        training = Training(model, dataset, settings, torch.device("meta"), tiny_detectors.NAMES[masks])
        losses = training.run_epoch()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(losses) >= {"loss_classifier", "loss_objectness"}
