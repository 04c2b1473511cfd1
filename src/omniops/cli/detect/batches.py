"""The detector on batches of pictures, each of which fails alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniops.cli.detect.detector import errors_of_picture
from omniops.cli.errors import CommandError, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from omniops.detection import CARAFERCNN

    Pixels = NDArray[np.uint8]

CUDA_BATCH = 4
"""How many pictures are detected at once on an NVIDIA GPU; docs/benchmarks.md has what that was seen to gain."""


class Detected(NamedTuple):
    """A picture, COCO results of all that is on it, and the detections that are drawn, on the CPU."""

    pixels: Pixels
    results: list[dict[str, Any]]
    shown: dict[str, Tensor]


class BatchDetector:
    """A detector on a device, and how many pictures it takes at once.

    Args:
        size: of a batch; by default what suits the device. It falls where the memory does not suffice.
        threshold: detections with a lower score are not drawn.
        category_ids: of each label, 0 of the background first.
    """

    def __init__(
        self,
        detector: CARAFERCNN,
        device: torch.device,
        size: int | None,
        threshold: float,
        category_ids: Sequence[int],
    ) -> None:
        self._detector, self._device, self._threshold, self._category_ids = detector, device, threshold, category_ids
        self.size = size or (CUDA_BATCH if device.type == "cuda" else 1)

    def detect(self, pictures: Sequence[tuple[int, Pixels]]) -> list[Detected | CommandError]:
        """What is on each picture, (H, W, 3) in RGB, of an image id; or why that is not known."""
        import torch

        if len(pictures) > 1:
            try:
                return self._detect(pictures)
            except torch.OutOfMemoryError:
                self._take_smaller(len(pictures))
            except (FloatingPointError, RuntimeError, ValueError):  # of one of them
                pass
        return [self._detect_alone(picture) for picture in pictures]

    def _detect(self, pictures: Sequence[tuple[int, Pixels]]) -> list[Detected | CommandError]:
        import torch

        from omniops.detection import coco
        from omniops.detection.inference import detect_batch

        # A CUDA GPU encodes masks faster than it hands them over.
        between = self._device if self._device.type == "cuda" else torch.device("cpu")
        together = detect_batch(self._detector, [pixels for _, pixels in pictures], self._device, between)
        described: list[Detected | CommandError] = []
        for (image_id, pixels), found in zip(pictures, together, strict=True):
            is_shown = found["scores"] >= self._threshold
            shown = {name: value[is_shown].cpu() for name, value in found.items()}
            described.append(Detected(pixels, coco.to_results(found, image_id, self._category_ids), shown))
        return described

    def _detect_alone(self, picture: tuple[int, Pixels]) -> Detected | CommandError:
        height, width = picture[1].shape[:2]
        try:
            with errors_of_picture(width, height):
                return self._detect([picture])[0]
        except CommandError as error:
            return error

    def _take_smaller(self, failed: int) -> None:
        smaller = failed // 2
        if smaller < self.size:
            self.size = smaller
            say(f"{failed} pictures at once take more memory than there is: going on with {smaller}", "warning")
