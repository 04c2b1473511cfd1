"""The frames of a video as the image encoder takes them, decoded ahead by threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from omniops import device as devices
from omniops.sam2.frames import Frames
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.modeling.sam2 import normalize


class VideoFrameLoader(Sequence[Tensor]):
    """A frame by its index: (3, S, S), float32, normalised, on the device; of a slice (N, 3, S, S).

    Args:
        frames: of the video.
        image_size: the side S of the square that frames are resized to.
        device: the model's.
    """

    def __init__(self, frames: Frames | LiveFrames, image_size: int, device: torch.device) -> None:
        self.image_size = image_size
        self._frames, self._device = frames, device
        self._prefetched: dict[int, Future[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if isinstance(index, range):
            return torch.stack([self[i] for i in index])
        future = self._prefetched.pop(index, None)
        pixels = future.result() if future else self._decode(index)
        with devices.exclusive(self._device):
            pixels = pixels.to(self._device, non_blocking=self._device.type == "cuda")  # CUDA has them pinned
            return normalize(pixels.permute(2, 0, 1).contiguous() / 255)

    def prefetch(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> None:
        """Begin to decode the frames that will be asked for next, and forget those of earlier calls."""
        for i in self._prefetched.keys() - set(indices):
            self._prefetched[i].cancel()
        self._prefetched = {i: self._prefetched.get(i) or pool.submit(self._decode, i) for i in indices}

    @property
    def num_prefetched(self) -> int:
        """How many frames are decoded ahead, or are being decoded."""
        return len(self._prefetched)

    @property
    def nbytes(self) -> int:
        """Bytes of the frames that are decoded ahead."""
        return self.num_prefetched * 3 * self.image_size**2

    def _decode(self, index: int) -> Tensor:
        """(S, S, 3), uint8, on the CPU; pinned for CUDA, which then copies it while the CPU goes on."""
        pixels = torch.from_numpy(self._frames.resized(index, self.image_size))
        return pixels.pin_memory() if self._device.type == "cuda" else pixels
