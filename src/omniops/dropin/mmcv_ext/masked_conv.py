"""The two steps of masked_conv2d around its matrix product: positions (mask_h_idx, mask_w_idx) are convolved alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omniops.dropin.mmcv_ext._kernel import kernel


@kernel
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill ``col``, (C * kernel_h * kernel_w, positions), with the windows of ``im``, (1, C, H, W), zero outside."""
    if len(col) != im.shape[1] * kernel_h * kernel_w:
        raise ValueError(
            f"features must have the {len(col) // (kernel_h * kernel_w)} channels of weight.shape[1], without groups, "
            f"got {im.shape[1]}"
        )
    height = im.shape[2] + 2 * pad_h - kernel_h + 1
    width = im.shape[3] + 2 * pad_w - kernel_w + 1
    _check_positions(mask_h_idx, mask_w_idx, height, width)
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    y, x = torch.meshgrid(
        torch.arange(kernel_h, device=im.device), torch.arange(kernel_w, device=im.device), indexing="ij"
    )
    windows = padded[:, y.reshape(-1, 1) + mask_h_idx, x.reshape(-1, 1) + mask_w_idx]
    col.copy_(windows.flatten(0, 1))


@kernel
def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write ``col``, (channels, positions), to the positions of ``im``, (1, channels, height, width).

    Under autocast the product of weight and columns is of its dtype, and ``im`` of that of the features.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


def _check_positions(mask_h_idx: Tensor, mask_w_idx: Tensor, height: int, width: int) -> None:
    if len(mask_h_idx) == 0:
        return
    y, x = torch.stack([mask_h_idx.max(), mask_w_idx.max()]).tolist()
    if y >= height or x >= width:
        position = f"row {y}" if y >= height else f"column {x}"
        raise ValueError(
            f"mask must be 0 outside of the result, which has {height} rows and {width} columns, got a positive number "
            f"in {position}: let padding keep the features' size, or mask no place beyond the result"
        )
