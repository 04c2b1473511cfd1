"""CARAFE. mmcv's buffers for other memory layouts stay unused, but for the features that its backward gets back."""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.ops.carafe import carafe


@kernel
def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``output``, and ``rfeatures`` for :func:`carafe_backward`."""
    rfeatures.copy_(features)
    output.copy_(carafe(features, masks, kernel_size, group_size, scale_factor))


@kernel
def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``bottom_grad`` and ``mask_grad``."""
    _backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


@kernel
def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Fill ``output``."""
    output.copy_(carafe(features, masks, kernel_size, group_size, scale_factor))


@kernel
def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``bottom_grad`` and ``mask_grad``."""
    _backward(top_grad, features, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _backward(
    grad: Tensor, features: Tensor, masks: Tensor, by_features: Tensor, by_masks: Tensor, *sizes: int
) -> None:
    gradients = torch.ops.omniops.carafe_backward(grad, features, masks, *features.shape[2:], *sizes, 1)
    by_features.copy_(gradients[0])
    by_masks.copy_(gradients[1])
