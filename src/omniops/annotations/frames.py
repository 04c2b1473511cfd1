"""Annotations of a video: a record for each frame, one a line in a JSONL file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from omniops.annotations.coco import compressed
from omniops.annotations.objects import Annotation, Annotations


def to_frame(annotations: Annotations, frame: int, time: float | None = None) -> dict[str, Any]:
    """What a frame's line has.

    Args:
        annotations: of the frame.
        frame: its number, from 0 on.
        time: when it is shown, in seconds.

    Returns:
        ``frame``; ``time`` where it is known; ``objects``, for each its ``id``, ``bbox`` (x, y, width and height in
        pixels), ``area``, ``predicted_iou`` where it is known, and ``segmentation``, COCO's run lengths. An object that
        is not to be seen on the frame is there too, with an area of 0.

    Example:
        >>> mask = np.eye(2, 3, dtype=bool)
        >>> line = to_frame(from_masks([mask], scores=[0.5]), 4, 0.16)
        >>> line["frame"], line["time"], line["objects"][0]["bbox"], line["objects"][0]["predicted_iou"]
        (4, 0.16, [0, 0, 2, 2], 0.5)
    """
    objects = [
        {
            "id": annotation.id,
            "bbox": annotation.bbox,
            "area": annotation.area,
            **({} if annotation.score is None else {"predicted_iou": float(annotation.score)}),
            "segmentation": compressed(annotation),
        }
        for annotation in annotations.objects
    ]
    return {"frame": frame, **({} if time is None else {"time": float(time)}), "objects": objects}


def group_by_frame(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines of a video of what ``omniops segment`` writes of it, a record for each object on each frame.

    Args:
        records: with ``frame``, ``id`` and ``segmentation``, and perhaps ``time`` and ``predicted_iou``; those of a
            frame follow each other.

    Example:
        >>> segmentation = {"size": [2, 3], "counts": [4, 2]}
        >>> [line] = group_by_frame([{"frame": 0, "id": i, "segmentation": segmentation} for i in (1, 2)])
        >>> [(found["id"], found["area"]) for found in line["objects"]]
        [(1, 2), (2, 2)]
    """
    for frame, group in groupby(records, key=lambda record: record["frame"]):
        found = list(group)
        height, width = found[0]["segmentation"]["size"]
        objects = [
            Annotation(record["id"], record["segmentation"], score=record.get("predicted_iou")) for record in found
        ]
        yield to_frame(Annotations(height, width, objects), frame, found[0].get("time"))
