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
    padded = F.pad(im[0], (pad_w, kernel_w, pad_h, kernel_h))
    y, x = torch.meshgrid(
        torch.arange(kernel_h, device=im.device), torch.arange(kernel_w, device=im.device), indexing="ij"
    )
    windows = padded[:, y.reshape(-1, 1) + mask_h_idx, x.reshape(-1, 1) + mask_w_idx]
    col.copy_(windows.flatten(0, 1))


@kernel
def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write ``col``, (channels, positions), to the positions of ``im``, (1, channels, height, width)."""
    im[0, :, mask_h_idx, mask_w_idx] = col
