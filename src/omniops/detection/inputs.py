"""Images and targets that a detector cannot use, refused by name before it computes.

Values are looked at on the device, and of the whole batch at once, so that it is waited for a single time; not while
PyTorch traces, when there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Target = dict[str, Tensor]

_NAMES = ("boxes", "labels", "masks")
_BEYOND = 0.25
"""How far values may lie beyond [0, 1], as after sharp interpolation or with noise; they count as 0 or 1."""


def require_images(images: Sequence[Tensor] | Tensor) -> None:
    """Raise for images that are not (3, H, W) of floating point.

    Raises:
        TypeError: for something else than a list, or a batch, of tensors of floating point.
        ValueError: for other shapes, or no image.
    """
    if not isinstance(images, (list, tuple, Tensor)):
        raise TypeError(f"images must be a list of tensors (3, H, W) in [0, 1], got {type(images).__name__}")
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must be a list of tensors (3, H, W), got a tensor {tuple(images.shape)}")
    if len(images) == 0:
        raise ValueError("images must hold at least one image")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{number}] must be a tensor (3, H, W) in [0, 1], got {type(image).__name__}")
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"images[{number}] must be (3, H, W) and not empty, got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"images[{number}] must be floating point in [0, 1], got {image.dtype}")


def require_targets(images: Sequence[Tensor], targets: Sequence[Target] | None, names: Sequence[str]) -> None:
    """Raise for targets that are not one for each image, with tensors of those names that are of one length.

    Raises:
        TypeError: for something else than a list of dicts of tensors, and for boxes that are not of real numbers.
        ValueError: for another number, missing names, or other shapes.
    """
    if targets is None:
        raise ValueError("targets must be given in training: for each image a dict of " + ", ".join(names))
    if not isinstance(targets, (list, tuple)):
        raise TypeError(f"targets must be a list of dicts, one for each image, got {type(targets).__name__}")
    if len(targets) != len(images):
        raise ValueError(f"targets must be one for each of {len(images)} images, got {len(targets)}")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not isinstance(target, dict):
            raise TypeError(f"targets[{number}] must be a dict, got {type(target).__name__}")
        for name in names:
            if name not in target:
                raise ValueError(f"targets[{number}] must have {', '.join(names)}, got {', '.join(map(str, target))}")
        _require_shapes(number, image, {name: target[name] for name in _NAMES if name in target})


def _require_shapes(number: int, image: Tensor, target: Target) -> None:
    for name, value in target.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"targets[{number}][{name!r}] must be a tensor, got {type(value).__name__}")
    boxes = target["boxes"]
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"targets[{number}]['boxes'] must be of real numbers, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"targets[{number}]['boxes'] must be (N, 4), got {tuple(boxes.shape)}")
    if "labels" in target and target["labels"].shape != boxes.shape[:1]:
        raise ValueError(
            f"targets[{number}]['labels'] must be ({len(boxes)},), one for each of its boxes, got "
            f"{tuple(target['labels'].shape)}"
        )
    if "masks" in target:
        expected = (len(boxes), image.shape[-2], image.shape[-1])
        if target["masks"].shape != expected:
            raise ValueError(
                f"targets[{number}]['masks'] must be {expected}, as its boxes and image, got "
                f"{tuple(target['masks'].shape)}"
            )


def require_values(
    images: Sequence[Tensor], targets: Sequence[Target] | None, resized: Sequence[Target] | None
) -> None:
    """Raise for images beyond [0, 1], and for boxes and masks that are none.

    Args:
        images: as they came.
        targets: as they came.
        resized: their boxes in the pixels of the resized images, where some may have lost their size.

    Raises:
        ValueError: for one with NaN among its values, in [0, 255] or normalised; for boxes that are not finite or have
            no width or height; and for masks of other values than 0 and 1.
    """
    if torch.compiler.is_compiling() or images[0].device.type == "meta":
        return
    checks: list[tuple[Tensor, Callable[[], str]]] = [
        (_is_beyond(image), partial(_about_image, number, image)) for number, image in enumerate(images)
    ]
    for number, (target, moved) in enumerate(zip(targets or (), resized or (), strict=True)):
        if len(moved["boxes"]):  # empty ones are sound, and not every operator takes them on MPS
            complain = partial(_about_boxes, number, target["boxes"], moved["boxes"])
            checks.append((_are_sound(moved["boxes"].detach()).all().logical_not(), complain))
        masks = target.get("masks")
        if masks is not None and masks.dtype != torch.bool and masks.numel():
            checks.append((((masks == 0) | (masks == 1)).all().logical_not(), partial(_about_masks, number)))
    flags = torch.stack([flag.to(images[0].device) for flag, _ in checks]).int().tolist()
    if any(flags):
        raise ValueError(checks[flags.index(1)][1]())


def _is_beyond(image: Tensor) -> Tensor:
    # Not "more than", which NaN is not either.
    return ((image.detach() - 0.5).abs() <= 0.5 + _BEYOND).all().logical_not()


def _are_sound(boxes: Tensor) -> Tensor:
    return boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _about_image(number: int, image: Tensor) -> str:
    image = image.detach().float().cpu()
    low, high = image.min().item(), image.max().item()
    if not image.isfinite().all():
        nans = int(image.isnan().sum())
        what = f"NaN in {nans} of {image.numel()} values" if nans else f"{low:g} to {high:g}"
        return f"images[{number}] must be in [0, 1], got {what}"
    hint = "divide it by 255" if high > 8 and low > -8 else "it is normalised here, so pass it as it was before"
    return f"images[{number}] must be in [0, 1], got {low:g} to {high:g}: {hint}"


def _about_boxes(number: int, boxes: Tensor, resized: Tensor) -> str:
    first = int(_are_sound(resized.cpu()).logical_not().nonzero()[0, 0])
    return (
        f"targets[{number}]['boxes'] must be finite x1, y1, x2, y2 with x1 < x2 and y1 < y2, got "
        f"{boxes[first].tolist()} as box {first}"
    )


def _about_masks(number: int) -> str:
    return f"targets[{number}]['masks'] must be of 0 and 1, or of bool, got other values"
