"""Annotations as LabelMe's JSON, to be corrected by hand."""

from __future__ import annotations

from typing import Any

from omniops.annotations.objects import Annotations
from omniops.annotations.polygons import mask_to_polygons

_VERSION = "5.5.0"
"""The format's: all of its keys are those of that version of LabelMe."""


def to_labelme(annotations: Annotations) -> dict[str, Any]:
    """The objects of a picture as LabelMe's JSON has them: a shape for each part of each, of the type ``polygon``.

    The points are the centres of the outermost pixels, as LabelMe draws and fills polygons; holes are cut out by seams
    (``omniops.annotations.polygons``). The parts of an object have its id as their ``group_id``. Objects without a
    pixel are left out. The picture is named by its ``file_name``, from the folder of the JSON file on, and not put into
    the file.

    Args:
        annotations: of the picture.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> labelme = to_labelme(from_masks([mask], ids=[7], labels=["dog"], file_name="a.jpg"))
        >>> shape = labelme["shapes"][0]
        >>> shape["label"], shape["group_id"], shape["points"]
        ('dog', 7, [[1.5, 1.5], [3.5, 1.5], [3.5, 2.5], [1.5, 2.5]])
    """
    shapes = [
        {
            "label": annotation.label,
            "points": outline.tolist(),
            "group_id": annotation.id,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for annotation in annotations.found
        for outline in mask_to_polygons(annotation.mask, "centres")
    ]
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": annotations.file_name,
        "imageData": None,
        "imageHeight": annotations.height,
        "imageWidth": annotations.width,
    }
