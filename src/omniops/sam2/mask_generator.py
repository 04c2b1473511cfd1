"""Masks of everything on a picture, with the names, arguments and results of the official automatic mask generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from omniops import device as devices
from omniops.sam2 import rle
from omniops.sam2.arguments import check_int
from omniops.sam2.checkpoints import Pretrained
from omniops.sam2.image_predictor import SAM2ImagePredictor
from omniops.sam2.modeling.mask_decoder import Masks
from omniops.sam2.modeling.sam2 import LARGEST_LOGIT, SAM2Base
from omniops.sam2.prompts import ImagePrompts
from omniops.sam2.transforms import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1"""

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
_EDGE_TOLERANCE = 20
"""How near to the edge of its crop, in pixels, a mask counts as cut off by it."""
MAX_CHUNK_BYTES = 2**25
"""Of logits at the size of the picture. More than C libraries keep ready for reuse is slower on the CPU."""


class _Mask(NamedTuple):
    """A mask that may be among the results."""

    counts: rle.Counts
    box: Box
    crop_box: Box
    iou_pred: float
    stability_score: float
    point: list[float]
    """x, y in the picture."""


class SAM2AutomaticMaskGenerator(Pretrained):
    """Prompts a model with a grid of points, and keeps of their masks those that are good and not found twice.

    Args:
        model: of ``omniops.sam2.load`` or ``build_sam2``.
        points_per_side: how many points a side of the grid has; None with ``point_grids``.
        points_per_batch: how many points the model takes as one batch. More may be faster and need more memory.
        pred_iou_thresh: a mask must have more than this IoU, as the model expects it; 0 for no such condition.
        stability_score_thresh: a mask must have at least this stability: the IoU of what is above and of what is below
            ``mask_threshold`` by ``stability_score_offset``; 0 for no such condition.
        stability_score_offset: the difference of logits that ``stability_score_thresh`` means.
        mask_threshold: the logit above which a pixel belongs to a mask.
        box_nms_thresh: of two masks whose boxes have more than this IoU, the one with the better score stays.
        crop_n_layers: how many layers of crops are prompted too, 4 crops, 16, ..., with a grid in every crop.
        crop_nms_thresh: ``box_nms_thresh`` for masks of different crops, where that of the smaller crop stays.
        crop_overlap_ratio: how much of the shorter side of the picture two of the 4 crops share; half of it of the 16,
            and so on. From 0 to below 1.
        crop_n_points_downscale_factor: a side of a crop's grid has so many times fewer points than one of the layer
            before.
        point_grids: the points of each layer, (P, 2), x and y as fractions of the crop from 0 to 1; the first is that
            of the whole picture. In place of ``points_per_side``.
        min_mask_region_area: holes and specks up to that many pixels of the low-resolution mask (a quarter of the
            resized picture) are mended, as ``max_hole_area`` and ``max_sprinkle_area`` of ``SAM2ImagePredictor``.
        output_mode: what ``segmentation`` is: ``binary_mask``, ``uncompressed_rle`` or ``coco_rle``.
        use_m2m: every mask is refined by the model, as a prompt, before any is left out.
        multimask_output: three masks of each point, else one.
        upsampling: how masks come to the size of the picture, as of ``SAM2ImagePredictor``: ``bilinear`` as in the
            official generator, or ``guided`` by the picture's colours, those of the crop where it is one. What counts
            of a mask after that, as its stability, is of the upsampled one.

    Raises:
        TypeError: for a wrong type.
        ValueError: for another number, unless exactly one of ``points_per_side`` and ``point_grids`` is given, or for
            grids that are not points in the crop or too few.

    Example:
        >>> model = omniops.sam2.load("tiny", random_weights=True, image_size=64)
        >>> every_mask = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}  # random weights find nothing good
        >>> generator = SAM2AutomaticMaskGenerator(model, points_per_side=2, **every_mask)
        >>> found = generator.generate(np.zeros((48, 64, 3), np.uint8))
        >>> found[0]["segmentation"].shape
        (48, 64)
    """

    def __init__(
        self,
        model: SAM2Base,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.8,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        mask_threshold: float = 0.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[ArrayLike] | None = None,
        min_mask_region_area: float = 0,
        output_mode: str = "binary_mask",
        use_m2m: bool = False,
        multimask_output: bool = True,
        *,
        upsampling: str = "bilinear",
    ) -> None:
        if (points_per_side is None) == (point_grids is None):
            given_arguments = "both" if point_grids is not None else "neither"
            raise ValueError(
                f"exactly one of points_per_side and point_grids must be given, got {given_arguments}: "
                "with point_grids pass points_per_side=None"
            )
        if output_mode not in _OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(_OUTPUT_MODES)}, got {output_mode!r}")
        points_per_batch = _check_at_least_1("points_per_batch", points_per_batch)
        crop_n_layers = check_int("crop_n_layers", crop_n_layers)
        for name, value in (("crop_n_layers", crop_n_layers), ("min_mask_region_area", min_mask_region_area)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio must be from 0 to below 1, got {crop_overlap_ratio}")
        if point_grids is not None:
            self.point_grids = _check_point_grids(point_grids, crop_n_layers + 1)
        else:
            per_side = _check_at_least_1("points_per_side", points_per_side)
            self.point_grids = _build_point_grids(per_side, crop_n_layers, crop_n_points_downscale_factor)
        self.predictor = SAM2ImagePredictor(
            model, max_hole_area=min_mask_region_area, max_sprinkle_area=min_mask_region_area, upsampling=upsampling
        )
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.mask_threshold = mask_threshold
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.use_m2m = use_m2m
        self.multimask_output = multimask_output

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.predictor.device

    @property
    def upsampling(self) -> str:
        """How masks come to the size of the picture."""
        return self.predictor.upsampling

    def generate(
        self, image: NDArray[Any] | Image, *, progress: Callable[[int, int], object] | None = None
    ) -> list[dict[str, Any]]:
        """The masks of a picture.

        Args:
            image: as ``SAM2ImagePredictor.set_image`` takes it, H x W pixels.
            progress: called after each batch with the number of points that are done, and of all.

        Returns:
            For each mask, in descending order of ``predicted_iou``, but those of smaller crops first:

            - ``segmentation``: (H, W) in bool; or ``{"size": [H, W], "counts": ...}``, a list of runs or COCO's string
            - ``area``: its pixels
            - ``bbox``: x, y, width and height, the two from the first pixel to the last, which makes 0 of one pixel
            - ``predicted_iou``, ``stability_score``: as above
            - ``point_coords``: [[x, y]], the point in the picture that it is the mask of
            - ``crop_box``: x, y, width and height of the crop

            An empty list where no mask is good enough.

        Raises:
            TypeError, ValueError: as ``SAM2ImagePredictor.set_image``.
        """
        steps = self.steps(image)
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                records: list[dict[str, Any]] = end.value
                return records
            if progress is not None:
                progress(done, total)

    def steps(self, image: NDArray[Any] | Image) -> Generator[tuple[int, int], None, list[dict[str, Any]]]:
        """``generate``, batch by batch, for who has other work for the model in between.

        Yields:
            after each batch the number of points that are done, and of all.

        Returns:
            the masks, as the value of its StopIteration.
        """
        picture = to_rgb(image)
        height, width = picture.shape[:2]
        crops = list(_generate_crop_boxes(height, width, self.crop_n_layers, self.crop_overlap_ratio))
        done, total = 0, sum(len(self.point_grids[layer]) for _, layer in crops)
        masks: list[_Mask] = []
        for crop_box, layer in crops:
            x0, y0, x1, y1 = crop_box
            self.predictor.set_image(picture[y0:y1, x0:x1])
            points = torch.from_numpy(self.point_grids[layer] * (x1 - x0, y1 - y0)).float()
            crop_masks: list[_Mask] = []
            for batch in points.split(self.points_per_batch):
                crop_masks += self._process_batch(batch, crop_box, (height, width))
                done += len(batch)
                yield done, total
            iou_preds = torch.tensor([mask.iou_pred for mask in crop_masks])
            masks += _suppress(crop_masks, iou_preds, self.box_nms_thresh)
        self.predictor.reset_predictor()
        if len(crops) > 1:
            # Those of smaller crops are preferred.
            areas = torch.tensor([_box_area(mask.crop_box) for mask in masks])
            masks = _suppress(masks, 1 / areas, self.crop_nms_thresh)
        return [self._to_record(mask, height, width) for mask in masks]

    @devices.exclusively
    def _process_batch(self, points: Tensor, crop_box: Box, orig_size: tuple[int, int]) -> list[_Mask]:
        """The masks of (B, 2) points, in pixels of the crop, that are good enough."""
        x0, y0, x1, y1 = crop_box
        predicted = self._predict(points, crop_box, None, self.multimask_output)
        points = points.repeat_interleave(predicted.ious.shape[1], 0)
        logits, iou_preds = predicted.low_res_masks.flatten(0, 1), predicted.ious.flatten()
        if self.use_m2m:
            logits, iou_preds = self._refine_with_m2m(points, logits, crop_box)
        if self.pred_iou_thresh > 0:  # before masks are resized, because most fail
            keep = iou_preds > self.pred_iou_thresh
            logits, iou_preds, points = logits[keep], iou_preds[keep], points[keep.cpu()]
        if not len(logits):  # which MPS may fail to resize (pytorch issue 187399)
            return []

        masks = []
        chunk = max(1, MAX_CHUNK_BYTES // (4 * (x1 - x0) * (y1 - y0)))
        chunks = zip(logits.split(chunk), iou_preds.split(chunk), points.split(chunk), strict=True)
        for chunk_logits, chunk_ious, chunk_points in chunks:
            upsampled = self.predictor.postprocess_masks(chunk_logits[:, None])[:, 0]
            binary, stability_scores, keep = self._filter_stable(upsampled)
            of_masks = zip(
                rle.count_runs(binary, (x0, y0), orig_size),
                chunk_ious[keep].tolist(),
                stability_scores.tolist(),
                (chunk_points + chunk_points.new_tensor([x0, y0]))[keep.cpu()].tolist(),
                strict=True,
            )
            for counts, *values in of_masks:
                box = rle.box(counts, orig_size[0]) or (x0, y0, x0, y0)
                if not _is_box_near_crop_edge(box, crop_box, orig_size):
                    masks.append(_Mask(counts, box, crop_box, *values))
        return masks

    def _refine_with_m2m(self, points: Tensor, logits: Tensor, crop_box: Box) -> tuple[Tensor, Tensor]:
        """The masks once more predicted, from themselves: logits (K, 256, 256), and the IoUs that the model expects."""
        mask_inputs = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)[:, None]
        batches = zip(points.split(self.points_per_batch), mask_inputs.split(self.points_per_batch), strict=True)
        refined = [self._predict(batch, crop_box, masks, False) for batch, masks in batches]
        low_res_masks = torch.cat([predicted.low_res_masks for predicted in refined])
        return low_res_masks.flatten(0, 1), torch.cat([predicted.ious for predicted in refined]).flatten()

    def _predict(self, points: Tensor, crop_box: Box, mask_input: Tensor | None, multimask_output: bool) -> Masks:
        x0, y0, x1, y1 = crop_box
        image_size = self.predictor.model.image_size
        coords = points / points.new_tensor([x1 - x0, y1 - y0]) * image_size
        labels = torch.ones((len(points), 1), dtype=torch.int64)
        prompts = ImagePrompts(coords[:, None], labels, mask_input).to(self.predictor.device)
        return self.predictor.predict_low_res_masks(prompts, multimask_output=multimask_output)

    def _filter_stable(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (K, H, W) the masks that are stable enough and their stability; and which of the K they are."""
        # The smaller mask lies within the larger, so that their IoU is the ratio of their areas.
        intersections, unions = (
            (logits > self.mask_threshold + offset).sum(-1, dtype=torch.int32).sum(-1)
            for offset in (self.stability_score_offset, -self.stability_score_offset)
        )
        stability_scores = intersections / unions
        masks = logits > self.mask_threshold
        if self.stability_score_thresh > 0:
            keep = stability_scores >= self.stability_score_thresh
            return masks[keep], stability_scores[keep], keep
        return masks, stability_scores, torch.ones_like(stability_scores, dtype=torch.bool)

    def _to_record(self, mask: _Mask, height: int, width: int) -> dict[str, Any]:
        segmentation: Any = {"size": [height, width], "counts": mask.counts.tolist()}
        if self.output_mode == "binary_mask":
            segmentation = rle.decode(segmentation)
        elif self.output_mode == "coco_rle":
            segmentation["counts"] = rle.compress_counts(mask.counts)
        return {
            "segmentation": segmentation,
            "area": rle.area(mask.counts),
            "bbox": _box_xyxy_to_xywh(mask.box),
            "predicted_iou": mask.iou_pred,
            "point_coords": [mask.point],
            "stability_score": mask.stability_score,
            "crop_box": _box_xyxy_to_xywh(mask.crop_box),
        }


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: the indices of the boxes that no better one overlaps, best first.

    As ``torchvision.ops.nms``, and as its ``batched_nms`` of one category; of equal scores the first counts as better.

    Args:
        boxes: (N, 4), x0, y0, x1, y1, floating.
        scores: (N).
        iou_threshold: above this IoU boxes overlap.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        # In double, as in torchvision: float rounds to another side of the threshold. Boxes without area give NaN.
        ious = (shared / (areas[best] + areas[rest] - shared)).double()
        order = rest[~(ious > iou_threshold)]
    return torch.stack(kept) if kept else order


def _suppress(masks: list[_Mask], scores: Tensor, iou_threshold: float) -> list[_Mask]:
    """The masks that non-maximum suppression of their boxes keeps, best first."""
    boxes = torch.tensor([mask.box for mask in masks], dtype=torch.float32).reshape(-1, 4)
    return [masks[i] for i in nms(boxes, scores, iou_threshold).tolist()]


def _generate_crop_boxes(height: int, width: int, layers: int, overlap_ratio: float) -> Iterator[tuple[Box, int]]:
    """The whole picture, then 4 crops, 16, ..., with the layer of each crop."""
    yield (0, 0, width, height), 0
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / count))
        crop_w, crop_h = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for column, row in product(range(count), repeat=2):
            x, y = column * (crop_w - overlap), row * (crop_h - overlap)
            if x < width and y < height:  # a picture of a few pixels has fewer crops
                yield (x, y, min(x + crop_w, width), min(y + crop_h, height)), layer


def _check_at_least_1(name: str, value: Any) -> int:
    count = check_int(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def _build_point_grids(per_side: int, layers: int, factor: float) -> list[NDArray[np.float64]]:
    if not factor >= 1:
        raise ValueError(f"crop_n_points_downscale_factor must be at least 1, got {factor}")
    sides = [int(per_side / factor**layer) for layer in range(layers + 1)]
    if sides[-1] < 1:
        raise ValueError(
            f"crop_n_points_downscale_factor leaves the crops without points, got {factor}: "
            f"points_per_side is {per_side}, and crop_n_layers {layers}"
        )
    lines = [np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side) for side in sides]
    return [np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) for line in lines]


def _check_point_grids(grids: Sequence[ArrayLike], layers: int) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(grid, dtype=np.float64) for grid in grids]
    if len(arrays) < layers:
        raise ValueError(f"point_grids must have {layers} grids, for the picture and each layer, got {len(arrays)}")
    for i, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[1] != 2 or not len(array):
            raise ValueError(f"point_grids[{i}] must be (P, 2) with a point or more, got {array.shape}")
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(
                f"point_grids[{i}] must be fractions from 0 to 1, got {array.min():g} to {array.max():g}: "
                "divide pixels by the width and the height"
            )
    return arrays


def _is_box_near_crop_edge(box: Box, crop_box: Box, orig_size: tuple[int, int]) -> bool:
    """Whether a box ends near an edge of its crop that is not near the picture's."""
    height, width = orig_size
    edges = zip(box, crop_box, (0, 0, width, height), strict=True)
    return any(abs(x - of_crop) <= _EDGE_TOLERANCE < abs(x - of_picture) for x, of_crop, of_picture in edges)


def _box_area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _box_xyxy_to_xywh(box: Box) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]
