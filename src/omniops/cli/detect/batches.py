"""The detector on batches of pictures, each of which fails alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniops.cli.detect.detector import detect_objects
from omniops.cli.errors import CommandError, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from omniops.detection import CARAFERCNN

    Pixels = NDArray[np.uint8]

CUDA_BATCH = 4
"""How many pictures are detected at once on an NVIDIA GPU: more is hardly faster, and takes more memory."""


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
        found = self._detect_together([pixels for _, pixels in pictures])
        return [
            result if isinstance(result, CommandError) else self._describe(result, image_id, pixels)
            for (image_id, pixels), result in zip(pictures, found, strict=True)
        ]

    def _detect_together(self, pictures: Sequence[Pixels]) -> Sequence[dict[str, Tensor] | CommandError]:
        import torch

        from omniops.detection.inference import detect_batch

        if len(pictures) > 1:
            try:
                return detect_batch(self._detector, pictures, self._device, output_device=self._device)
            except torch.OutOfMemoryError:
                self._take_smaller(len(pictures))
            except (FloatingPointError, RuntimeError, ValueError):  # of one of them
                pass
        return [self._detect_alone(pixels) for pixels in pictures]

    def _detect_alone(self, pixels: Pixels) -> dict[str, Tensor] | CommandError:
        from PIL import Image

        try:
            return detect_objects(self._detector, Image.fromarray(pixels), self._device)
        except CommandError as error:
            return error

    def _take_smaller(self, failed: int) -> None:
        smaller = failed // 2
        if smaller < self.size:
            self.size = smaller
            say(f"{failed} pictures at once take more memory than there is: going on with {smaller}", "warning")

    def _describe(self, found: dict[str, Tensor], image_id: int, pixels: Pixels) -> Detected:
        from omniops.detection import coco

        is_shown = found["scores"] >= self._threshold
        shown = {name: value[is_shown].cpu() for name, value in found.items()}
        return Detected(pixels, coco.to_results(found, image_id, self._category_ids), shown)
