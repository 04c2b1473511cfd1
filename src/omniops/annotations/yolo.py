"""Annotations as YOLO's text files of segmentation, which ultralytics and supervision read.

A picture has a file of its own, with a line for each object: the class's number from 0 on, then x and y of the
polygon's points as fractions of the width and the height. The points are within the outermost pixels, a quarter of a
pixel from their top left corners: at the size of the picture ultralytics cuts fractions of pixels off, and supervision
rounds them to the nearest, and so both come to these pixels.

The format has one polygon for an object. Holes are cut out by seams (``omniops.annotations.polygons``), which fills by
the even-odd rule take as they are meant. Parts are joined by short lines, there and back, as ultralytics' own converter
joins those of COCO; who fills the polygon colours these lines too, one pixel wide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from omniops.annotations.coco import class_names
from omniops.annotations.objects import Annotations
from omniops.annotations.polygons import join_polygons, mask_to_polygons

_FROM_CENTRE = -0.25
"""Where the points are from the centres of pixels, in x and in y."""


def to_yolo(annotations: Annotations, *, categories: Sequence[str] | None = None) -> str:
    """The objects of a picture as YOLO's lines of segmentation; those without a pixel are left out.

    Args:
        annotations: of the picture.
        categories: the names of the classes, in the order of their numbers; by default the picture's labels. Of a data
            set all pictures must be given the same.

    Raises:
        ValueError: for a label that is not among ``categories``.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> to_yolo(from_masks([mask], labels=["dog"]), categories=["cat", "dog"])
        '1 0.25 0.3125 0.65 0.3125 0.65 0.5625 0.25 0.5625\\n'
    """
    names = class_names([annotations], categories)
    lines = []
    for annotation in annotations.found:
        outline = join_polygons(mask_to_polygons(annotation.mask, "centres")) + _FROM_CENTRE
        fractions = outline / (annotations.width, annotations.height)
        # Nine digits tell thousandths of a pixel apart in the largest pictures.
        numbers = " ".join(f"{number:.9g}" for number in fractions.reshape(-1).tolist())
        lines.append(f"{names.index(annotation.label)} {numbers}\n")
    return "".join(lines)


def to_yolo_dataset(categories: Sequence[str], train: str = "images", val: str | None = None) -> str:
    """The YAML file with the classes of a data set, as ultralytics asks for it beside the text files.

    ultralytics finds the text file of ``.../images/NAME.jpg`` as ``.../labels/NAME.txt``, and of a picture elsewhere
    beside it.

    Args:
        categories: the names of the classes, in the order of their numbers.
        train: the folder of the pictures, from that of this file on.
        val: the same of those for validation; by default ``train``.

    Example:
        >>> print(to_yolo_dataset(["cat", "dog"]), end="")
        train: "images"
        val: "images"
        names:
          0: "cat"
          1: "dog"
    """
    # A string of JSON is one of YAML.
    folders = {"train": train, "val": train if val is None else val}
    head = [f"{key}: {json.dumps(folder)}\n" for key, folder in folders.items()]
    return "".join([*head, "names:\n", *(f"  {i}: {json.dumps(name)}\n" for i, name in enumerate(categories))])
