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
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops.sam2 import rle
from omniops.sam2.arguments import an_int
from omniops.sam2.checkpoints import Pretrained
from omniops.sam2.image_predictor import SAM2ImagePredictor
from omniops.sam2.network import LARGEST_LOGIT, Masks
from omniops.sam2.pictures import as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1"""

_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
_EDGE = 20
"""How near to the edge of its crop, in pixels, a mask counts as cut off by it."""
_CHUNK = 2**25
"""Bytes of logits at the size of the picture. More than C libraries keep ready for reuse is slower on the CPU."""


class _Found(NamedTuple):
    runs: rle.Runs
    box: Box
    crop: Box
    score: float
    stability: float
    point: list[float]


class SAM2AutomaticMaskGenerator(Pretrained):
    """Prompts a model with a grid of points, and keeps of their masks those that are good and not found twice.

    Args:
        model: of ``omniops.sam2.load`` or ``build_sam2``.
        points_per_side: the points along a side of the grid, of which there are the square; None with ``point_grids``.
        points_per_batch: the points that the model is given at once. More may be faster and need more memory.
        pred_iou_thresh: a mask must have more than this IoU, as the model expects it; 0 for no such condition.
        stability_score_thresh: a mask must have at least this stability: the IoU of what is above and of what is below
            ``mask_threshold`` by ``stability_score_offset``; 0 for no such condition.
        stability_score_offset: see there.
        mask_threshold: the logit above which a pixel belongs to a mask.
        box_nms_thresh: of two masks whose boxes have more than this IoU, the one with the better score stays.
        crop_n_layers: how many times the picture is cut up too, into 4 crops, 16, ..., each prompted with a grid.
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
        use_m2m: every mask is once more given to the model, to be refined, before any is left out.
        multimask_output: three masks of each point, else one.

    Raises:
        TypeError: for a wrong type.
        ValueError: for another number, unless exactly one of ``points_per_side`` and ``point_grids`` is given, or for
            grids that are not points in the crop or too few.
    """

    def __init__(
        self,
        model: Sam2VideoModel,
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
    ) -> None:
        if (points_per_side is None) == (point_grids is None):
            given = "both" if point_grids is not None else "neither"
            raise ValueError(
                f"exactly one of points_per_side and point_grids must be given, got {given}: "
                "with point_grids pass points_per_side=None"
            )
        if output_mode not in _MODES:
            raise ValueError(f"output_mode must be one of {', '.join(_MODES)}, got {output_mode!r}")
        points_per_batch = _a_count("points_per_batch", points_per_batch)
        crop_n_layers = an_int("crop_n_layers", crop_n_layers)
        for name, value in (("crop_n_layers", crop_n_layers), ("min_mask_region_area", min_mask_region_area)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio must be from 0 to below 1, got {crop_overlap_ratio}")
        if point_grids is not None:
            self.point_grids = _checked(point_grids, crop_n_layers + 1)
        else:
            per_side = _a_count("points_per_side", points_per_side)
            self.point_grids = _grids(per_side, crop_n_layers, crop_n_points_downscale_factor)
        self.predictor = SAM2ImagePredictor(
            model, max_hole_area=min_mask_region_area, max_sprinkle_area=min_mask_region_area
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

    def generate(
        self, image: NDArray[Any] | Image, *, progress: Callable[[int, int], object] | None = None
    ) -> list[dict[str, Any]]:
        """The masks of a picture.

        Args:
            image: as ``SAM2ImagePredictor.set_image`` takes it, H x W pixels.
            progress: called after each batch with the number of points that are done, and of all.

        Returns:
            For each mask, those that are surest first, of one crop after the other where there are no others:

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
        picture = as_rgb(image)
        height, width = picture.shape[:2]
        crops = list(_crops(height, width, self.crop_n_layers, self.crop_overlap_ratio))
        done, total = 0, sum(len(self.point_grids[layer]) for _, layer in crops)
        found: list[_Found] = []
        for crop, layer in crops:
            x0, y0, x1, y1 = crop
            self.predictor.set_image(picture[y0:y1, x0:x1])
            points = torch.from_numpy(self.point_grids[layer] * (x1 - x0, y1 - y0)).float()
            here: list[_Found] = []
            for batch in points.split(self.points_per_batch):
                here += self._of(batch, crop, (height, width))
                done += len(batch)
                yield done, total
            found += _best(here, torch.tensor([each.score for each in here]), self.box_nms_thresh)
        self.predictor.reset_predictor()
        if len(crops) > 1:
            found = _best(found, 1 / torch.tensor([_area(each.crop) for each in found]), self.crop_nms_thresh)
        return [self._record(each, height, width) for each in found]

    @devices.exclusively
    def _of(self, points: Tensor, crop: Box, size: tuple[int, int]) -> list[_Found]:
        """The masks of (B, 2) points in the crop that are good enough."""
        x0, y0, x1, y1 = crop
        low = self._predict(points, crop, None, self.multimask_output)
        points = points.repeat_interleave(low.scores.shape[1], 0)
        logits, scores = low.logits.flatten(0, 1), low.scores.flatten()
        if self.use_m2m:
            prompts = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)[:, None].split(self.points_per_batch)
            each = zip(points.split(self.points_per_batch), prompts, strict=True)
            refined = [self._predict(where, crop, prompt, False) for where, prompt in each]
            logits = torch.cat([masks.logits for masks in refined]).flatten(0, 1)
            scores = torch.cat([masks.scores for masks in refined]).flatten()
        if self.pred_iou_thresh > 0:  # before masks are made of the size of the picture: most fail
            good = scores > self.pred_iou_thresh
            logits, scores, points = logits[good], scores[good], points[good.cpu()]
        if not len(logits):  # which MPS may fail to resize (pytorch issue 187399)
            return []

        found = []
        chunk = max(1, _CHUNK // (4 * (x1 - x0) * (y1 - y0)))
        for some, score, point in zip(logits.split(chunk), scores.split(chunk), points.split(chunk), strict=True):
            masks, stability, kept = self._stable(self.predictor._upsampled(0, some[:, None])[:, 0])
            runs = rle.runs(masks, (x0, y0), size)
            rest = (score[kept].tolist(), stability.tolist(), (point + point.new_tensor([x0, y0]))[kept.cpu()].tolist())
            for counts, *values in zip(runs, *rest, strict=True):
                box = rle.box(counts, size[0]) or (x0, y0, x0, y0)
                if not _is_cut_off(box, crop, size):
                    found.append(_Found(counts, box, crop, *values))
        return found

    def _predict(self, points: Tensor, crop: Box, masks: Tensor | None, multimask: bool) -> Masks:
        x0, y0, x1, y1 = crop
        side: Any = self.predictor.model.image_size  # transformers says that it might be a list
        places = points / points.new_tensor([x1 - x0, y1 - y0]) * side
        labels = torch.ones((len(points), 1), dtype=torch.int64)
        device = self.predictor.device
        return self.predictor._predict(0, (places[:, None].to(device), labels.to(device), masks), multimask)

    def _stable(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (K, H, W) the masks that are stable enough and their stability; and which of the K they are."""
        high, low = (
            (logits > self.mask_threshold + offset).sum(-1, dtype=torch.int32).sum(-1)
            for offset in (self.stability_score_offset, -self.stability_score_offset)
        )
        stability = high / low
        masks = logits > self.mask_threshold
        if self.stability_score_thresh > 0:
            kept = stability >= self.stability_score_thresh
            return masks[kept], stability[kept], kept
        return masks, stability, torch.ones_like(stability, dtype=torch.bool)

    def _record(self, found: _Found, height: int, width: int) -> dict[str, Any]:
        segmentation: Any = {"size": [height, width], "counts": found.runs.tolist()}
        if self.output_mode == "binary_mask":
            segmentation = rle.decode(segmentation)
        elif self.output_mode == "coco_rle":
            segmentation["counts"] = rle.compressed(found.runs)
        return {
            "segmentation": segmentation,
            "area": rle.area(found.runs),
            "bbox": _as_xywh(found.box),
            "predicted_iou": found.score,
            "point_coords": [found.point],
            "stability_score": found.stability,
            "crop_box": _as_xywh(found.crop),
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
        # In double, as there: next to the threshold it is another number in float. Boxes without area make NaN.
        overlap = (shared / (areas[best] + areas[rest] - shared)).double()
        order = rest[~(overlap > iou_threshold)]
    return torch.stack(kept) if kept else order


def _best(found: list[_Found], scores: Tensor, iou_threshold: float) -> list[_Found]:
    boxes = torch.tensor([each.box for each in found], dtype=torch.float32).reshape(-1, 4)
    kept = nms(boxes, scores, iou_threshold)
    return [found[i] for i in kept.tolist()]


def _crops(height: int, width: int, layers: int, overlap_ratio: float) -> Iterator[tuple[Box, int]]:
    """The whole picture, then 4 crops, 16, ..., with the layer that each is of."""
    yield (0, 0, width, height), 0
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / count))
        w, h = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for column, row in product(range(count), repeat=2):
            x, y = column * (w - overlap), row * (h - overlap)
            if x < width and y < height:  # a picture of a few pixels has not that many crops
                yield (x, y, min(x + w, width), min(y + h, height)), layer


def _a_count(name: str, value: Any) -> int:
    count = an_int(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def _grids(per_side: int, layers: int, factor: float) -> list[NDArray[np.float64]]:
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


def _checked(grids: Sequence[ArrayLike], layers: int) -> list[NDArray[np.float64]]:
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


def _is_cut_off(box: Box, crop: Box, size: tuple[int, int]) -> bool:
    """Whether a box ends at an edge of its crop that is not the picture's."""
    edges = zip(box, crop, (0, 0, size[1], size[0]), strict=True)
    return any(abs(end - of_crop) <= _EDGE < abs(end - of_picture) for end, of_crop, of_picture in edges)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _as_xywh(box: Box) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]
