"""Masks of objects as the files that other tools read: COCO, YOLO, LabelMe, pictures of masks, and cut-outs.

    annotations = from_masks(masks, labels=["truck", "wheel"], file_name="images/truck.jpg")
    save(annotations, "labels/truck", "yolo")

Names are imported at their first use: the command names the formats before it imports PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniops.annotations.coco import to_coco
    from omniops.annotations.files import files_of, save
    from omniops.annotations.formats import Format
    from omniops.annotations.frames import group_by_frame, to_frame
    from omniops.annotations.labelme import to_labelme
    from omniops.annotations.objects import Annotation, Annotations, from_masks
    from omniops.annotations.pictures import cut_out, davis_palette, label_image
    from omniops.annotations.polygons import join_polygons, mask_to_polygons
    from omniops.annotations.yolo import to_yolo, to_yolo_dataset

__all__ = [
    "Annotation",
    "Annotations",
    "Format",
    "cut_out",
    "davis_palette",
    "files_of",
    "from_masks",
    "group_by_frame",
    "join_polygons",
    "label_image",
    "mask_to_polygons",
    "save",
    "to_coco",
    "to_frame",
    "to_labelme",
    "to_yolo",
    "to_yolo_dataset",
]

_MODULES = {
    "Annotation": "objects",
    "Annotations": "objects",
    "Format": "formats",
    "cut_out": "pictures",
    "davis_palette": "pictures",
    "files_of": "files",
    "from_masks": "objects",
    "group_by_frame": "frames",
    "join_polygons": "polygons",
    "label_image": "pictures",
    "mask_to_polygons": "polygons",
    "save": "files",
    "to_coco": "coco",
    "to_frame": "frames",
    "to_labelme": "labelme",
    "to_yolo": "yolo",
    "to_yolo_dataset": "yolo",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
