"""What the prompts of predictors must be: points and their labels, boxes, and masks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from omniops.sam2.arguments import check_array

POINT_LABELS = (-1, 0, 1, 2, 3)
"""Padding, background, foreground, and a box's top left and bottom right corners."""
_BOX_LABELS = (2, 3)


class PointInputs(NamedTuple):
    """Points of one object on a frame of a video. A box is two points, before all others."""

    point_coords: Tensor
    """(1, P, 2), float32, x and y."""
    point_labels: Tensor
    """(1, P), int32: 1 inside, 0 outside, 2 and 3 the corners of a box, -1 to ignore."""

    def concat(self, new: PointInputs) -> PointInputs:
        """These points and, after them, the new ones."""
        return PointInputs(*(torch.cat(tensors, dim=1) for tensors in zip(self, new, strict=True)))

    def scaled(self, size: tuple[int, int], image_size: int, device: torch.device) -> PointInputs:
        """Those of a frame of that height and width in pixels of the resized frame, on the device."""
        height, width = size
        coords = self.point_coords / self.point_coords.new_tensor([width, height]) * image_size
        return PointInputs(coords.to(device), self.point_labels.to(device))


class ImagePrompts(NamedTuple):
    """B prompts on an image, as ``SAM2Base.predict_masks`` takes them."""

    point_coords: Tensor | None
    """(B, P, 2), float32, x and y in pixels of the resized image, boxes first."""
    point_labels: Tensor | None
    """(B, P), int64: 1 inside, 0 outside, 2 and 3 the corners of a box, -1 to ignore."""
    mask_input: Tensor | None
    """(B, 1, S/4, S/4), float32, logits."""

    def to(self, device: torch.device) -> ImagePrompts:
        """The same on the device."""
        return ImagePrompts(*(None if tensor is None else tensor.to(device) for tensor in self))


def check_obj_id(obj_id: object) -> Hashable:
    """An object's id; TypeError for what cannot be one."""
    if not isinstance(obj_id, Hashable):
        raise TypeError(f"obj_id must be a number or a name, got {type(obj_id).__name__}")
    return obj_id


def check_video_prompts(
    points: ArrayLike | Tensor | None,
    labels: ArrayLike | Tensor | None,
    box: ArrayLike | Tensor | None,
    clear_old_points: bool,
) -> PointInputs:
    """The prompts of ``SAM2VideoPredictor.add_new_points_or_box``, the corners of the box first.

    Raises:
        TypeError: for what is no array of numbers.
        ValueError: for wrong shapes, labels or boxes, numbers that are not finite, or no prompt at all.
    """
    if (points is None) != (labels is None):
        raise ValueError("points and labels must be given together")
    if points is None:
        inputs = PointInputs(torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.int32))
    else:
        inputs = _check_points(points, labels)
    if box is not None:
        if not clear_old_points:
            raise ValueError("a box comes before all points: box needs clear_old_points=True")
        inputs = _check_corners(box, inputs).concat(inputs)
    if inputs.point_coords.shape[1] == 0:
        raise ValueError("there is no prompt: give points and labels, or a box")
    if not inputs.point_coords.isfinite().all():
        raise ValueError("points and box must be finite")
    return inputs


def _check_points(points: object, labels: object) -> PointInputs:
    coords, point_labels = check_array("points", points).float(), check_array("labels", labels)
    shape = tuple(coords.shape)
    if coords.numel() == 0:
        coords = coords.reshape(-1, 2)
    coords = coords if coords.dim() == 3 else coords[None]
    point_labels = point_labels if point_labels.dim() == 2 else point_labels[None]
    if coords.dim() != 3 or coords.shape[0] != 1 or coords.shape[2] != 2:
        raise ValueError(f"points must be (P, 2), got {shape}")
    if point_labels.shape != coords.shape[:2]:
        raise ValueError(f"labels must be ({coords.shape[1]},) as points say, got {tuple(point_labels.shape[1:])}")
    if not torch.isin(point_labels, point_labels.new_tensor(POINT_LABELS)).all():
        raise ValueError(f"labels must be 1 (object), 0 (not) or -1 (ignored), got {point_labels.flatten().tolist()}")
    return PointInputs(coords, point_labels.to(torch.int32))


def _check_corners(box: object, points: PointInputs) -> PointInputs:
    """The corners of a box, on the devices of the points that it comes before."""
    corners = check_array("box", box).float().to(points.point_coords.device)
    if corners.numel() != 4:
        raise ValueError(f"box must be x0, y0, x1, y1, got the shape {tuple(corners.shape)}")
    corners = corners.reshape(1, 2, 2)
    if (corners[:, 0] > corners[:, 1]).any():
        raise ValueError(f"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {corners.flatten().tolist()}")
    return PointInputs(corners, points.point_labels.new_tensor([_BOX_LABELS]))


def check_mask(mask: object) -> Tensor:
    """The mask of ``SAM2VideoPredictor.add_new_mask``, (1, 1, H, W), float32, 0 and 1.

    Raises:
        TypeError: for what is no array of numbers.
        ValueError: for another shape.
    """
    values = check_array("mask", mask)
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(f"mask must be (H, W) with H, W >= 1, got {tuple(values.shape)}")
    return (values > 0).float()[None, None]


def check_image_prompts(
    point_coords: ArrayLike | None,
    point_labels: ArrayLike | None,
    box: ArrayLike | None,
    mask_input: ArrayLike | None,
    *,
    size: tuple[int, int],
    image_size: int,
) -> ImagePrompts:
    """The prompts of ``SAM2ImagePredictor.predict``, the mask on its own device, all else on the CPU.

    Args:
        point_coords, point_labels, box, mask_input: as ``predict`` takes them.
        size: the height and width of the image in the unit of the coordinates.
        image_size: the side of the square that the image is resized to.

    Raises:
        ValueError: for wrong shapes, labels or boxes, numbers that are not finite, or other numbers of prompts.
    """
    if (point_coords is None) != (point_labels is None):
        raise ValueError("point_coords and point_labels must be given together")
    coords, labels = [], []
    if box is not None:
        corners = _check_boxes(box)
        coords.append(corners)
        labels.append(torch.tensor([_BOX_LABELS]).expand(len(corners), 2))
    if point_coords is not None:
        points, signs = _check_batched_points(point_coords, point_labels)
        coords.append(points)
        labels.append(signs)
    mask = None if mask_input is None else _check_mask_input(mask_input, image_size // 4)
    counts = {len(prompts) for prompts in (*coords, *([] if mask is None else [mask]))}
    if len(counts) > 1:
        raise ValueError(f"point_coords, box and mask_input must be of one number of prompts, got {sorted(counts)}")
    if 0 in counts:
        raise ValueError("point_coords, box and mask_input must hold a prompt or more, got none")
    if mask is not None and not mask.isfinite().all():
        raise ValueError("mask_input must be finite")
    if not coords:
        return ImagePrompts(None, None, mask)
    point_coords = torch.cat(coords, dim=1)
    if not point_coords.isfinite().all():
        raise ValueError("point_coords and box must be finite")
    height, width = size
    scale = image_size / torch.tensor([width, height], dtype=torch.float32)
    return ImagePrompts(point_coords * scale, torch.cat(labels, dim=1), mask)


def _check_boxes(box: ArrayLike) -> Tensor:
    """(B, 2, 2), the two corners of each."""
    boxes = torch.as_tensor(box, dtype=torch.float32).cpu()
    if boxes.dim() not in (1, 2) or boxes.shape[-1] != 4:
        raise ValueError(f"box must be (4) or (B, 4), got {tuple(boxes.shape)}")
    corners = boxes.reshape(-1, 2, 2)
    if not (corners[:, 0] <= corners[:, 1]).all():
        raise ValueError(f"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {corners.flatten(1).tolist()}")
    return corners


def _check_batched_points(point_coords: ArrayLike, point_labels: ArrayLike | None) -> tuple[Tensor, Tensor]:
    """(B, P, 2) and (B, P)."""
    coords = torch.as_tensor(point_coords, dtype=torch.float32).cpu()
    labels = torch.as_tensor(point_labels, dtype=torch.int64).cpu()
    if coords.dim() not in (2, 3) or coords.shape[-1] != 2:
        raise ValueError(f"point_coords must be (P, 2) or (B, P, 2), got {tuple(coords.shape)}")
    if labels.shape != coords.shape[:-1]:
        raise ValueError(
            f"point_labels must be {tuple(coords.shape[:-1])} as point_coords say, got {tuple(labels.shape)}"
        )
    if not torch.isin(labels, torch.tensor(POINT_LABELS)).all():
        raise ValueError(f"point_labels must be 1 (object) or 0 (not), got {labels.unique().tolist()}")
    return (coords, labels) if coords.dim() == 3 else (coords[None], labels[None])


def _check_mask_input(mask_input: ArrayLike, side: int) -> Tensor:
    """(B, 1, side, side)"""
    mask = torch.as_tensor(mask_input, dtype=torch.float32)
    mask = mask[None] if mask.dim() == 3 else mask
    if mask.dim() != 4 or mask.shape[1:] != (1, side, side):
        raise ValueError(f"mask_input must be (1, {side}, {side}) or (B, 1, {side}, {side}), got {tuple(mask.shape)}")
    return mask
