"""Masks as polygons: whoever fills them gets the mask back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from masks import adversarial

pytest.importorskip("PIL", reason="polygons are filled by Pillow")

import PIL
from PIL import Image, ImageDraw

from omniops.annotations import join_polygons, mask_to_polygons

_PILLOW = tuple(map(int, PIL.__version__.split(".")[:2]))


def fill_as_pycocotools(polygons, shape):
    mask = pytest.importorskip("pycocotools.mask", reason="pycocotools fills COCO's polygons")
    if not polygons:
        return np.zeros(shape, bool)
    return mask.decode(mask.merge(mask.frPyObjects([p.reshape(-1).tolist() for p in polygons], *shape))) > 0


def fill_as_faster_coco_eval(polygons, shape):
    mask = pytest.importorskip("faster_coco_eval.core.mask", reason="faster-coco-eval fills COCO's polygons")
    if not polygons:
        return np.zeros(shape, bool)
    return mask.decode(mask.merge(mask.frPyObjects([p.reshape(-1).tolist() for p in polygons], *shape))) > 0


def fill_as_opencv(polygons, shape):
    cv2 = pytest.importorskip("cv2", reason="OpenCV fills polygons")
    filled = np.zeros(shape, np.uint8)
    for polygon in polygons:
        cv2.fillPoly(filled, [polygon.astype(np.int32)], 1)
    return filled > 0


def fill_as_pillow(polygons, shape):
    filled = Image.new("L", shape[::-1])
    for polygon in polygons:
        ImageDraw.Draw(filled).polygon([tuple(point) for point in polygon.tolist()], outline=1, fill=1)
    return np.array(filled) > 0


FILLS = [
    ("edges", fill_as_pycocotools),
    ("edges", fill_as_faster_coco_eval),
    ("centres", fill_as_opencv),
    pytest.param(
        "centres",
        fill_as_pillow,
        marks=pytest.mark.skipif(_PILLOW < (11, 3), reason="Pillow before 11.3 colours pixels beside slanting lines"),
    ),
]
every_fill = pytest.mark.parametrize(("kind", "fill"), FILLS)


@every_fill
@settings(max_examples=200, deadline=None)
@given(mask=arrays.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_filled_polygons_are_the_mask(kind, fill, mask):
    assert np.array_equal(fill(mask_to_polygons(mask, kind), mask.shape), mask)


@every_fill
def test_filled_polygons_are_masks_of_many_parts_and_holes(kind, fill):
    for name, mask in adversarial(37, 29).items():
        mask = mask.numpy()
        assert np.array_equal(fill(mask_to_polygons(mask, kind), mask.shape), mask), name


@pytest.mark.parametrize("kind", ["edges", "centres"])
def test_there_is_a_polygon_for_each_part(kind):
    ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy counts parts")
    for name, mask in adversarial(37, 29).items():
        parts = ndimage.label(mask.numpy(), np.ones((3, 3)))[1]
        assert len(mask_to_polygons(mask, kind)) == parts, name
    assert mask_to_polygons(np.zeros((3, 4)), kind) == []
    assert mask_to_polygons(np.zeros((0, 4)), kind) == []


def test_a_hole_is_cut_out_by_a_seam():
    mask = np.ones((3, 3), bool)
    mask[1, 1] = False
    (edges,) = mask_to_polygons(mask)
    seam = [[1, 0], [1, 1], [1, 2], [2, 2], [2, 1], [1, 1], [1, 0]]
    assert edges.tolist() == [[0, 0], *seam, [3, 0], [3, 3], [0, 3]]
    (centres,) = mask_to_polygons(np.pad(mask, 1), "centres")  # whose ring touches the one outside
    assert centres[0].tolist() == [1.5, 1.5]
    assert np.array_equal(np.unique(centres, axis=0)[:, 0], [1.5, 1.5, 1.5, 2.5, 2.5, 3.5, 3.5, 3.5])


def test_parts_that_are_a_pixel_or_a_line_have_three_points():
    mask = np.zeros((5, 6), bool)
    mask[0, 0] = mask[2, 1:5] = mask[4, 3] = True
    polygons = mask_to_polygons(mask, "centres")
    assert [polygon.tolist() for polygon in polygons] == [
        [[0.5, 0.5]] * 3,
        [[1.5, 2.5], [4.5, 2.5], [1.5, 2.5]],
        [[3.5, 4.5]] * 3,
    ]
    assert all(len(polygon) == 4 for polygon in mask_to_polygons(mask))


def test_joined_parts_differ_from_the_mask_by_their_lines_alone():
    mask = np.zeros((20, 40), bool)
    mask[2:8, 2:8] = mask[2:8, 12:18] = mask[12:18, 30:38] = True
    mask[4:6, 4:6] = False
    joined = join_polygons(mask_to_polygons(mask, "centres"))
    filled = fill_as_opencv([joined], mask.shape)
    assert filled[mask].all()
    added = filled & ~mask
    # From 7 to 12 in a row, and from (17, 7) to (30, 12).
    assert added[2:8, 8:12].sum() == 4
    assert added[:, 18:30].any(0).all()
    assert added.sum() == 4 + 12
    assert np.array_equal(
        fill_as_opencv([join_polygons(mask_to_polygons(mask[:, :10], "centres"))], (20, 10)), mask[:, :10]
    )


@settings(max_examples=100, deadline=None)
@given(mask=arrays.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_joined_parts_keep_all_pixels_and_fill_no_hole(mask):
    polygons = mask_to_polygons(mask, "centres")
    if not polygons:
        return
    joined = join_polygons(polygons)
    filled = fill_as_opencv([joined], mask.shape)
    on_lines = fill_as_opencv([np.stack(line) for line in zip(joined, np.roll(joined, -1, 0), strict=True)], mask.shape)
    assert filled[mask].all()
    assert not (filled & ~mask & ~on_lines).any()


def test_thousands_of_parts_are_joined_to_those_near_them():
    y, x = np.mgrid[:300, :400]
    mask = (x % 8 < 3) & (y % 8 < 3)
    polygons = mask_to_polygons(mask, "centres")
    assert len(polygons) == 38 * 50
    joined = join_polygons(polygons)
    assert np.hypot(*(joined - np.roll(joined, -1, 0)).T).max() <= 6  # from a part to the next
    filled = fill_as_opencv([joined], mask.shape)
    assert filled[mask].all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"mask must be \(H, W\), got \(1, 2, 3\)"):
        mask_to_polygons(np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="kind must be edges or centres, got 'corners'"):
        mask_to_polygons(np.zeros((2, 3)), "corners")
    with pytest.raises(ValueError, match="polygons must be one or more, got an empty list"):
        join_polygons([])
