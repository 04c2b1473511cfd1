"""Annotations as pictures: one of labels, masks, and the objects cut out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniops.annotations.objects import Annotation, Annotations

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_LABEL = 255


def davis_palette() -> list[tuple[int, int, int]]:
    """The 256 colours of DAVIS, which are PASCAL VOC's: bit n of a channel's value is bit 3 (7 - n) + channel of its
    index.

    Example:
        >>> davis_palette()[:4]
        [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    """
    bits = np.arange(256)[:, None] >> (3 * np.arange(8) + np.arange(3)[:, None]).reshape(-1) & 1
    values = (bits.reshape(256, 3, 8) << 7 - np.arange(8)).sum(-1)
    return [(int(red), int(green), int(blue)) for red, green, blue in values]


def label_image(annotations: Annotations) -> Image:
    """One picture with the id of the object at each pixel, and 0 where there is none; the smallest object is on top.

    Ids up to 255 are indices of DAVIS's palette; where one is higher it is a grey picture of 16 bits.

    Args:
        annotations: of the picture.

    Raises:
        ValueError: for an id above 65535.

    Example:
        >>> mask = np.eye(2, 3, dtype=bool)
        >>> np.array(label_image(from_masks([mask, ~mask], ids=[1, 5]))).tolist()
        [[1, 5, 5], [5, 1, 5]]
    """
    from PIL import Image

    highest = max((annotation.id for annotation in annotations.objects), default=0)
    if highest > np.iinfo(np.uint16).max:
        raise ValueError(f"ids must be at most 65535 in a picture, got {highest}")
    labels = np.zeros((annotations.height, annotations.width), np.uint8 if highest <= _LARGEST_LABEL else np.uint16)
    for annotation in annotations.by_area:
        labels[annotation.mask] = annotation.id
    picture = Image.fromarray(labels)
    if highest <= _LARGEST_LABEL:
        picture.putpalette([value for colour in davis_palette() for value in colour])
    return picture


def mask_picture(annotation: Annotation) -> Image:
    """The mask of an object, white inside, at the size of the picture."""
    from PIL import Image

    return Image.fromarray(annotation.mask * np.uint8(255))


def cut_out(pixels: NDArray[Any], annotation: Annotation) -> Image:
    """An object cut out of its picture: as large as the mask's box, in RGBA, with nothing where the mask is not.

    Args:
        pixels: (H, W, 3) in RGB, uint8.
        annotation: the object, with a pixel or more.

    Raises:
        ValueError: for another shape or dtype, or an object without a pixel.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> cut_out(np.full((4, 5, 3), 9, np.uint8), from_masks([mask]).objects[0]).size
        (3, 2)
    """
    from PIL import Image

    mask = annotation.mask
    if pixels.shape != (*mask.shape, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 of shape {(*mask.shape, 3)}, got {pixels.dtype} {pixels.shape}")
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError(f"object {annotation.id} has no pixel to cut out")
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    inside = mask[box]
    return Image.fromarray(np.dstack([pixels[box] * inside[..., None], inside * np.uint8(255)]))
