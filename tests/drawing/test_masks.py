"""Masks, prompts and detections as they are shown."""

import doctest

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures need Pillow")

from PIL import Image

from omniops.drawing import boxes, colour_of, draw_detections, draw_prompts, mask_image, masks, paint, prompts
from omniops.drawing.prompts import BACKGROUND_COLOUR, FOREGROUND_COLOUR


def _mask(rows, columns, size=(6, 8)):
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


LEFT, TOP = _mask(slice(None), slice(0, 4)), _mask(slice(0, 2), slice(None))


def test_painting_mixes_with_the_picture_and_the_last_is_on_top():
    pixels = np.full((6, 8, 3), 100, np.uint8)
    paint(pixels, [(1, LEFT), (2, TOP)])
    assert pixels[5, 7].tolist() == [100, 100, 100]
    for position, number in (((5, 0), 1), ((0, 0), 2), ((0, 7), 2)):
        assert pixels[position].tolist() == [50 + value // 2 for value in colour_of(number)]


def test_one_mask_is_white_inside_whatever_its_number():
    for number in (1, 300):
        picture = mask_image([(number, LEFT)], 6, 8)
        assert picture.mode == "L"
        assert np.array_equal(np.array(picture), LEFT * np.uint8(255))
    assert not np.array(mask_image([], 6, 8)).any()


def test_several_masks_are_numbers_in_the_colours_of_their_objects():
    picture = mask_image([(3, LEFT), (255, TOP)], 6, 8)
    assert picture.mode == "P"
    assert np.array_equal(np.array(picture), np.where(TOP, 255, np.where(LEFT, 3, 0)))
    assert picture.convert("RGB").getpixel((0, 5)) == colour_of(3)
    assert picture.convert("RGB").getpixel((7, 5)) == (0, 0, 0)


def test_numbers_that_no_byte_holds_make_a_grey_picture_of_16_bits():
    picture = mask_image(iter([(3, LEFT), (256, TOP)]), 6, 8)
    assert picture.mode == "I;16"
    assert np.array_equal(np.array(picture), np.where(TOP, 256, np.where(LEFT, 3, 0)))


def test_prompts_are_drawn_where_they_are():
    picture = Image.new("RGB", (400, 300), (9, 9, 9))
    draw_prompts(picture, 5, [(100, 100), (300, 200)], [1, 0], (220, 20, 380, 120))
    assert picture.getpixel((100, 100)) == FOREGROUND_COLOUR
    assert picture.getpixel((300, 200)) == BACKGROUND_COLOUR
    assert picture.getpixel((300, 20)) == picture.getpixel((220, 70)) == colour_of(5)
    assert picture.getpixel((300, 70)) == picture.getpixel((10, 290)) == (9, 9, 9)
    untouched = Image.new("RGB", (40, 30))
    draw_prompts(untouched, 1)
    assert untouched.getcolors() == [(1200, (0, 0, 0))]


def test_detections_are_drawn_the_surest_on_top():
    detections = {
        "boxes": torch.tensor([[20.0, 40.0, 120.0, 140.0], [60.0, 40.0, 190.0, 140.0]]),
        "labels": torch.tensor([8, 1]),
        "scores": torch.tensor([0.9, 0.3]),
    }
    picture = Image.new("RGB", (200, 150), (128, 128, 128))
    drawn = draw_detections(picture, detections, ["truck", "person"])
    assert drawn.getpixel((20, 100)) == colour_of(8)
    assert drawn.getpixel((190, 100)) == colour_of(1)
    assert drawn.getpixel((90, 40)) == colour_of(8)
    assert drawn.getpixel((150, 100)) == (128, 128, 128)
    found = torch.zeros(2, 1, 150, 200, dtype=torch.bool)
    found[0, 0, 40:140, 20:120] = True
    drawn = draw_detections(Image.new("RGB", (200, 150), (128, 128, 128)), {**detections, "masks": found}, ["a", "b"])
    assert drawn.getpixel((100, 100)) == tuple(64 + value // 2 for value in colour_of(8))
    assert drawn.getpixel((150, 100)) == (128, 128, 128)


@pytest.mark.parametrize("module", [boxes, masks, prompts])
def test_the_examples_print_what_they_say(module):
    tested = doctest.testmod(module)
    assert tested.attempted
    assert not tested.failed


def test_pixels_that_do_not_follow_each_other_are_painted_too():
    pixels, mask = np.full((4, 6, 3), 100, np.uint8), np.eye(4, 3, dtype=bool)
    expected = pixels[:, ::2].copy()
    paint(expected, [(1, mask)])
    paint(pixels[:, ::2], [(1, mask)])
    assert np.array_equal(pixels[:, ::2], expected)
    assert (pixels[:, 1::2] == 100).all()
