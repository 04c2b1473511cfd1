"""A picture with three objects: one with a hole, one of two parts, one that is not to be seen."""

from __future__ import annotations

import numpy as np
import pytest

from omniops.annotations import from_masks


@pytest.fixture
def masks():
    masks = np.zeros((3, 30, 41), bool)
    masks[0, 2:20, 3:30] = True
    masks[0, 6:11, 7:15] = False
    masks[1, 8:10, 8:14] = masks[1, 22:29, 5:9] = True
    return masks


@pytest.fixture
def annotations(masks):
    return from_masks(
        masks, ids=[4, 9, 7], labels=["truck", "wheel", "truck"], scores=[0.75, 0.5, 0.1], file_name="images/a.jpg"
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(1, 256, (30, 41, 3), dtype=np.uint8)
