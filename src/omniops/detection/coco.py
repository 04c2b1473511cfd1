"""COCO's formats and figures: detections as COCO results, annotation files checked, average precision."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omniops.detection.carafe_rcnn import COCO_CATEGORIES, COCO_CATEGORY_IDS

try:
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask as rle
except ImportError as error:
    raise ImportError(
        f"COCO's formats and figures need faster-coco-eval ({error}): pip install 'omniops[detect]'"
    ) from error

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve: AP over IoU 0.50:0.95, at 0.50 and 0.75; of small, medium and large objects; recall at most 1, 10,
100 detections an image; and of the three sizes."""
_MASKS_AT_ONCE = 32
"""Of which a GPU counts the run lengths, so that what that takes is bounded."""


def to_results(
    detections: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int] = COCO_CATEGORY_IDS
) -> list[dict[str, Any]]:
    """One image's detections as the detectors give them -> COCO results, in the same order.

    Args:
        detections: ``boxes`` (N, 4), ``labels`` (N), ``scores`` (N) and perhaps ``masks`` (N, 1, H, W), boolean or
            probabilities, of which at least 0.5 is the object.
        image_id: COCO's id of the image.
        category_ids: COCO's id of each label, 0 of the background first.

    Returns:
        For each a dict of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score``, and with masks
        ``segmentation``, compressed run lengths.
    """
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for (x1, y1, x2, y2), label, score in zip(
            detections["boxes"].tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True
        )
    ]
    if "masks" in detections:
        masks = detections["masks"][:, 0]
        is_inside = masks if masks.dtype == torch.bool else masks >= 0.5
        for result, segmentation in zip(results, _encode_masks(is_inside), strict=True):
            result["segmentation"] = segmentation
    return results


def _encode_masks(masks: Tensor) -> Iterator[dict[str, Any]]:
    """Boolean masks (N, H, W) -> compressed run lengths, whose ends a CUDA GPU finds itself, in many masks at once."""
    width = masks.shape[2]
    if masks.is_cuda:
        for some in masks.split(_MASKS_AT_ONCE):
            yield from _encode_columns(some, 0, width)
        return
    for mask in masks.cpu():
        filled = np.flatnonzero(mask.numpy().any(axis=0))
        left, right = (int(filled[0]), int(filled[-1]) + 2) if len(filled) else (0, 0)
        yield from _encode_columns(mask[None, :, left:right], left, width)


def _encode_columns(masks: Tensor, left: int, width: int) -> Iterator[dict[str, Any]]:
    """The columns of masks from ``left`` on, (N, H, w), up to an empty one or the last; those before it are empty."""
    count, height, _ = masks.shape
    columns = masks.transpose(1, 2).flatten(1)
    is_end = columns.clone()
    is_end[:, 1:] ^= columns[:, :-1]
    mask, position = is_end.nonzero().cpu().numpy().T
    for first, last in pairwise(np.searchsorted(mask, np.arange(count + 1))):
        counts = np.diff(left * height + position[first:last], prepend=0, append=height * width)
        encoded = rle.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        yield {"size": [height, width], "counts": encoded["counts"].decode()}


def read_annotations(path: str | PathLike[str]) -> dict[str, Any]:
    """The contents of a COCO annotation file of instances.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is no such file, naming the first entry that is not as it has to be.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path} is not JSON") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if complaint := _complaint(content):
        raise ValueError(f"{path} is not a COCO annotation file of instances: {complaint}")
    return dict(content)


def relative_path(file_name: str) -> Path:
    """The path of a picture from the folder of the pictures.

    Raises:
        ValueError: for a name that leads out of that folder.
    """
    path = Path(os.path.normpath(file_name))  # as written: where links inside the folder lead is up to who made them
    if path.anchor or ".." in path.parts:
        raise ValueError(f"the picture {file_name} is not in the folder of the pictures: give names from there on")
    return path


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """An object's ``segmentation``, polygons or run lengths, compressed or not -> (H, W) of 0 and 1."""
    if isinstance(segmentation, list):
        encoded = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = rle.frPyObjects(segmentation, height, width)
    else:
        encoded = {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
    return np.ascontiguousarray(rle.decode(encoded), dtype=np.uint8)


def label_ids(annotations: Mapping[str, Any]) -> tuple[int, ...]:
    """The category id of each label, 0 of the background first.

    COCO's own where the file's categories are among COCO's, by id and name. Otherwise the file's, by id: what a
    detector that was trained on such a file has learnt.
    """
    categories = {category["id"]: category["name"] for category in annotations["categories"]}
    if categories.items() <= dict(zip(COCO_CATEGORY_IDS, COCO_CATEGORIES, strict=True)).items():
        return COCO_CATEGORY_IDS
    return (0, *sorted(categories))


def has_masks(annotations: Mapping[str, Any]) -> bool:
    """Whether every object has a mask, so that those of detections can be judged."""
    return all(annotation.get("segmentation") for annotation in annotations["annotations"])


def average_precision(
    annotations: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    image_ids: Collection[int],
    masks: bool = False,
) -> dict[str, float | None]:
    """COCO's figures of results, by the names in ``FIGURES``; None where there is nothing to find.

    Args:
        annotations: as ``read_annotations`` gives them. Objects without ``area`` have their box's.
        results: as ``to_results`` gives them.
        image_ids: the images that count.
        masks: whether their masks are judged instead of their boxes.
    """
    found = []
    for number, result in enumerate(results, 1):
        # Small, medium and large go by the area of what is judged.
        area = rle.area(result["segmentation"]) if masks else result["bbox"][2] * result["bbox"][3]
        found.append({**result, "id": number, "area": float(area), "iscrowd": 0})
    truth = [
        # The evaluation takes an id of 0 for none.
        {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0, **annotation, "id": number}
        for number, annotation in enumerate(annotations["annotations"], 1)
    ]
    sets = []
    for objects in (truth, found):
        coco = COCO()
        coco.dataset = {**annotations, "annotations": objects}
        coco.createIndex()
        sets.append(coco)
    evaluation = COCOeval_faster(*sets, iouType="segm" if masks else "bbox")
    evaluation.params.imgIds = sorted(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {
        name: None if value < 0 else float(value)
        for name, value in zip(FIGURES, evaluation.stats[: len(FIGURES)], strict=True)
    }


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_size(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any, below: int) -> bool:
    return type(value) in (int, float) and abs(value) < below  # which NaN is not


def _are_numbers(value: Any) -> bool:
    # Farther out no picture has a pixel, and COCO's code that draws polygons asks for memory in proportion.
    return isinstance(value, list) and all(_is_number(item, 2**20) for item in value)


def _is_box(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 4 and min(value[2:]) >= 0


_FIELDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {
        "id": (_is_integer, "an integer"),
        "file_name": (_is_text, "a file's name"),
        "height": (_is_size, "a positive integer"),
        "width": (_is_size, "a positive integer"),
    },
    "categories": {"id": (_is_integer, "an integer"), "name": (_is_text, "a name")},
    "annotations": {
        "image_id": (_is_integer, "an integer"),
        "category_id": (_is_integer, "an integer"),
        "bbox": (_is_box, "[x, y, width, height]"),
    },
}


def _complaint(content: Any) -> str:
    """What is not as it has to be, or nothing."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not an object"
    for key, fields in _FIELDS.items():
        entries = content.get(key)
        if not isinstance(entries, list):
            return f"it has no list of {key}"
        if not entries and key != "annotations":
            return f"its list of {key} is empty"
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                return f"{key}[{number}] is not an object"
            for field, (right, expected) in fields.items():
                if not right(entry.get(field)):
                    return f"{key}[{number}] must have {expected} as {field!r}, got {entry.get(field)!r:.60}"
    images, categories = ({entry["id"]: entry for entry in content[key]} for key in ("images", "categories"))
    for key, ids in (("images", images), ("categories", categories)):
        if len(ids) < len(content[key]):
            ((twice, _),) = Counter(entry["id"] for entry in content[key]).most_common(1)
            return f"several of its {key} have the same id, {twice}"
    for number, entry in enumerate(content["annotations"]):
        if entry["image_id"] not in images:
            return f"annotations[{number}] is of an image that is not listed, {entry['image_id']}"
        if entry["category_id"] not in categories:
            return f"annotations[{number}] is of a category that is not listed, {entry['category_id']}"
        if not _is_number(entry.get("area", 0), 2**40) or entry.get("iscrowd", 0) not in (0, 1):
            return f"annotations[{number}] must have a number as 'area' and 0 or 1 as 'iscrowd'"
        if not _is_segmentation(entry.get("segmentation"), images[entry["image_id"]]):
            return f"annotations[{number}] must have polygons or run lengths of its image's size as 'segmentation'"
    return ""


def _is_segmentation(value: Any, image: Mapping[str, Any]) -> bool:
    """Whether it is none, a list of polygons, or run lengths, compressed or not, of the image's size."""
    if not value:
        return True
    if isinstance(value, list):
        return all(_are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in value)
    size = [image["height"], image["width"]]
    if not isinstance(value, dict) or value.get("size") != size:
        return False
    counts = value.get("counts")
    if isinstance(counts, list):
        return all(_is_integer(count) and count >= 0 for count in counts) and sum(counts) == math.prod(size)
    try:
        rle.decode({"size": size, "counts": str(counts).encode()})
    except (ValueError, RuntimeError):  # not as long as the image, or damaged
        return False
    return True
