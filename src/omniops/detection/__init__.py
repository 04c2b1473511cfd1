"""Faster and Mask R-CNN with CARAFE on torchvision's detection framework, and OpenMMLab's checkpoints for them.

Labels count as torchvision's do, from 1, with 0 for the background: they index ``COCO_CATEGORIES`` (names) and
``COCO_CATEGORY_IDS`` (the ids in COCO's annotation files). MMDetection's labels are smaller by one.
"""

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
    raise ImportError(
        f"omniops.detection needs a torchvision made for this torch ({error}): pip install 'omniops[detect]'"
    ) from error

from omniops.detection.carafe_rcnn import (
    CARAFERCNN,
    COCO_CATEGORIES,
    COCO_CATEGORY_IDS,
    COCO_WEIGHTS,
    faster_rcnn_resnet50_fpn_carafe,
    mask_rcnn_resnet50_fpn_carafe,
)
from omniops.detection.checkpoints import from_openmmlab, load_checkpoint
from omniops.detection.heads import CARAFEMaskPredictor

__all__ = [
    "CARAFERCNN",
    "COCO_CATEGORIES",
    "COCO_CATEGORY_IDS",
    "COCO_WEIGHTS",
    "CARAFEMaskPredictor",
    "faster_rcnn_resnet50_fpn_carafe",
    "from_openmmlab",
    "load_checkpoint",
    "mask_rcnn_resnet50_fpn_carafe",
]
