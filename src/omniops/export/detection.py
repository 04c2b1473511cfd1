"""Faster and Mask R-CNN with CARAFE for files: an image of any size goes in, its detections come out.

The detectors' own code takes lists of images, loops over detections and asks for numbers on the way. Here all of it is
tensors, and the results are the same: resizing in 8-bit arithmetic, proposals, suppression, and masks pasted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.ops import nms, roi_align

from omniops import _torch_private
from omniops.detection import CARAFERCNN
from omniops.detection.heads import STRIDES, anchors_of
from omniops.export.parts import Part, require_exportable

__all__ = ["parts"]

_MULTIPLE = STRIDES[-1]
"""Images are padded to multiples of the coarsest stride, so that every level has an exact size."""
_WEIGHT = 2048
"""Of the two pixels between which a new one lies, together."""


def parts(model: CARAFERCNN, *, dynamic: bool = True, size: tuple[int, int] = (480, 640)) -> list[Part]:
    """The detector as a part, with its weights and settings as they are now.

    Args:
        model: of ``omniops.detection``, in float32 on the CPU; ``Part.half`` gives it in float16.
        dynamic: whether images may be of any size; else they are of ``size``.
        size: (H, W) of the image that it is exported with, from 2 pixels on.

    Raises:
        TypeError: for a model that is none of ``omniops.detection``.
        ValueError: for one in another dtype, on another device, or in training mode; for another size.

    Example:
        >>> from omniops.export import detection
        >>> model = omniops.detection.faster_rcnn_resnet50_fpn_carafe(min_size=64, max_size=64).eval()
        >>> (part,) = detection.parts(model)
        >>> with torch.no_grad():
        ...     boxes, labels, scores = part.module(torch.rand(3, 48, 64))
        >>> boxes.shape[1], part.output_names
        (4, ('boxes', 'labels', 'scores'))
    """
    if not isinstance(model, CARAFERCNN):
        raise TypeError(f"model must be a detector of omniops.detection, got {type(model).__name__}")
    require_exportable(model)
    if len(size) != 2 or min(size) < 2:
        raise ValueError(f"size must be a height and a width of at least 2 pixels, got {tuple(size)}")
    has_masks = model.roi_heads.has_mask()
    boolean = model.transform.mask_threshold is not None
    masks = _MASKS.format(what="bool" if boolean else "float32", meaning="the mask" if boolean else "probabilities")
    return [
        Part(
            "mask_rcnn" if has_masks else "faster_rcnn",
            DetectorPart(model, dynamic).eval(),
            (torch.rand(3, *size),),
            ("image",),
            ("boxes", "labels", "scores", *(("masks",) if has_masks else ())),
            ({1: Dim("height"), 2: Dim("width")},) if dynamic else None,
            _DETECTOR + (masks if has_masks else ""),
        )
    ]


_DETECTOR = """\
The objects in an image, the highest score first: N of them, which may be none.
Inputs:
image: float32 (3, H, W), red, green and blue from 0 to 1. The file resizes, normalises and pads it.
Outputs:
boxes: float32 (N, 4), x1, y1, x2, y2 in pixels of the image.
labels: int64 (N), from 1 on.
scores: float32 (N), from 0 to 1."""
_MASKS = """
masks: {what} (N, 1, H, W), {meaning} of each pixel."""


class _Sizes(NamedTuple):
    """Of an image before and after it is resized; tensors of float64, so that any size may be in a file."""

    original: Tensor
    """(2), height and width."""
    resized: Tensor
    """(2), whole numbers."""

    @property
    def scale(self) -> Tensor:
        """(4), what a box (x1, y1, x2, y2) was multiplied with."""
        return (self.resized / self.original).flip(0).repeat(2)

    @property
    def limits(self) -> Tensor:
        """(4), float32: the largest coordinates of a box in the resized image."""
        return self.resized.flip(0).repeat(2).float()


class DetectorPart(nn.Module):
    """A detector of one image, by the modules of ``model``.

    Args:
        model: of ``omniops.detection``.
        is_dynamic: whether images may be of any size. Else masks are computed of as many boxes as there may be at most:
            convolutions of a number that is known beforehand are what AOTInductor computes right.
    """

    def __init__(self, model: CARAFERCNN, is_dynamic: bool) -> None:
        super().__init__()
        self.is_dynamic = is_dynamic
        transform, rpn, heads = model.transform, model.rpn, model.roi_heads
        self.transform = transform
        self.min_size, self.max_size = transform.min_size[-1], transform.max_size
        self.mask_threshold = transform.mask_threshold
        self.image_mean = tuple(255 * value for value in transform.image_mean)
        self.image_std = tuple(255 * value for value in transform.image_std)
        self.backbone = model.backbone
        self.rpn_head, self.rpn_coder = rpn.head, rpn.box_coder
        self.pre_nms_top_n, self.post_nms_top_n = rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"]
        self.rpn_nms_thresh = rpn.nms_thresh
        self.box_head, self.box_predictor, self.box_coder = heads.box_head, heads.box_predictor, heads.box_coder
        self.box_size = heads.box_roi_pool.output_size
        self.score_thresh, self.nms_thresh = heads.score_thresh, heads.nms_thresh
        self.detections_per_img = heads.detections_per_img
        self.has_masks = heads.has_mask()
        if self.has_masks:
            self.mask_head, self.mask_predictor = heads.mask_head, heads.mask_predictor
            self.mask_size = heads.mask_roi_pool.output_size

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes; boxes are float32 whatever it is."""
        return next(self.parameters()).dtype

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) from 0 to 1 -> boxes (N, 4), labels (N), scores (N) and with masks masks (N, 1, H, W)."""
        sizes = self._sizes(image)
        batch = self._batch(image.float(), sizes).to(self.dtype)
        maps = [level.float() for level in self.backbone(batch).values()]
        proposals = self._proposals(maps, sizes)
        boxes, labels, scores = self._detections(maps, proposals, sizes)
        if not self.has_masks:
            return boxes, labels, scores
        # Those of boxes without pixels come first: not every runtime takes an empty batch, or one of any number.
        count = boxes.shape[0]
        missing = 1 if self.is_dynamic else self.detections_per_img - count
        some_boxes = torch.cat((boxes.new_zeros(missing, 4), boxes))
        some_labels = torch.cat((labels.new_zeros(missing), labels))
        masks = self._masks(maps, some_boxes, some_labels)
        scale = sizes.scale.float()
        pasted = self._paste(masks, some_boxes / scale, image)
        return boxes / scale, labels, scores, pasted[missing:]

    def _sizes(self, image: Tensor) -> _Sizes:
        """As ``Transform.resize`` chooses them."""
        original = torch.stack([torch.scalar_tensor(size, dtype=torch.float64) for size in image.shape[1:]])
        scale = torch.minimum(self.max_size / original.max(), self.min_size / original.min())
        return _Sizes(original, (original * scale + 0.5).floor().clamp(min=1))

    def _batch(self, image: Tensor, sizes: _Sizes) -> Tensor:
        """(3, H, W) -> the image resized, normalised and padded, (1, 3, 64 * Y, 64 * X)."""
        height, width = self._padded_size(image, sizes)
        above, below, of_above, of_below = _taps(height, sizes, 0, border=True)
        left, right, of_left, of_right = _taps(width, sizes, 1, border=False)
        values = (image[None] * 255).round().clamp(0, 255).int()
        # OpenCV's arithmetic, as ``resize_bilinear`` has it; whole numbers are divided where that shifts bits.
        rows = _divided(values[..., left] * of_left + values[..., right] * of_right, 2**4)
        sums = _divided(rows[:, :, above] * of_above[:, None], 2**16) + _divided(
            rows[:, :, below] * of_below[:, None], 2**16
        )
        resized = _divided(sums + 2, 2**2).float()
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        is_image = (torch.arange(height) < sizes.resized[0])[:, None] & (torch.arange(width) < sizes.resized[1])
        return torch.where(is_image, (resized - mean) / std, 0.0)

    def _padded_size(self, image: Tensor, sizes: _Sizes) -> tuple[int, int]:
        if not any(isinstance(size, torch.SymInt) for size in image.shape):
            height, width = self.transform.padded_size((image.shape[1], image.shape[2]))
            return height, width
        numbers = ((sizes.resized + (_MULTIPLE - 1)) / _MULTIPLE).floor().long()
        padded = []
        for axis in (0, 1):
            number: int = numbers[axis].item()  # type: ignore[assignment]
            _torch_private.check(number >= 1)
            _torch_private.check(number <= self.max_size // _MULTIPLE + 1)
            padded.append(number * _MULTIPLE)  # by which every level is known to have a whole number of pixels
        return padded[0], padded[1]

    def _proposals(self, maps: list[Tensor], sizes: _Sizes) -> Tensor:
        """As ``RegionProposalNetwork`` finds them, (N, 4), in pixels of the batch."""
        objectness, differences = self.rpn_head([level.to(self.dtype) for level in maps])
        boxes, scores, levels = [], [], []
        for number, (logits, codes, level) in enumerate(zip(objectness, differences, maps, strict=True)):
            probabilities = logits.permute(0, 2, 3, 1).flatten().float().sigmoid()
            best = probabilities.sort(descending=True)[1][: self.pre_nms_top_n]
            chosen = codes.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)[best]
            anchors = anchors_of(level, STRIDES[number])[best]
            boxes.append(self.rpn_coder.decode(chosen, [anchors])[:, 0])
            scores.append(probabilities[best])
            levels.append(torch.full_like(best, number))
        together = _clipped(torch.cat(boxes), sizes)
        solid = (together[:, 2:] > together[:, :2]).all(dim=1).nonzero()[:, 0]
        together = together[solid]
        kept = _classwise_nms(together, torch.cat(scores)[solid], torch.cat(levels)[solid], self.rpn_nms_thresh)
        return together[kept[: self.post_nms_top_n]]

    def _detections(self, maps: list[Tensor], proposals: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
        """As ``RoIHeads`` finds them: boxes (N, 4), labels (N) and scores (N)."""
        pooled = _pooled(maps, proposals, self.box_size).to(self.dtype)
        logits, differences = self.box_predictor(self.box_head(pooled))
        boxes = _clipped(self.box_coder.decode(differences, [proposals]), sizes)
        if not self.has_masks:
            boxes = boxes * (1 / sizes.scale).float()
        scores = logits.float().softmax(dim=-1)
        rows, classes = (scores[:, 1:] > self.score_thresh).nonzero().unbind(dim=1)
        labels = classes + 1
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        kept = _classwise_nms(boxes, scores, classes, self.nms_thresh)[: self.detections_per_img]
        return boxes[kept], labels[kept], scores[kept]

    def _masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """(N, S, S), the probabilities in each box."""
        pooled = _pooled(maps, boxes, self.mask_size).to(self.dtype)
        logits = self.mask_predictor(self.mask_head(pooled)).float()
        probabilities: Tensor = logits[torch.arange(labels.shape[0]), labels].sigmoid()
        return probabilities

    def _paste(self, masks: Tensor, boxes: Tensor, image: Tensor) -> Tensor:
        """As ``paste_masks``, for all at once: (N, 1, H, W).

        Bilinear sampling along the axes is a product with the weights of rows, and one with those of columns.
        """
        of_rows = _sampling(image.shape[1], boxes[:, 1], boxes[:, 3], masks.shape[1])
        of_columns = _sampling(image.shape[2], boxes[:, 0], boxes[:, 2], masks.shape[2])
        pasted = (of_rows @ masks @ of_columns.transpose(1, 2))[:, None]
        if self.mask_threshold is None:
            return pasted
        mask: Tensor = pasted >= self.mask_threshold
        return mask


def _taps(count: int, sizes: _Sizes, axis: int, border: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_taps`` of ``omniops.detection.transform``, with ``count`` pixels, of which the last are padding."""
    old, new = sizes.original[axis], sizes.resized[axis]
    position = ((torch.arange(count, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = position.floor()
    second_weight = position - first
    if not border:
        second_weight = torch.where((first < 0) | (first >= old - 1), 0.0, second_weight)
    last = (old - 1).long()
    return (
        torch.minimum(first.long().clamp(min=0), last),
        torch.minimum((first.long() + 1).clamp(min=0), last),
        ((1 - second_weight) * _WEIGHT).round().int(),
        (second_weight * _WEIGHT).round().int(),
    )


def _divided(values: Tensor, by: int) -> Tensor:
    return torch.div(values, by, rounding_mode="floor")


def _clipped(boxes: Tensor, sizes: _Sizes) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), sizes.limits)


def _classwise_nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """As ``classwise_nms``, of no boxes too: the largest coordinate is 0 then."""
    largest = torch.cat((boxes.flatten(), boxes.new_zeros(1))).max()
    kept: Tensor = nms(boxes + (classes.to(boxes.dtype) * (largest + 1))[:, None], scores, iou_threshold)
    return kept


def _pooled(maps: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    """As ``RoIAlign``: boxes (N, 4) -> (N, C, S, S)."""
    scales = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    levels = (scales / 56 + 1e-6).log2().floor().clamp(0, 3)
    rois = torch.cat((torch.zeros_like(boxes[:, :1]), boxes), dim=1)
    pooled = boxes.new_zeros(boxes.shape[0], maps[0].shape[1], size, size)
    for level, (level_map, stride) in enumerate(zip(maps[:4], STRIDES, strict=False)):
        own = (levels == level).nonzero()[:, 0]
        samples = roi_align(level_map, rois[own], size, 1 / stride, sampling_ratio=0, aligned=True)
        pooled = pooled.index_put((own,), samples)
    return pooled


def _sampling(count: int, low: Tensor, high: Tensor, size: int) -> Tensor:
    """How much each of ``size`` pixels of a mask counts at each of ``count`` pixels of the image, (N, count, size)."""
    pixels = torch.arange(count)
    centres = (pixels + 0.5 - low[:, None]) / (high - low)[:, None] * 2 - 1
    # Of a box without pixels all are at the middle of the mask.
    centres = torch.where(centres.isfinite(), centres, 0.0)
    positions = ((centres + 1) * size - 1) / 2
    weights = (1 - (positions[..., None] - torch.arange(size)).abs()).clamp(min=0)
    # One pixel beyond the box: bilinear sampling fades out there.
    inside = (pixels >= low.trunc()[:, None] - 1) & (pixels < high.ceil()[:, None] + 1)
    return torch.where(inside[..., None], weights, 0.0)
