"""Run-length encoding of masks, against pycocotools and a count of each pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_thread import one_thread as one_thread

from omniops.sam2 import rle


def masks_of(shape):
    """Masks that are hard to encode, and some of noise."""
    height, width = shape
    numbers = np.random.default_rng(height)
    masks = [np.zeros(shape, bool), np.ones(shape, bool), *(numbers.random((6, *shape)) < 0.5)]
    masks += [np.kron(numbers.random((height, width)) < 0.4, np.ones((4, 4), bool))[:height, :width]]
    for row, column in ((0, 0), (-1, -1), (0, -1), (-1, 0)):
        corner = np.zeros(shape, bool)
        corner[row, column] = True
        masks += [corner, ~corner]
    columns = np.zeros(shape, bool)
    columns[:, ::2] = True
    return [*masks, columns, ~columns]


SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (7, 5), (40, 61), (300, 500)]


@pytest.mark.parametrize("shape", SHAPES)
def test_coco_is_that_of_pycocotools(shape):
    coco = pytest.importorskip("pycocotools.mask", reason="the oracle: pycocotools")
    for mask in masks_of(shape):
        found = rle.encode(mask)
        expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert found == {"size": list(shape), "counts": expected["counts"].decode()}
        assert np.array_equal(rle.decode(found), mask)
        assert np.array_equal(rle.decode(expected), mask)
        assert np.array_equal(coco.decode(found).astype(bool), mask)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_coco_of_no_pixels_is_that_of_pycocotools(shape):
    coco = pytest.importorskip("pycocotools.mask", reason="the oracle: pycocotools")
    expected = coco.encode(np.zeros(shape, np.uint8, order="F"))
    found = rle.encode(np.zeros(shape))
    assert found == {"size": list(shape), "counts": expected["counts"].decode()}
    assert rle.decode(found).shape == coco.decode(found).shape == shape
    (counts,) = rle.count_runs(torch.zeros((1, *shape), dtype=torch.bool))
    assert (rle.area(counts), rle.box(counts, shape[0])) == (0, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_tell_mask_area_and_box(shape):
    masks = masks_of(shape)
    for counts, mask in zip(rle.count_runs(torch.from_numpy(np.stack(masks))), masks, strict=True):
        assert (counts[1:] > 0).all()
        assert np.array_equal(rle.decode({"size": shape, "counts": counts.tolist()}), mask)
        assert rle.area(counts) == mask.sum()
        y, x = mask.nonzero()
        assert rle.box(counts, shape[0]) == ((x.min(), y.min(), x.max(), y.max()) if len(x) else None)


@pytest.mark.parametrize("corner", [(0, 0), (3, 0), (0, 4), (3, 4)])
@pytest.mark.parametrize("more", [(0, 0), (0, 2), (2, 0), (1, 1)])
def test_runs_of_a_part_of_the_picture(corner, more):
    masks = torch.from_numpy(np.stack(masks_of((7, 5))))
    x, y = corner
    padded = torch.nn.functional.pad(masks, (x, more[1], y, more[0]))
    found = rle.count_runs(masks, corner, tuple(padded.shape[1:]))
    for ours, expected in zip(found, rle.count_runs(padded), strict=True):
        assert np.array_equal(ours, expected)


def test_runs_of_no_masks():
    assert rle.count_runs(torch.zeros((0, 5, 4), dtype=torch.bool)) == []


def test_long_runs():
    """Whose numbers take all their characters: the string's largest in use is of 2**31 pixels and more."""
    coco = pytest.importorskip("pycocotools.mask", reason="the oracle: pycocotools")
    for counts in ([0, 1, 2**20, 3, 15, 2**29, 16, 17, 2**30 + 5, 0, 31, 32, 2**25, 1023, 1024], [2**31], [0, 5]):
        size = [sum(counts), 1]
        expected = coco.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()
        assert rle.compress_counts(np.array(counts)) == expected
        assert np.array_equal(rle.decompress_counts(expected), counts)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 4], "counts must be those of 4 x 2 pixels, got 7 in all"),
        ([9, -1], "counts must be those of 4 x 2 pixels"),
        ("9", "got 9 in all"),
        ("", "got 0 in all"),
        ("X", "counts must be COCO's string of runs, got b'X'"),
        ("ä", "counts must be COCO's string of runs"),
        ("~", "counts must be COCO's string of runs"),
        ("o" * 20 + "1", "more than 60 bits"),
    ],
)
def test_counts_of_something_else(counts, message):
    with pytest.raises(ValueError, match=message):
        rle.decode({"size": [4, 2], "counts": counts})


def test_only_one_mask_is_encoded():
    with pytest.raises(ValueError, match=r"mask must be \(H, W\), got \(2, 3, 4\)"):
        rle.encode(np.zeros((2, 3, 4)))
