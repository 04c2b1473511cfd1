"""A detector on one picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def detect(
    detector: Callable[[list[Tensor]], list[dict[str, Tensor]]], pixels: NDArray[np.uint8], device: torch.device
) -> dict[str, Tensor]:
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
    image = torch.from_numpy(pixels).to(device).permute(2, 0, 1) / 255
    with torch.inference_mode():
        (detections,) = detector([image])
        detections = {name: value.cpu() for name, value in detections.items()}
    if not (detections["boxes"].isfinite().all() and detections["scores"].isfinite().all()):
        raise FloatingPointError("the detections are no finite numbers: are the weights damaged, or another model's?")
    return detections
