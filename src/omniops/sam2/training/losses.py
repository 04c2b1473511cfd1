"""The losses of SAM 2 (Ravi et al., 2024): focal and dice on masks, L1 on IoU, cross entropy on presence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.ops._library import without_autocast
from omniops.sam2.modeling.mask_decoder import Masks

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, OBJECT_WEIGHT = 20.0, 1.0, 1.0, 1.0
_ALPHA, _GAMMA = 0.25, 2.0


class Losses(NamedTuple):
    """Means over objects, scalars in float32.

    Example:
        >>> Losses._fields
        ('total', 'focal', 'dice', 'iou', 'object_score', 'mean_iou')
    """

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou: Tensor
    object_score: Tensor
    mean_iou: Tensor
    """Of the trained masks with the targets that are there, without gradient: for people to read."""


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The focal loss (Lin et al., 2017), the mean over pixels, with alpha 0.25 and gamma 2.

    Args:
        logits: (..., H, W), floating.
        targets: (..., H, W), 0 and 1, of the logits' shape and dtype.

    Returns:
        (...), of the logits' dtype.

    Raises:
        ValueError: for different shapes.

    Example:
        >>> sigmoid_focal_loss(torch.full((1, 2, 2), 9.0), torch.ones(1, 2, 2)) < 1e-9
        tensor([True])
    """
    _check_shapes(logits, targets)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    missed = probability + targets - 2 * probability * targets
    alpha = _ALPHA * targets + (1 - _ALPHA) * (1 - targets)
    return (alpha * missed**_GAMMA * cross_entropy).mean(dim=(-2, -1))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One less the Dice coefficient, smoothed by 1.

    Args:
        logits: (..., H, W), floating.
        targets: (..., H, W), 0 and 1, of the logits' shape.

    Returns:
        (...), of the logits' dtype.

    Raises:
        ValueError: for different shapes.

    Example:
        >>> dice_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # 1 - (2 * 2 + 1) / (2 + 4 + 1)
        tensor([0.2857])
    """
    _check_shapes(logits, targets)
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (probability.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1)) + 1)


@torch.no_grad()
def actual_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """The IoU of masks, which are what is above 0, with targets; 1 where both are empty.

    Args:
        logits: (..., H, W)
        targets: (..., H, W), 0 and 1.

    Returns:
        (...), float32, without gradient.

    Raises:
        ValueError: for different shapes.

    Example:
        >>> actual_iou(torch.tensor([[[3.0, 3.0], [-3.0, -3.0]]]), torch.ones(1, 2, 2))
        tensor([0.5000])
    """
    _check_shapes(logits, targets)
    found, expected = logits > 0, targets > 0.5
    union = (found | expected).sum(dim=(-2, -1)).float()
    return torch.where(union > 0, (found & expected).sum(dim=(-2, -1)) / union.clamp(min=1), 1.0)


def sam2_losses(masks: Masks, targets: Tensor) -> Losses:
    """The losses of B objects' masks.

    Of M masks the one of least segmentation loss is trained. An object that is not in the frame trains its score alone.

    Args:
        masks: of ``SAM2Base.predict_masks``.
        targets: (B, S, S) or (B, S/4, S/4), 0 and 1; logits are resized to them.

    Returns:
        The means over objects, computed in float32 also under autocast.

    Raises:
        ValueError: for targets of another shape.

    Example:
        >>> from omniops.sam2.modeling.mask_decoder import Masks
        >>> targets = torch.zeros(1, 8, 8)
        >>> targets[:, 2:6, 2:6] = 1
        >>> logits = 40 * targets[:, None] - 20
        >>> masks = Masks(logits, torch.ones(1, 1), torch.zeros(1, 1, 256), torch.full((1, 1), 20.0))
        >>> sam2_losses(masks, targets).total < 1e-6
        tensor(True)
    """
    if targets.ndim != 3 or len(targets) != len(masks.ious):
        raise ValueError(
            f"targets must be ({len(masks.ious)}, H, W), a mask for each prompt, got {tuple(targets.shape)}"
        )
    with without_autocast(targets):
        targets = targets.float()
        logits = masks.low_res_masks.float()
        if logits.shape[-2:] != targets.shape[-2:]:
            logits = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)
        expected = targets[:, None].expand_as(logits)
        focal, dice = sigmoid_focal_loss(logits, expected), dice_loss(logits, expected)
        best = (FOCAL_WEIGHT * focal + DICE_WEIGHT * dice).argmin(dim=1, keepdim=True)
        actual = actual_iou(logits, expected)
        is_there = targets.flatten(1).any(dim=1).float()

        def mean(loss: Tensor) -> Tensor:
            return (loss.gather(1, best)[:, 0] * is_there).mean()

        focal, dice = mean(focal), mean(dice)
        iou = mean((masks.ious.float() - actual).abs())
        score = F.binary_cross_entropy_with_logits(masks.object_score_logits.float()[:, 0], is_there)
        total = FOCAL_WEIGHT * focal + DICE_WEIGHT * dice + IOU_WEIGHT * iou + OBJECT_WEIGHT * score
        mean_iou = (actual.gather(1, best)[:, 0] * is_there).sum() / is_there.sum().clamp(min=1)
    return Losses(total, focal, dice, iou, score, mean_iou)


def _check_shapes(logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:
        raise ValueError(f"targets must have the shape of logits, {tuple(logits.shape)}, got {tuple(targets.shape)}")
