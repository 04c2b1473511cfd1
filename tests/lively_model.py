"""A picture, and SAM 2 with weights that find many masks on it: fixtures that tests of the mask generator import."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

SIDE = 64
HEIGHT, WIDTH = 100, 142


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    disc = ((x - 40) ** 2 + (y - 54) ** 2 < 680)[..., None] * np.array([200, 40, 90])
    stripes = ((x // 6 % 2) * 60)[..., None] + np.array([10, 30, 50])
    noise = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, 3))
    return (disc + stripes + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def lively(twins):
    """The official model and ours, whose masks and scores differ from point to point more than those of new weights."""
    official, ours = copy.deepcopy(twins(image_size=SIDE))
    decoder = official.sam_mask_decoder
    with torch.no_grad():
        for perceptron in decoder.output_hypernetworks_mlps:
            perceptron.layers[-1].weight *= 40
        decoder.iou_prediction_head.layers[-1].weight *= 20
        for parameter in decoder.transformer.parameters():
            if parameter.dim() == 2:
                parameter *= 2
    ours.load_state_dict(official.state_dict())
    return official, ours
