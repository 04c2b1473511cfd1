"""Faster and Mask R-CNN with a ResNet-50 and CARAFE in the feature pyramid, and in the mask head."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from os import PathLike
from typing import Any, SupportsIndex

from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead

from omniops.detection.checkpoints import load_checkpoint
from omniops.detection.heads import AnchorGenerator, CARAFEMaskPredictor, RegionProposalNetwork, RoIAlign, RoIHeads
from omniops.detection.inputs import Target, require_images, require_targets
from omniops.detection.transform import Transform
from omniops.nn import FPNCarafe

_OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0/carafe"
COCO_WEIGHTS = {
    "faster_rcnn_resnet50_fpn_carafe": f"{_OPENMMLAB}/faster_rcnn_r50_fpn_carafe_1x_coco/"
    "faster_rcnn_r50_fpn_carafe_1x_coco_bbox_mAP-0.386_20200504_175733-385a75b7.pth",
    "mask_rcnn_resnet50_fpn_carafe": f"{_OPENMMLAB}/mask_rcnn_r50_fpn_carafe_1x_coco/"
    "mask_rcnn_r50_fpn_carafe_1x_coco_bbox_mAP-0.393__segm_mAP-0.358_20200503_135957-8687f195.pth",
}
"""What ``weights="coco"`` fetches: OpenMMLab's published checkpoints, of COCO 2017 and one schedule."""

# torchvision's labels are COCO's ids, with gaps.
_NAMES = dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
COCO_CATEGORY_IDS: tuple[int, ...] = tuple(number for number, name in _NAMES.items() if name != "N/A")
"""COCO's category id of each label; 0 of the background."""
COCO_CATEGORIES: tuple[str, ...] = tuple(_NAMES[number] for number in COCO_CATEGORY_IDS)
"""The name of each label; ``"__background__"`` of 0."""


class Backbone(nn.Module):
    """ResNet-50 and the pyramid on it.

    Args:
        weights: torchvision's for the ResNet, or None.
        trainable_layers: how many of the ResNet's five stages train, from the last.
        frozen_statistics: whether its batch normalisations keep the statistics that they have, also in training.
    """

    out_channels = 256

    def __init__(self, weights: ResNet50_Weights | str | None, trainable_layers: int, frozen_statistics: bool) -> None:
        super().__init__()
        if not 0 <= trainable_layers <= 5:
            raise ValueError(f"trainable_backbone_layers must be between 0 and 5, got {trainable_layers}")
        layers = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
        self.body = IntermediateLayerGetter(resnet50(weights=weights), layers)
        stages = [("layer4",), ("layer3",), ("layer2",), ("layer1",), ("conv1", "bn1")]
        for frozen in stages[trainable_layers:]:
            for name in frozen:
                self.body[name].requires_grad_(False)
        self.fpn = FPNCarafe([256, 512, 1024, 2048], self.out_channels, num_outs=5)
        self.frozen_statistics = frozen_statistics

    def train(self, mode: bool = True) -> Backbone:
        """As any module, but for the statistics."""
        super().train(mode)
        for module in self.body.modules() if self.frozen_statistics else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> five maps (N, 256, H/4, W/4), ... (N, 256, H/64, W/64)."""
        maps: dict[str, Tensor] = self.fpn(self.body(x))
        return maps


class CARAFERCNN(GeneralizedRCNN):  # type: ignore[misc]
    """The detectors' common class: ``faster_rcnn_resnet50_fpn_carafe`` and ``mask_rcnn_resnet50_fpn_carafe`` build it.

    Args:
        backbone: gives maps of 256 channels at strides 4, 8, 16, 32 and 64, by name.
        num_classes: with the background.
        masks: whether it predicts masks.
        min_size: what the shorter side of an image is resized to; several: in training one of them at random.
        max_size: what the longer side is at most resized to.
        image_mean: of each channel, red, green and blue, of values in [0, 1].
        image_std: of each channel.
        mask_threshold: None for masks of probabilities, as torchvision's; 0.5 for MMDetection's boolean masks, which
            take a quarter of the memory.

    The arguments whose names begin with ``rpn_`` and ``box_`` are torchvision's ``FasterRCNN``'s; their defaults are
    MMDetection's.

    Example:
        >>> with torch.device("meta"):
        ...     model = faster_rcnn_resnet50_fpn_carafe(num_classes=3)
        >>> isinstance(model, CARAFERCNN)
        True
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        masks: bool,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        box_fg_iou_thresh: float = 0.5,
        box_bg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        mask_threshold: float | None = None,
    ) -> None:
        num_classes = _as_num_classes(num_classes)
        rpn = RegionProposalNetwork(
            AnchorGenerator(),
            RPNHead(256, num_anchors=3),
            rpn_fg_iou_thresh,
            rpn_bg_iou_thresh,
            rpn_batch_size_per_image,
            rpn_positive_fraction,
            {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            rpn_nms_thresh,
        )
        heads = RoIHeads(
            RoIAlign(7),
            TwoMLPHead(256 * 7 * 7, 1024),
            FastRCNNPredictor(1024, num_classes),
            box_fg_iou_thresh,
            box_bg_iou_thresh,
            box_batch_size_per_image,
            box_positive_fraction,
            None,
            box_score_thresh,
            box_nms_thresh,
            box_detections_per_img,
            *(_mask_modules(num_classes) if masks else ()),
        )
        # 64: the coarsest stride, so that every level's size is exact.
        transform = Transform(min_size, max_size, image_mean, image_std, 64, mask_threshold)
        super().__init__(backbone, rpn, heads, transform)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Detections, or in training a dict of losses, as ``faster_rcnn_resnet50_fpn_carafe`` has it.

        Raises:
            TypeError: for images that are no list of tensors of floating point, and for targets that are no list of
                dicts of tensors.
            ValueError: for images of another shape, or with values that are NaN or farther than 0.25 beyond [0, 1], as
                normalised ones or those in [0, 255]; in training for missing targets, boxes that are not (N, 4), finite
                and of a width and a height, labels that are not N or not the model's, masks of another shape or of
                other values than 0 and 1.
        """
        require_images(images)  # here too: torchvision asks for their shapes before the transform does
        if self.training:
            names = ("boxes", "labels", "masks") if self.roi_heads.has_mask() else ("boxes", "labels")
            require_targets(images, targets, names)
        return super().forward(images, targets)


def _as_num_classes(num_classes: SupportsIndex) -> int:
    try:
        number = index(num_classes)
    except TypeError:
        raise TypeError(f"num_classes must be an int, got {num_classes!r}") from None
    if number < 2:
        raise ValueError(f"num_classes must be at least 2: the background and one more, got {number}")
    return number


def _mask_modules(num_classes: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """``RoIHeads``'s ``mask_roi_pool``, ``mask_head`` and ``mask_predictor``."""
    return RoIAlign(14), MaskRCNNHeads(256, (256,) * 4, 1), CARAFEMaskPredictor(256, num_classes)


def _build(
    name: str,
    masks: bool,
    weights: str | PathLike[str] | None,
    num_classes: int,
    weights_backbone: ResNet50_Weights | str | None,
    trainable_backbone_layers: int | None,
    fresh: Sequence[str],
    progress: bool,
    arguments: dict[str, Any],
) -> CARAFERCNN:
    trained = weights is not None or weights_backbone is not None
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 3 if trained else 5
    # A whole checkpoint brings the backbone's weights along.
    backbone = Backbone(weights_backbone if weights is None else None, trainable_backbone_layers, trained)
    model = CARAFERCNN(backbone, num_classes, masks=masks, **arguments)
    if weights is not None:
        load_checkpoint(model, COCO_WEIGHTS[name] if weights == "coco" else weights, fresh=fresh, progress=progress)
    return model


def faster_rcnn_resnet50_fpn_carafe(
    weights: str | PathLike[str] | None = None,
    num_classes: int = 81,
    *,
    weights_backbone: ResNet50_Weights | str | None = None,
    trainable_backbone_layers: int | None = None,
    fresh: Sequence[str] = (),
    progress: bool = True,
    **kwargs: Any,
) -> CARAFERCNN:
    """Faster R-CNN with ResNet-50, FPN and CARAFE (MMDetection's ``faster-rcnn_r50_fpn-carafe_1x_coco``).

    It is called as torchvision's detectors. In evaluation: a list of images (3, H, W), red, green and blue in [0, 1],
    of any sizes, -> for each a dict of ``boxes`` (N, 4) as x1, y1, x2, y2 in the image's pixels, ``labels`` int64 (N)
    and ``scores`` (N), the highest first. In training, with a list of targets too, dicts of ``boxes`` and ``labels``:
    -> a dict of losses to be added up. With the same weights the detections are MMDetection's, whose labels are
    smaller by one; matching, sampling and losses of boxes are torchvision's.

    Args:
        weights: None for random ones; ``"coco"`` for OpenMMLab's published ones; or the path or the URL of a
            checkpoint, OpenMMLab's of this architecture or the state dict of such a model.
        num_classes: with the background, which is 0: 81 for COCO's 80, which ``COCO_CATEGORIES`` names.
        weights_backbone: torchvision's weights for the ResNet alone, such as ``"IMAGENET1K_V1"``; unused with
            ``weights``.
        trainable_backbone_layers: how many of the ResNet's five stages train, from the last. By default 3 with any
            weights, as in MMDetection, and 5 without. With any, the batch normalisations keep their statistics.
        fresh: the names of modules that stay random instead of being loaded, for other classes:
            ``("roi_heads.box_predictor",)``.
        progress: whether a download shows its progress.
        **kwargs: further arguments of ``CARAFERCNN``.

    Raises:
        ValueError: for weights that are no checkpoint, do not fit (naming what is missing, unexpected and of another
            shape), or hold objects that only running code could restore; and for wrong numbers.
        TypeError: for ``num_classes`` that is no integer, and for a string as ``fresh``.
        FileNotFoundError: where there is no such file.
        ConnectionError: for weights that cannot be fetched.

    Example:
        >>> model = faster_rcnn_resnet50_fpn_carafe(min_size=64, rpn_post_nms_top_n_test=50).eval()  # random weights
        >>> with torch.no_grad():
        ...     (found,) = model([torch.rand(3, 48, 64)])
        >>> sorted(found)
        ['boxes', 'labels', 'scores']
    """
    return _build(
        "faster_rcnn_resnet50_fpn_carafe", False, weights, num_classes, weights_backbone, trainable_backbone_layers,
        fresh, progress, kwargs,
    )  # fmt: skip


def mask_rcnn_resnet50_fpn_carafe(
    weights: str | PathLike[str] | None = None,
    num_classes: int = 81,
    *,
    weights_backbone: ResNet50_Weights | str | None = None,
    trainable_backbone_layers: int | None = None,
    fresh: Sequence[str] = (),
    progress: bool = True,
    **kwargs: Any,
) -> CARAFERCNN:
    """Mask R-CNN with ResNet-50, FPN and CARAFE, also in the mask head (``mask-rcnn_r50_fpn-carafe_1x_coco``).

    As ``faster_rcnn_resnet50_fpn_carafe``, arguments and errors too. Detections have ``masks`` as well, (N, 1, H, W):
    probabilities, as torchvision's; at least 0.5 is MMDetection's mask, and ``mask_threshold=0.5`` gives that alone.
    Targets have ``masks`` (N, H, W), 0 or 1. For other classes
    ``fresh=("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")``.

    Example:
        >>> model = mask_rcnn_resnet50_fpn_carafe(weights="coco", mask_threshold=0.5).eval()  # needs: the network
        >>> (found,) = model([torch.rand(3, 480, 640)])
        >>> found["masks"].dtype
        torch.bool
    """
    return _build(
        "mask_rcnn_resnet50_fpn_carafe", True, weights, num_classes, weights_backbone, trainable_backbone_layers,
        fresh, progress, kwargs,
    )  # fmt: skip
