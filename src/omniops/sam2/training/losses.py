"""The losses of SAM 2 (Ravi et al., 2024): focal and dice on masks, L1 on IoU, cross entropy on presence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.sam2.modeling.mask_decoder import Masks

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, OBJECT_WEIGHT = 20.0, 1.0, 1.0, 1.0
_ALPHA, _GAMMA = 0.25, 2.0


class Losses(NamedTuple):
    """Means over objects, scalars in float32."""

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou: Tensor
    object_score: Tensor
    mean_iou: Tensor
    """Of the trained masks with the targets that are there, without gradient: for people to read."""


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., H, W) logits and targets of 0 and 1 -> (...), the mean over pixels (Lin et al., 2017)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    missed = probability + targets - 2 * probability * targets
    alpha = _ALPHA * targets + (1 - _ALPHA) * (1 - targets)
    return (alpha * missed**_GAMMA * cross_entropy).mean(dim=(-2, -1))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., H, W) logits and targets of 0 and 1 -> (...), one less the Dice coefficient, smoothed by 1."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (probability.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1)) + 1)


@torch.no_grad()
def actual_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., H, W) logits and targets -> (...), the IoU of what is above 0; 1 where both are empty."""
    found, expected = logits > 0, targets > 0.5
    union = (found | expected).sum(dim=(-2, -1)).float()
    return torch.where(union > 0, (found & expected).sum(dim=(-2, -1)) / union.clamp(min=1), 1.0)


def sam2_losses(masks: Masks, targets: Tensor) -> Losses:
    """The losses of B objects' masks.

    Of M masks the one of least segmentation loss is trained. An object that is not in the frame trains its score alone.

    Args:
        masks: of ``SAM2Base.predict_masks``.
        targets: (B, S, S) or (B, S/4, S/4), 0 and 1; logits are resized to them.

    Raises:
        ValueError: for targets of another shape.
    """
    if targets.ndim != 3 or len(targets) != len(masks.ious):
        raise ValueError(
            f"targets must be ({len(masks.ious)}, H, W), a mask for each prompt, got {tuple(targets.shape)}"
        )
    with torch.autocast(targets.device.type, enabled=False):
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
