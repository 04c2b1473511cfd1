"""The objects of a picture: their masks, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from omniops.sam2 import rle

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "object"
"""The label where none is known: SAM 2 has no classes."""


@dataclass(frozen=True)
class Annotation:
    """An object on a picture.

    Args:
        id: its number, from 1 on.
        segmentation: its mask as COCO's run lengths, ``{"size": [H, W], "counts": ...}``, as
            ``SAM2AutomaticMaskGenerator`` gives them with ``output_mode="coco_rle"``.
        label: its class.
        score: how sure its finder is of it.
        box: x0, y0, x1, y1 in pixels, where it is another than that of the mask.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> annotation = from_masks([mask]).objects[0]
        >>> annotation.area, annotation.bbox
        (6, [1, 1, 3, 2])
    """

    id: int
    segmentation: dict[str, Any]
    label: str = LABEL
    score: float | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask, (H, W), decoded anew each time."""
        return rle.decode(self.segmentation)

    @cached_property
    def area(self) -> int:
        """The pixels of the mask."""
        return rle.area(self._counts)

    @cached_property
    def bbox(self) -> list[float]:
        """x, y, width and height, as COCO writes boxes: of ``box``, or around the pixels of the mask."""
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            return [x0, y0, x1 - x0, y1 - y0]
        found = rle.box(self._counts, self.segmentation["size"][0])
        if found is None:
            return [0, 0, 0, 0]
        left, top, right, bottom = found
        return [left, top, right - left + 1, bottom - top + 1]

    @cached_property
    def _counts(self) -> rle.Counts:
        counts = self.segmentation["counts"]
        return rle.decompress_counts(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts, np.int64)


@dataclass(frozen=True)
class Annotations:
    """The objects of one picture.

    Args:
        height: of the picture, in pixels.
        width: of the picture.
        objects: its objects, whose ids differ.
        file_name: of the picture; with a folder before it where files of annotations shall name one.

    Raises:
        ValueError: for masks of another size, or an id that is there twice or below 1.

    Example:
        >>> record = {"size": [2, 3], "counts": "02n"}
        >>> Annotations(2, 3, [Annotation(1, {"size": [2, 3], "counts": [4, 2]}, "dog")], "a.jpg").labels
        ['dog']
    """

    height: int
    width: int
    objects: Sequence[Annotation]
    file_name: str = ""

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for annotation in self.objects:
            size = list(annotation.segmentation["size"])
            if size != [self.height, self.width]:
                raise ValueError(
                    f"masks must be of the picture's size, [{self.height}, {self.width}] (height, width), got {size} "
                    f"of object {annotation.id}"
                )
            if annotation.id < 1 or annotation.id in seen:
                raise ValueError(f"ids must differ, and be 1 or more, got {[other.id for other in self.objects]}")
            seen.add(annotation.id)

    @property
    def labels(self) -> list[str]:
        """The classes, each once, in the order of their first objects."""
        return list(dict.fromkeys(annotation.label for annotation in self.objects))

    @property
    def found(self) -> list[Annotation]:
        """The objects with a pixel or more; others are no annotation that tools can read."""
        return [annotation for annotation in self.objects if annotation.area]

    @property
    def by_area(self) -> list[Annotation]:
        """The objects, the largest first, so that none is hidden by what it lies in where they are drawn."""
        return sorted(self.objects, key=lambda annotation: -annotation.area)


def from_masks(
    masks: ArrayLike | Tensor | Sequence[ArrayLike],
    *,
    ids: Iterable[int] | None = None,
    labels: Iterable[str] | None = None,
    scores: ArrayLike | Tensor | None = None,
    boxes: ArrayLike | Tensor | None = None,
    file_name: str = "",
) -> Annotations:
    """The objects of a picture, of their masks.

    Args:
        masks: (N, H, W), or N of (H, W), one or more; foreground where they are not zero.
        ids: N numbers, from 1 on, that differ; by default 1, 2, ...
        labels: N classes; by default all are ``object``.
        scores: (N), finite.
        boxes: (N, 4), x0, y0, x1, y1 in pixels; by default those of the masks.
        file_name: of the picture.

    Raises:
        ValueError: for other shapes or numbers.

    Example:
        >>> masks = np.zeros((2, 4, 5), bool)
        >>> masks[0, 1:3, 1:4] = masks[1, 0] = True
        >>> [annotation.area for annotation in from_masks(masks, labels=["dog", "cat"]).objects]
        [6, 5]
    """
    arrays = [_to_array(mask) for mask in masks]  # type: ignore[union-attr]
    if not arrays or any(array.ndim != 2 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"masks must be (N, H, W) with one or more, got {[array.shape for array in arrays]}")
    count = len(arrays)
    given: dict[str, Any] = {
        "ids": list(range(1, count + 1)) if ids is None else [int(number) for number in ids],
        "labels": [LABEL] * count if labels is None else list(labels),
        "scores": [None] * count if scores is None else _to_array(scores).tolist(),
        "boxes": [None] * count if boxes is None else [tuple(box) for box in _to_array(boxes).tolist()],
    }
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(f"{name} must be of {count} objects, as there are masks, got {len(values)}")
    if boxes is not None and any(len(box) != 4 for box in given["boxes"]):
        raise ValueError(f"boxes must be (N, 4), got {_to_array(boxes).shape}")
    if scores is not None and not np.isfinite(_to_array(scores)).all():
        raise ValueError(f"scores must be finite, as JSON has no other numbers, got {given['scores']}")
    height, width = arrays[0].shape
    objects = [
        Annotation(number, rle.encode(array), label, score, box)
        for array, number, label, score, box in zip(arrays, *given.values(), strict=True)
    ]
    return Annotations(height, width, objects, file_name)


def _to_array(values: Any) -> NDArray[Any]:
    """An array of an array, a list, or a tensor wherever it is."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
