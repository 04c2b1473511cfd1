"""Annotations as COCO's JSON of instances, which pycocotools, FiftyOne, supervision, detectron2 and others read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from omniops.annotations.objects import Annotation, Annotations
from omniops.annotations.polygons import mask_to_polygons
from omniops.sam2 import rle


def to_coco(
    images: Sequence[Annotations], *, polygons: bool = False, categories: Sequence[str] | None = None
) -> dict[str, Any]:
    """The objects of pictures as COCO's JSON has them: ``images``, ``annotations`` and ``categories``.

    Ids of images and categories count from 1. An annotation has the id of its object where there is one picture; of
    more they count on. ``iscrowd`` is 0, run lengths or not, and ``score`` is there where it is known. Objects without
    a pixel are left out.

    Args:
        images: of each picture its objects.
        polygons: ``segmentation`` as a list of polygons, one for each part of the object, along the edges of pixels,
            x0, y0, x1, y1, ...; holes are cut out by seams (``omniops.annotations.polygons``). pycocotools and FiftyOne
            make the same mask of them; supervision colours the outline too, which adds a column and a row of pixels.
            Else COCO's compressed run lengths, with ``counts`` as str, which all of them read exactly.
        categories: the names of the classes, in the order of their ids; by default the labels of the pictures.

    Raises:
        ValueError: for a label that is not among ``categories``.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> coco = to_coco([from_masks([mask], labels=["dog"], file_name="a.jpg")], polygons=True)
        >>> coco["annotations"][0]["segmentation"], coco["annotations"][0]["bbox"]
        ([[1, 1, 4, 1, 4, 3, 1, 3]], [1, 1, 3, 2])
        >>> coco["images"], coco["categories"]
        ([{'id': 1, 'file_name': 'a.jpg', 'width': 5, 'height': 4}], [{'id': 1, 'name': 'dog'}])
    """
    names = class_names(images, categories)
    records: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for annotation in image.found:
            number = annotation.id if len(images) == 1 else len(records) + 1
            record = {"id": number, "image_id": image_id, "category_id": names.index(annotation.label) + 1}
            records.append({**record, **_shape_of(annotation, polygons)})
    return {
        "images": [
            {"id": image_id, "file_name": image.file_name, "width": image.width, "height": image.height}
            for image_id, image in enumerate(images, start=1)
        ],
        "annotations": records,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
    }


def class_names(images: Sequence[Annotations], categories: Sequence[str] | None) -> list[str]:
    """The names of the classes in the order of their numbers.

    Raises:
        ValueError: for a label that is not among ``categories``.
    """
    labels = list(dict.fromkeys(label for image in images for label in image.labels))
    if categories is None:
        return labels
    if missing := [label for label in labels if label not in categories]:
        raise ValueError(f"categories must have all labels, and {', '.join(missing)} is not among them")
    return list(categories)


def _shape_of(annotation: Annotation, polygons: bool) -> dict[str, Any]:
    segmentation: Any = compressed(annotation)
    if polygons:
        segmentation = [outline.astype(int).reshape(-1).tolist() for outline in mask_to_polygons(annotation.mask)]
    score = {} if annotation.score is None else {"score": float(annotation.score)}
    return {"segmentation": segmentation, "area": annotation.area, "bbox": annotation.bbox, "iscrowd": 0, **score}


def compressed(annotation: Annotation) -> dict[str, Any]:
    """The mask as COCO's run lengths with ``counts`` as str, which JSON takes."""
    counts = annotation.segmentation["counts"]
    if isinstance(counts, str):
        return annotation.segmentation
    if isinstance(counts, bytes):
        return {**annotation.segmentation, "counts": counts.decode("ascii")}
    return {**annotation.segmentation, "counts": rle.compress_counts(np.asarray(counts, np.int64))}
