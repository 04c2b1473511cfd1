"""Images of every usual kind as the tensors that the network takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_WHITE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


def to_rgb(image: Any) -> NDArray[Any]:
    """An image as (H, W, 3), RGB, in its own dtype.

    Raises:
        TypeError, ValueError: as ``SAM2ImagePredictor.set_image``.
    """
    if hasattr(image, "getbands"):  # PIL's, which need not be installed for arrays
        has_wide_pixels = image.mode.startswith(("I", "F"))
        image = np.asarray(image if has_wide_pixels else image.convert("RGB"))
        if image.dtype == np.int32:  # as PIL reads some files of 16 bits
            image = image.clip(0, 65535).astype(np.uint16)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a NumPy array or a PIL image, got {type(image).__name__}")
    if image.dtype not in _WHITE and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image must be uint8, uint16 or floating, got {image.dtype}")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"image must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {tuple(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"image must not be empty, got {tuple(image.shape)}")
    if np.issubdtype(image.dtype, np.floating) and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"a floating image must be from 0 to 1, got {image.min():g} to {image.max():g}: divide by its white, "
            "or pass uint8"
        )
    return np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[2] == 1 else image[..., :3]


def to_tensor(image: NDArray[Any], device: torch.device) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W) in float32 from 0 to 1."""
    white = _WHITE.get(image.dtype, 1.0)
    if image.dtype == np.uint16:  # PyTorch has few operators for it
        image = image.astype(np.float32)
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).to(device)
    return pixels.permute(2, 0, 1)[None].float().contiguous() / white


def resize(image: NDArray[Any], image_size: int, device: torch.device) -> Tensor:
    """(H, W, 3) -> (3, S, S) in float32 from 0 to 1, as the official image predictor: bilinear, antialiased."""
    # PyTorch has antialiased interpolation on the CPU and CUDA, not on every device. CUDA takes the pixels as bytes.
    full_size = to_tensor(image, device if device.type == "cuda" else torch.device("cpu"))
    size = (image_size, image_size)
    resized = F.interpolate(full_size, size, mode="bilinear", align_corners=False, antialias=True)
    return resized[0].to(device)
