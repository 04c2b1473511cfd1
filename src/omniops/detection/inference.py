"""A detector on pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omniops.detection.transform import Transform

_CPU = torch.device("cpu")
Detector = Callable[[list[Tensor]], list[dict[str, Tensor]]]


def detect(detector: Detector, pixels: NDArray[np.uint8], device: torch.device) -> dict[str, Tensor]:
    """The detections in a picture, on the CPU.

    Args:
        detector: one of this package, or of torchvision, in evaluation on the device.
        pixels: (H, W, 3) in RGB.
        device: where the detector is.

    Returns:
        ``boxes`` (N, 4) as x0, y0, x1, y1 in pixels, ``labels`` (N), ``scores`` (N), the surest first, and with masks
        ``masks`` (N, 1, H, W).

    Raises:
        FloatingPointError: where boxes or scores are no finite numbers.

    Example:
        >>> from omniops.detection import faster_rcnn_resnet50_fpn_carafe
        >>> detector = faster_rcnn_resnet50_fpn_carafe(min_size=64, max_size=64).eval()
        >>> sorted(detect(detector, np.zeros((48, 64, 3), np.uint8), torch.device("cpu")))
        ['boxes', 'labels', 'scores']
    """
    (detections,) = detect_batch(detector, [pixels], device)
    return detections


def detect_batch(
    detector: Detector,
    pictures: Sequence[NDArray[np.uint8]],
    device: torch.device,
    output_device: torch.device = _CPU,
) -> list[dict[str, Tensor]]:
    """The detections in each of several pictures, as ``detect`` gives them.

    Pictures that the detector pads to one size go through it together, the others after each other: the largest of a
    batch would have the others padded, and what is found near a padded border is another.

    Args:
        detector: one of this package, or of torchvision, in evaluation on the device.
        pictures: each (H, W, 3) in RGB, of any sizes.
        device: where the detector is.
        output_device: where the detections are to be.

    Returns:
        For each picture what ``detect`` returns: equal to the rounding of arithmetic in batches.

    Raises:
        FloatingPointError: where boxes or scores of any picture are no finite numbers.

    Example:
        >>> from omniops.detection import faster_rcnn_resnet50_fpn_carafe
        >>> detector = faster_rcnn_resnet50_fpn_carafe(min_size=64, max_size=64).eval()
        >>> len(detect_batch(detector, [np.zeros((48, 64, 3), np.uint8)] * 2, torch.device("cpu")))
        2
    """
    together: dict[tuple[int, int], list[int]] = {}
    for number, pixels in enumerate(pictures):
        together.setdefault(_padded_size(detector, (pixels.shape[0], pixels.shape[1])), []).append(number)
    found: list[dict[str, Tensor]] = [{}] * len(pictures)
    for numbers in together.values():
        images = [torch.from_numpy(pictures[number]).to(device).permute(2, 0, 1) / 255 for number in numbers]
        with torch.inference_mode():
            for number, detections in zip(numbers, detector(images), strict=True):
                found[number] = {name: value.to(output_device) for name, value in detections.items()}
    if not all(detections[name].isfinite().all() for detections in found for name in ("boxes", "scores")):
        raise FloatingPointError("the detections are no finite numbers: are the weights damaged, or another model's?")
    return found


def _padded_size(detector: Detector, size: tuple[int, int]) -> tuple[int, int]:
    """Of a picture (H, W): for a detector that does not tell how it pads, that of the picture itself."""
    transform = getattr(detector, "transform", None)
    return transform.padded_size(size) if isinstance(transform, Transform) else size
