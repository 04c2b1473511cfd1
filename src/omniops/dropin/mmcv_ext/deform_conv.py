"""Deformable convolution, DCNv1 and DCNv2. The batch is never taken in the pieces that ``im2col_step`` asks for.

The numbers of groups follow from the shapes, so ``group``, ``deformable_group`` and the kernel's size tell nothing new.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.ops.deform_conv2d import deform_conv2d


@kernel
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``output``."""
    output.copy_(deform_conv2d(input, offset, weight, None, (dH, dW), (padH, padW), (dilationH, dilationW)))


@kernel
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``gradInput`` and ``gradOffset``."""
    by_input, by_offset, _ = torch.ops.omniops.deform_conv2d_backward_data(
        gradOutput, input, offset, weight, None, (dH, dW), (padH, padW), (dilationH, dilationW)
    )
    gradInput.copy_(by_input)
    gradOffset.copy_(by_offset)


@kernel
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add the gradient of the weight, ``scale`` times, to ``gradWeight``."""
    by_weight = torch.ops.omniops.deform_conv2d_backward_weight(
        gradOutput, input, offset, None, (kH, kW), group, (dH, dW), (padH, padW), (dilationH, dilationW)
    )
    gradWeight.add_(by_weight, alpha=scale)


@kernel
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill ``output``."""
    numbers = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    output.copy_(deform_conv2d(input, offset, weight, bias if with_bias else None, *numbers, mask))


@kernel
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill the gradients of input, offset and mask; add to those of weight and bias."""
    numbers = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    operators = torch.ops.omniops
    data = operators.deform_conv2d_backward_data(grad_output, input, offset, weight, mask, *numbers)
    for grad, computed in zip((grad_input, grad_offset, grad_mask), data, strict=True):
        grad.copy_(computed)
    grad_weight.add_(
        operators.deform_conv2d_backward_weight(grad_output, input, offset, mask, (kernel_h, kernel_w), group, *numbers)
    )
    if with_bias:
        grad_bias.add_(grad_output.sum((0, 2, 3)))
