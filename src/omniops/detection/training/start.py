"""The detector that a training starts from: published or saved weights, with heads for the data set's categories."""

from __future__ import annotations

from os import PathLike

from torch import nn

from omniops import detection
from omniops.detection.carafe_rcnn import CARAFERCNN
from omniops.detection.trained import Description, read_categories

_HEADS = ("roi_heads.box_predictor",)
_MASK_HEADS = ("roi_heads.mask_predictor.mask_fcn_logits",)


def build(
    description: Description, weights: str | PathLike[str] | None = None, progress: bool = True
) -> tuple[CARAFERCNN, bool]:
    """The detector of a description, and whether its heads are those of the weights.

    They are where the weights are of the same categories, by id and name: COCO's for those that OpenMMLab published.
    Otherwise they are drawn anew by ``renew_heads``, from PyTorch's seed.

    Args:
        description: of the detector to be trained.
        weights: as ``faster_rcnn_resnet50_fpn_carafe`` takes them; None for random ones.
        progress: whether a download shows its progress.

    Raises:
        ValueError, FileNotFoundError, ConnectionError, ImportError: as ``faster_rcnn_resnet50_fpn_carafe``.

    Example:
        >>> from omniops.detection.trained import Categories
        >>> categories = Categories((0, 4), ("__background__", "boat"))
        >>> description = Description("faster_rcnn_resnet50_fpn_carafe", categories, min_size=64, max_size=96)
        >>> model, has_heads = build(description)
        >>> model.roi_heads.box_predictor.cls_score.out_features, has_heads
        (2, False)
    """
    has_heads = weights is not None and read_categories(weights, progress) == description.categories
    masks = description.architecture.startswith("mask")
    fresh = () if has_heads or weights is None else _HEADS + (_MASK_HEADS if masks else ())
    model: CARAFERCNN = getattr(detection, description.architecture)(
        weights,
        len(description.categories.ids),
        fresh=fresh,
        progress=progress,
        min_size=description.min_size,
        max_size=description.max_size,
        mask_threshold=0.5,  # boolean masks take a quarter of the memory where they are judged
    )
    if not has_heads:
        renew_heads(model)
    return model, has_heads


def renew_heads(model: CARAFERCNN) -> None:
    """Draw the weights of the layers that tell classes apart anew, for a data set's own categories.

    They are small, as Detectron2's: those of a new layer by PyTorch are large where there are few classes, and the
    first steps would undo what the other layers have learnt.

    Example:
        >>> model = omniops.detection.faster_rcnn_resnet50_fpn_carafe(num_classes=3)
        >>> renew_heads(model)
        >>> model.roi_heads.box_predictor.cls_score.weight.std().item() < 0.02
        True
    """
    heads = [(model.roi_heads.box_predictor.cls_score, 0.01), (model.roi_heads.box_predictor.bbox_pred, 0.001)]
    if model.roi_heads.has_mask():
        heads.append((model.roi_heads.mask_predictor.mask_fcn_logits, 0.001))
    for layer, std in heads:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
