"""Pictures of every usual kind, as the floats that the network takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_WHITE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


def as_rgb(image: Any) -> NDArray[Any]:
    """A picture as (H, W, 3), in the dtype that it came in.

    Raises:
        TypeError, ValueError: as ``SAM2ImagePredictor.set_image``.
    """
    if hasattr(image, "getbands"):  # PIL's; which is not needed for arrays
        deep = image.mode.startswith(("I", "F"))
        image = np.asarray(image if deep else image.convert("RGB"))
        if image.dtype == np.int32:  # how PIL keeps 16 bits where it has no mode for them
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


def planes(image: NDArray[Any], device: torch.device) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W) in float32 from 0 to 1."""
    white = _WHITE.get(image.dtype, 1.0)
    if image.dtype == np.uint16:  # torch computes little with it
        image = image.astype(np.float32)
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).to(device)
    return pixels.permute(2, 0, 1)[None].float().contiguous() / white


def resized(image: NDArray[Any], side: int, device: torch.device) -> Tensor:
    """(H, W, 3) -> (3, side, side) in float32 from 0 to 1, as the official image predictor: bilinear, antialiased."""
    # A GPU takes the pixels as they come. PyTorch has this interpolation on CUDA and on the CPU, not everywhere.
    whole = planes(image, device if device.type == "cuda" else torch.device("cpu"))
    smaller = F.interpolate(whole, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return smaller[0].to(device)
