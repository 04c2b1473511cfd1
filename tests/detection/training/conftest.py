"""A small set, and trainings of tiny detectors on it."""

from __future__ import annotations

import json

import pytest
import torch
from one_thread import one_thread as one_thread


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of a set of six pictures, the last without objects."""
    import shapes_dataset

    folder = tmp_path_factory.mktemp("shapes")
    shapes_dataset.make(folder, 6)
    return folder


@pytest.fixture
def annotations(shapes):
    return json.loads((shapes / "annotations.json").read_text())


@pytest.fixture
def begin(shapes, annotations):
    """Make a training, always from the same weights; settings of two epochs unless others are given."""
    import tiny_detectors

    from omniops.detection.training import CocoDataset, Settings, Training

    def make(masks=False, workers=0, dataset=None, arguments=None, **settings):
        torch.manual_seed(0)
        model = tiny_detectors.build(masks, num_classes=3, **(arguments or {}))
        if dataset is None:
            dataset = CocoDataset(shapes / "images", annotations, masks=masks)
        settings = Settings(**{"epochs": 2, "batch": 2, "lr": 0.02, **settings})
        device = torch.device("cpu")
        return Training(model, dataset, settings, device, tiny_detectors.NAMES[masks], workers=workers)

    return make
