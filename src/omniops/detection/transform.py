"""What goes into the detectors and what comes out, where MMDetection differs from torchvision.

Images are resized in OpenCV's 8-bit arithmetic before they are normalised, sizes are rounded to the nearest, and
masks are pasted by sampling at the pixels' centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from omniops.detection.inputs import Target, require_images, require_targets, require_values


class ResizedSize(tuple[int, int]):
    """(H, W) of an image after resizing, which remembers its ``original`` (H, W)."""

    original: tuple[int, int]

    def __new__(cls, size: tuple[int, int], original: tuple[int, int]) -> ResizedSize:
        """Of two sizes."""
        self = super().__new__(cls, size)
        self.original = original
        return self

    @property
    def scale(self) -> tuple[float, float, float, float]:
        """What a box (x1, y1, x2, y2) was multiplied with."""
        down, across = (new / old for new, old in zip(self, self.original, strict=True))
        return across, down, across, down


class Transform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Resizes, normalises and pads images and their targets; takes detections back to the images as they came.

    Args:
        min_size: what the shorter side is resized to; several: in training one of them at random, else the last.
        max_size: what the longer side is at most resized to.
        image_mean: the mean of each channel, of values in [0, 1].
        image_std: the standard deviation of each.
        size_divisible: batches are padded at the right and the bottom to a multiple of this.
        mask_threshold: None for masks of probabilities, a threshold for boolean ones.
    """

    def __init__(
        self,
        min_size: int | Sequence[int],
        max_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        size_divisible: int,
        mask_threshold: float | None,
    ) -> None:
        super().__init__(min_size, max_size, image_mean, image_std, size_divisible)
        self.mask_threshold = mask_threshold

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        """Images (3, H, W) in [0, 1] of any sizes, and their targets -> a batch, and targets in its pixels.

        Raises:
            TypeError, ValueError: for images and targets that the detector cannot use, as ``omniops.detection.inputs``
                has it.
        """
        require_images(images)
        if targets is not None:
            require_targets(images, targets, ("boxes",))
        originals = [_size(image) for image in images]
        optional_targets: Sequence[Target | None] = [None] * len(images) if targets is None else targets
        pairs = [self.resize(image, target) for image, target in zip(images, optional_targets, strict=True)]
        resized_targets = None if targets is None else [target for _, target in pairs]
        require_values(images, targets, resized_targets)
        images, targets = [image for image, _ in pairs], resized_targets
        sizes = [ResizedSize(_size(image), original) for image, original in zip(images, originals, strict=True)]
        batch = self.batch_images([self.normalize(image) for image in images], self.size_divisible)
        return ImageList(batch, sizes), targets

    def normalize(self, image: Tensor) -> Tensor:
        """Of values in [0, 255], where OpenMMLab's weights were trained: the last bits differ in [0, 1]."""
        mean, std = (
            torch.tensor([255 * value for value in values], dtype=image.dtype, device=image.device)[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        return (image - mean) / std

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target]:
        """(3, H, W) in [0, 1] and its target -> the image resized, in [0, 255], and the target in its pixels."""
        height, width = _size(image)
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        size = _fitting_size((height, width), shorter, self.max_size)
        target = {} if target is None else dict(target)
        if "boxes" in target:
            target["boxes"] = resize_boxes(target["boxes"].float(), (height, width), size)
        if "masks" in target:
            masks = target["masks"]
            # Interpolation takes no empty batch on every device.
            target["masks"] = (
                F.interpolate(masks[:, None].float(), size)[:, 0].byte() if len(masks) else masks.new_zeros((0, *size))
            )
        return resize_bilinear(image * 255, size), target

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of an image (H, W) in evaluation what it has as a batch of its own, resized and padded.

        In a batch of images that agree in it each has the padding that it has alone, and so the same detections.

        Example:
            >>> Transform(64, 96, (0.5,) * 3, (0.5,) * 3, size_divisible=32, mask_threshold=None).padded_size((48, 64))
            (64, 96)
        """
        resized = _fitting_size(size, self.min_size[-1], self.max_size)
        height, width = (math.ceil(side / self.size_divisible) * self.size_divisible for side in resized)
        return height, width

    def postprocess(
        self, result: list[Target], image_shapes: list[ResizedSize], original_image_sizes: list[tuple[int, int]]
    ) -> list[Target]:
        """Detections with masks: from the batch's pixels to the images' own, masks (N, 1, S, S) pasted to (N, 1, H, W).

        Those without masks are there already: see ``RoIHeads.postprocess_detections``.
        """
        for detections, size in zip(result, image_shapes, strict=False):  # none in training
            if "masks" in detections:
                # Divided, as in MMDetection: the last bit decides which pixels an empty box on the border touches.
                detections["boxes"] = detections["boxes"] / detections["boxes"].new_tensor(size.scale)
                detections["masks"] = paste_masks(
                    detections["masks"], detections["boxes"], size.original, self.mask_threshold
                )
        return result


def _fitting_size(size: tuple[int, int], shorter: int, longest: int) -> tuple[int, int]:
    """(H, W) made as large as the two sides may be."""
    height, width = size
    scale = min(longest / max(height, width), shorter / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def resize_bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) of values in [0, 255], rounded to integers -> (C, *size): the values that OpenCV gives for uint8.

    OpenCV's ``INTER_LINEAR`` weighs with 11-bit fixed-point weights, shifts between the two directions and rounds:
    one value in ten differs from interpolation in floating point, enough to move a box by more than 0.01 pixels. An
    image that needs a gradient is interpolated in floating point, because this has none.
    """
    if image.requires_grad:
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    left, right, of_left, of_right = _taps(image.shape[2], size[1], image.device, border=False)
    above, below, of_above, of_below = (
        tensor[:, None] if tensor.dtype == torch.int32 else tensor
        for tensor in _taps(image.shape[1], size[0], image.device, border=True)
    )
    values = image.float().round().clamp(0, 255).int()
    rows = (values[:, :, left] * of_left + values[:, :, right] * of_right) >> 4
    sums = ((rows[:, above] * of_above) >> 16) + ((rows[:, below] * of_below) >> 16)
    return ((sums + 2) >> 2).to(image.dtype)


def _taps(old: int, new: int, device: torch.device, border: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two pixels between which each new one lies, and their weights in 2048ths.

    Beyond the border both are the pixel there; OpenCV still weighs rows as if they were two, columns as one.
    """
    position = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = position.floor()
    second_weight = position - first
    if not border:
        second_weight[(first < 0) | (first >= old - 1)] = 0
    return (
        first.long().clamp(0, old - 1).to(device),
        (first.long() + 1).clamp(0, old - 1).to(device),
        ((1 - second_weight) * 2048).round().int().to(device),
        (second_weight * 2048).round().int().to(device),
    )


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None) -> Tensor:
    """Masks (N, 1, S, S), each of its box of (N, 4) -> (N, 1, *size), zero off the boxes.

    With a threshold they are boolean: at least so much.
    """
    height, width = size
    pasted = torch.zeros(
        len(masks), 1, *size, dtype=torch.float32 if threshold is None else torch.bool, device=masks.device
    )
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        # One pixel beyond the box: bilinear sampling fades out there.
        left, right = max(0, int(x1) - 1), min(width, math.ceil(x2) + 1)
        top, bottom = max(0, int(y1) - 1), min(height, math.ceil(y2) + 1)
        x = _relative(left, right, boxes[number, 0], boxes[number, 2])
        y = _relative(top, bottom, boxes[number, 1], boxes[number, 3])
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        mask = F.grid_sample(masks[number, None].float(), grid[None], align_corners=False)[0, 0]
        pasted[number, 0, top:bottom, left:right] = mask if threshold is None else mask >= threshold
    return pasted


def _relative(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """The centres of the pixels from ``start`` to ``stop``: -1 at ``low``, 1 at ``high``; in an empty box all 0."""
    centres = torch.arange(start, stop, dtype=torch.float32, device=low.device) + 0.5
    return ((centres - low) / (high - low) * 2 - 1).nan_to_num(0, 0, 0)
