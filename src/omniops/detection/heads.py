"""What follows the feature pyramid, where MMDetection's detectors differ from torchvision's.

Boxes are float32 whatever the network computes in: bfloat16 has steps of 8 pixels at 1333.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from omniops import device as devices
from omniops.detection.inputs import Target
from omniops.detection.transform import ResizedSize
from omniops.nn import CARAFEPack

STRIDES = (4, 8, 16, 32, 64)
"""Of the pyramid's levels, in pixels of the batch."""


class AnchorGenerator(nn.Module):
    """Anchors of 8 strides and three aspect ratios, centred on multiples of the stride; torchvision rounds theirs."""

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        """Maps (N, C, H_l, W_l) -> for each image the same anchors, float32 (sum of H_l*W_l*3, 4)."""
        anchors = torch.cat([anchors_of(level, stride) for level, stride in zip(features, STRIDES, strict=True)])
        return [anchors] * len(images.image_sizes)


def anchors_of(level: Tensor, stride: int) -> Tensor:
    """A map (N, C, H, W) of that stride -> its anchors, float32 (H * W * 3, 4)."""
    height, width = level.shape[-2:]
    across, down = (stride * torch.arange(size, device=level.device).float() for size in (width, height))
    y, x = torch.meshgrid(down, across, indexing="ij")
    heights = torch.tensor([0.5, 1.0, 2.0], device=level.device).sqrt()  # ratio: height / width
    half = 4 * stride * torch.stack([1 / heights, heights], dim=1)
    shapes = torch.cat([-half, half], dim=1)
    anchors: Tensor = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4) + shapes
    return anchors.view(-1, 4)


class BoxCoder(detection_utils.BoxCoder):  # type: ignore[misc]
    """Boxes as differences from others, in units of ``stds``; sizes change by at most 1000/16 either way."""

    def __init__(self, stds: Sequence[float]) -> None:
        super().__init__(tuple(1 / std for std in stds))
        self.stds = stds

    def decode(self, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
        """Differences (N, K*4) from boxes (n, 4) of each image, N together -> boxes (N, K, 4)."""
        reference = torch.cat(boxes)[:, None]
        differences = rel_codes.float().unflatten(1, (-1, 4)) * reference.new_tensor(self.stds)
        centres = (reference[..., :2] + reference[..., 2:]) * 0.5
        sizes = reference[..., 2:] - reference[..., :2]
        limit = math.log(1000 / 16)
        centres = centres + sizes * differences[..., :2]
        sizes = sizes * differences[..., 2:].clamp(-limit, limit).exp()
        return torch.cat([centres - sizes * 0.5, centres + sizes * 0.5], dim=-1)


def classwise_nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression among the boxes of each class -> the indices of those kept, the highest score first.

    Each class is moved away from the others. That rounds the coordinates, which decides about boxes on the threshold:
    torchvision's ``batched_nms`` does it for other numbers of boxes than MMDetection, and decides otherwise.
    """
    if len(boxes) == 0:
        return classes.new_empty(0)
    offsets = classes.to(boxes.dtype) * (boxes.max() + 1)
    moved = boxes + offsets[:, None]
    if len(boxes) < 10000:
        together: Tensor = nms(moved, scores, iou_threshold)
        return together
    kept = torch.zeros_like(classes, dtype=torch.bool)
    for label in classes.cpu().unique():  # MPS takes integers through float32 (pytorch issue 195595)
        own = (classes == label).nonzero()[:, 0]
        kept[own[nms(moved[own], scores[own], iou_threshold)]] = True
    indices = kept.nonzero()[:, 0]
    return indices[scores[indices].argsort(descending=True)]


def _is_empty_on_mps(tensor: Tensor, count: int) -> bool:
    """Whether ``tensor`` is on MPS, where not every operator takes an empty tensor, and ``count`` is 0."""
    return tensor.device.type == "mps" and count == 0


class RegionProposalNetwork(TorchvisionRPN):  # type: ignore[misc]
    """torchvision's, with MMDetection's choice of proposals: by probability, and of any size above zero."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[ResizedSize],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes (N, A, 4) and their logits (N*A, 1) -> for each image the boxes kept, and their probabilities."""
        probabilities = objectness.detach().float().view(len(proposals), -1).sigmoid()
        kept = []
        for boxes, scores, size in zip(proposals, probabilities, image_shapes, strict=True):
            best, levels = self._best(scores, num_anchors_per_level)
            boxes, scores = clip_boxes_to_image(boxes[best], size), scores[best]
            solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, scores, levels = boxes[solid], scores[solid], levels[solid]
            chosen = classwise_nms(boxes, scores, levels, self.nms_thresh)[: self.post_nms_top_n()]
            kept.append((boxes[chosen], scores[chosen]))
        boxes_kept, scores_kept = zip(*kept, strict=True)
        return list(boxes_kept), list(scores_kept)

    def _best(self, scores: Tensor, num_anchors_per_level: list[int]) -> tuple[Tensor, Tensor]:
        """The indices of each level's best anchors, and their levels."""
        limit = self.pre_nms_top_n()
        indices = torch.arange(len(scores), device=scores.device).split(num_anchors_per_level)
        best = [
            # Among equal scores this leaves the choice to PyTorch's sort, as MMDetection does.
            own[level.sort(descending=True)[1][:limit]] if len(own) > limit else own
            for own, level in zip(indices, scores.split(num_anchors_per_level), strict=True)
        ]
        return torch.cat(best), torch.cat([torch.full_like(own, number) for number, own in enumerate(best)])

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """torchvision's, in float32."""
        losses: tuple[Tensor, Tensor] = super().compute_loss(
            objectness.float(), pred_bbox_deltas.float(), labels, regression_targets
        )
        return losses


class RoIAlign(nn.Module):
    """RoIAlign, aligned and with as many samples as there are pixels, each box from the level of its size.

    Args:
        output_size: S.
    """

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Maps (N, C, H_l, W_l), finest first, and boxes (K_n, 4) of each image -> (sum of K_n, C, S, S)."""
        maps = list(features.values())[:4]
        if _is_empty_on_mps(boxes[0], sum(map(len, boxes))):
            return maps[0].new_zeros(0, maps[0].shape[1], self.output_size, self.output_size)
        images = torch.cat([own.new_full((len(own), 1), number) for number, own in enumerate(boxes)])
        together = torch.cat(boxes)
        scales = (together[:, 2:] - together[:, :2]).prod(dim=1).sqrt()
        levels = (scales / 56 + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(together), maps[0].shape[1], self.output_size, self.output_size)
        for level, (features_of, stride) in enumerate(zip(maps, STRIDES, strict=False)):
            own = (levels == level).nonzero()[:, 0]
            if _is_empty_on_mps(own, len(own)):
                continue
            rois = torch.cat([images[own], together[own]], dim=1)
            samples = roi_align(features_of.float(), rois, self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled[own] = samples.to(pooled.dtype)
        return pooled


class CARAFEMaskPredictor(nn.Sequential):
    """The last layers of the mask head: CARAFE, with no activation after it, and a logit for each class.

    A new one fits a model to other classes:
    ``model.roi_heads.mask_predictor = CARAFEMaskPredictor(256, num_classes)``.

    Args:
        in_channels: C of the features.
        num_classes: with the background, which is the first.

    Example:
        >>> CARAFEMaskPredictor(16, num_classes=3)(torch.randn(2, 16, 14, 14)).shape
        torch.Size([2, 3, 28, 28])
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        upsample = CARAFEPack(in_channels, 2, 5, 1, 3, 1, 64)
        logits = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.kaiming_normal_(logits.weight, mode="fan_out", nonlinearity="relu")
        if logits.bias is not None:
            nn.init.zeros_(logits.bias)
        super().__init__(OrderedDict(upsample=upsample, mask_fcn_logits=logits))


class RoIHeads(TorchvisionRoIHeads):  # type: ignore[misc]
    """torchvision's, with MMDetection's way from scores and differences to detections, and its targets for masks."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.box_coder = BoxCoder((0.1, 0.1, 0.2, 0.2))

    def check_targets(self, targets: list[Target] | None) -> None:
        """torchvision's, and whether the labels are the model's: MMDetection's, from 0, would train silently."""
        super().check_targets(targets)
        classes = self.box_predictor.cls_score.out_features
        for number, target in enumerate(targets or ()):
            labels = target["labels"]
            if labels.dtype != torch.int64:
                raise TypeError(f"targets[{number}]['labels'] must be int64, got {labels.dtype}")
            if ((labels < 1) | (labels >= classes)).any():
                raise ValueError(
                    f"targets[{number}]['labels'] must be from 1 to {classes - 1}, got {labels.unique().tolist()}"
                )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[ResizedSize],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """The pyramid and each image's proposals -> each image's detections, or in training the losses."""
        if self.training:
            proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits, differences = self._box_logits(self.box_roi_pool(features, proposals, image_shapes))
        if self.training:
            assert targets is not None
            classifier, box_reg = fastrcnn_loss(logits, differences, labels, regression_targets)
            losses = {"loss_classifier": classifier, "loss_box_reg": box_reg}
            if self.has_mask():
                losses["loss_mask"] = self._mask_loss(features, image_shapes, proposals, matched, labels, targets)
            return [], losses

        detections = [
            {"boxes": boxes, "labels": labels, "scores": scores}
            for boxes, scores, labels in zip(
                *self.postprocess_detections(logits, differences, proposals, image_shapes), strict=True
            )
        ]
        if self.has_mask():
            mask_logits = self._mask_logits(features, [found["boxes"] for found in detections], image_shapes)
            masks = maskrcnn_inference(mask_logits, [found["labels"] for found in detections])
            for detection, mask in zip(detections, masks, strict=True):
                detection["masks"] = mask
        return detections, {}

    def _box_logits(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        logits, differences = self.box_predictor(self.box_head(devices.without_single_row(pooled)))
        return logits[: len(pooled)].float(), differences[: len(pooled)].float()

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        image_shapes: list[ResizedSize],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[Target],
    ) -> Tensor:
        """The mean binary cross entropy of the masks, of each image's proposals that have an object's label."""
        boxes, classes, truth = [], [], []
        for proposed, indices, proposed_labels, target in zip(proposals, matched, labels, targets, strict=True):
            positive = proposed_labels > 0
            boxes.append(proposed[positive])
            classes.append(proposed_labels[positive])
            side = 2 * self.mask_roi_pool.output_size
            truth.append(_mask_targets(target["masks"], boxes[-1], indices[positive], side))
        label = torch.cat(classes)
        logits = self._mask_logits(features, boxes, image_shapes)[torch.arange(len(label), device=label.device), label]
        # The mean over nothing would be NaN.
        total = F.binary_cross_entropy_with_logits(logits, torch.cat(truth), reduction="sum")
        return total / max(1, logits.numel())

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[ResizedSize]) -> Tensor:
        pooled: Tensor = self.mask_roi_pool(features, boxes, image_shapes)
        if _is_empty_on_mps(pooled, len(pooled)):
            side = 2 * self.mask_roi_pool.output_size
            return pooled.new_empty(0, self.box_predictor.cls_score.out_features, side, side, dtype=torch.float32)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled))
        return logits.float()

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[ResizedSize]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits (N, K) and differences (N, K*4) -> for each image boxes, scores and labels, the best first.

        Where masks follow, boxes are in the batch's pixels; else they are in the image's own already before the
        suppression, which depends on them in the last bits: both as in MMDetection.
        """
        counts = [len(own) for own in proposals]
        if _is_empty_on_mps(class_logits, sum(counts)):
            empty = [own.new_empty(0) for own in proposals]
            return [own.view(0, 4) for own in empty], empty, [own.long() for own in empty]
        results = []
        for boxes, scores, size in zip(
            self.box_coder.decode(box_regression, proposals).split(counts),
            class_logits.softmax(dim=-1).split(counts),
            image_shapes,
            strict=True,
        ):
            boxes = clip_boxes_to_image(boxes, size)
            if not self.has_mask():
                boxes = boxes * boxes.new_tensor([1 / factor for factor in size.scale])
            rows, classes = (scores[:, 1:] > self.score_thresh).nonzero().unbind(dim=1)
            if _is_empty_on_mps(rows, len(rows)):
                results.append((boxes.new_empty(0, 4), scores.new_empty(0), classes))
                continue
            labels = classes + 1
            boxes, scores = boxes[rows, labels], scores[rows, labels]
            kept = classwise_nms(boxes, scores, classes, self.nms_thresh)[: self.detections_per_img]
            results.append((boxes[kept], scores[kept], labels[kept]))
        boxes_kept, scores_kept, labels_kept = zip(*results, strict=True)
        return list(boxes_kept), list(scores_kept), list(labels_kept)


def _mask_targets(masks: Tensor, boxes: Tensor, indices: Tensor, size: int) -> Tensor:
    """Masks (N, H, W), boxes (K, 4) and the mask of each -> the part of it in each box, 0 or 1, (K, S, S)."""
    rois = torch.cat([indices[:, None].to(boxes.dtype), boxes], dim=1)
    pooled: Tensor = roi_align(masks[:, None].to(boxes.dtype), rois, size, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).to(boxes.dtype)
