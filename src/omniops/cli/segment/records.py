"""What ``omniops segment`` writes of each mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
"""``id``, ``segmentation`` as COCO's run lengths, ``area``, and more where it is known."""

NOT_FINITE = "the scores or masks are no finite numbers: are the weights damaged, or another model's?"


def mask_record(number: int, mask: NDArray[np.bool_]) -> Record:
    """The mask (H, W) of an object as COCO's run lengths."""
    from omniops.sam2 import rle

    return {"id": number, "segmentation": rle.encode(mask), "area": int(mask.sum())}


def record_of_runs(number: int, counts: NDArray[np.int64], height: int, width: int) -> Record:
    """The same of the lengths of the mask's runs."""
    from omniops.sam2 import rle

    segmentation = {"size": [height, width], "counts": rle.compress_counts(counts)}
    return {"id": number, "segmentation": segmentation, "area": rle.area(counts)}


def sort_by_area(records: Iterable[Record]) -> list[Record]:
    """The largest first, so that none is hidden by what it lies in when they are drawn."""
    return sorted(records, key=lambda record: -int(record["area"]))


def numbered_masks(records: Iterable[Record]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Each object's number and mask, one at a time, for all of them may be more than there is memory."""
    from omniops.sam2 import rle

    return ((int(record["id"]), rle.decode(record["segmentation"])) for record in records)
