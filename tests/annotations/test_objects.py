"""Annotations: what is known of the objects of a picture."""

import doctest
import importlib
import tempfile

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures need Pillow")

from omniops import annotations as package
from omniops.annotations import Annotation, Annotations, from_masks
from omniops.sam2 import rle


def test_boxes_and_areas_are_pycocotools(masks, annotations):
    mask = pytest.importorskip("pycocotools.mask", reason="the oracle of boxes")
    for annotation, expected in zip(annotations.objects, masks, strict=True):
        encoded = mask.encode(np.asfortranarray(expected.astype(np.uint8)))
        assert annotation.segmentation == {"size": [30, 41], "counts": encoded["counts"].decode()}
        assert annotation.bbox == mask.toBbox(encoded).tolist()
        assert annotation.area == mask.area(encoded)
        assert np.array_equal(annotation.mask, expected)


def test_every_kind_of_counts_is_taken(masks):
    compressed = rle.encode(masks[0])
    counts = rle.decompress_counts(compressed["counts"])
    for given in (compressed["counts"], compressed["counts"].encode(), counts.tolist()):
        annotation = Annotation(1, {"size": [30, 41], "counts": given})
        assert (annotation.bbox, annotation.area) == ([3, 2, 27, 18], int(masks[0].sum()))


def test_a_box_that_is_given_stays(masks):
    (annotation,) = from_masks(masks[:1], boxes=torch.tensor([[1.0, 2.0, 30.5, 21.0]])).objects
    assert annotation.bbox == [1, 2, 29.5, 19]


def test_tensors_and_lists_are_taken_as_arrays_are(masks):
    expected = from_masks(masks)
    assert from_masks(torch.from_numpy(masks).float()) == expected
    assert from_masks([torch.from_numpy(mask) for mask in masks]) == expected
    assert [annotation.id for annotation in expected.objects] == [1, 2, 3]
    assert expected.labels == ["object"]


def test_objects_without_a_pixel_are_not_found_and_the_largest_come_first(annotations):
    assert [annotation.id for annotation in annotations.found] == [4, 9]
    assert [annotation.id for annotation in annotations.by_area] == [4, 9, 7]
    assert annotations.labels == ["truck", "wheel"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": [1, 1, 2]}, r"ids must differ, and be 1 or more, got \[1, 1, 2\]"),
        ({"ids": [0, 1, 2]}, "ids must differ, and be 1 or more"),
        ({"ids": [1, 2]}, "ids must be of 3 objects, as there are masks, got 2"),
        ({"labels": ["a"]}, "labels must be of 3 objects"),
        ({"scores": [0.5]}, "scores must be of 3 objects"),
        ({"scores": [0.5, np.nan, 0.5]}, r"scores must be finite, as JSON has no other numbers, got \[0.5, nan, 0.5\]"),
        ({"boxes": [[1, 2, 3, 4]]}, "boxes must be of 3 objects"),
        ({"boxes": [[1, 2, 3]] * 3}, r"boxes must be \(N, 4\), got \(3, 3\)"),
        ({"masks": np.zeros((2, 3))}, r"masks must be \(N, H, W\) with one or more, got \[\(3,\), \(3,\)\]"),
        ({"masks": [np.zeros((2, 3)), np.zeros((3, 2))]}, "masks must be"),
        ({"masks": []}, "masks must be"),
    ],
)
def test_wrong_arguments_are_named(masks, given, message):
    with pytest.raises(ValueError, match=message):
        from_masks(**{"masks": masks, **given})


def test_masks_of_another_size_are_refused(annotations):
    with pytest.raises(ValueError, match=r"masks must be of the picture's size, \[30, 40\] .* \[30, 41\] of object 4"):
        Annotations(30, 40, annotations.objects)


@pytest.mark.parametrize("module", sorted(set(package._MODULES.values())))
def test_the_examples_print_what_they_say(module):
    module = importlib.import_module(f"omniops.annotations.{module}")
    names = {name: getattr(package, name) for name in package.__all__}
    tested = doctest.testmod(module, globs={**vars(module), **names, "np": np, "tempfile": tempfile})
    assert tested.attempted
    assert not tested.failed
