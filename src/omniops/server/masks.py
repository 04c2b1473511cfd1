"""Masks as the server's requests and answers have them: COCO's RLE at the size of the video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniops.sam2 import rle

if TYPE_CHECKING:
    from torch import Tensor

    from omniops.sam2.frames import Frames

RLE = dict[str, Any]
"""{"size": [H, W], "counts": COCO's string}"""
Masks = list[tuple[int, RLE]]
"""The ids of all objects of a session, in the order of their first prompts, and their masks on a frame."""


def to_rle(logits: Tensor) -> list[RLE]:
    """N masks, from their logits (N, 1, H, W), above 0 inside."""
    size = list(logits.shape[-2:])
    return [{"size": size, "counts": rle.compress_counts(counts)} for counts in rle.count_runs(logits[:, 0] > 0)]


def masks_of_objects(objects: Sequence[int], ids: Sequence[int], logits: Tensor, frames: Frames) -> Masks:
    """The masks of all objects: those of the ids from their logits, (N, 1, H, W), and empty ones of the others."""
    size = [frames.height, frames.width]
    empty = {"size": size, "counts": rle.compress_counts(np.array([size[0] * size[1]]))}
    masks = dict(zip(ids, to_rle(logits), strict=True))
    return [(object, masks.get(object, empty)) for object in objects]


def to_record(mask: dict[str, Any]) -> dict[str, Any]:
    """A mask of ``SAM2AutomaticMaskGenerator``, in COCO's RLE, as ``Inference.next_everything`` returns it."""
    x, y, width, height = mask["bbox"]
    return {
        "mask": mask["segmentation"],
        "predicted_iou": mask["predicted_iou"],
        "stability_score": mask["stability_score"],
        "area": mask["area"],
        "box": [x, y, x + width, y + height],
    }


def decode_mask(mask: RLE, frames: Frames) -> NDArray[np.bool_]:
    """(H, W), of the size of the video.

    Raises:
        ValueError: for another size, or what is no mask, in words for the users of the server.
    """
    size = [frames.height, frames.width]
    if not isinstance(mask, dict) or mask.get("size") not in (size, tuple(size)):
        raise ValueError(f"The mask must be of the size of the video, {size} (height, width).")
    try:
        return rle.decode({"size": size, "counts": mask["counts"]})
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("The counts of the mask are not COCO's of a mask of that size.") from None
