"""DCNv2 as CenterNet, CenterTrack, FairMOT and others have it: its compiled module ``_ext``, of no package."""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.dropin._deform_conv import result_shape
from omniops.dropin._extension import Extension
from omniops.dropin.mmcv_ext import deform_conv as mmcv_ext


def dcn_v2_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    deformable_group: int,
) -> Tensor:
    """The modulated deformable convolution, (N, C_out, H_out, W_out).

    Raises:
        ValueError: for a wrong shape.
    """
    numbers = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
    output = input.new_empty(result_shape(input, weight, numbers[2:4], numbers[4:6], numbers[6:]))
    unused = input.new_empty(0)
    mmcv_ext.modulated_deform_conv_forward(
        input, weight, bias, unused, offset, mask, output, unused, *numbers, 1, deformable_group, with_bias=True
    )
    return output


def dcn_v2_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    deformable_group: int,
) -> tuple[Tensor, ...]:
    """The gradients of input, offset, mask, weight and bias for that of the result."""
    numbers = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
    by_input, by_offset, by_mask, by_weight, by_bias = map(torch.zeros_like, (input, offset, mask, weight, bias))
    unused = input.new_empty(0)
    mmcv_ext.modulated_deform_conv_backward(
        *(input, weight, bias, unused, offset, mask, unused, by_input, by_weight, by_bias, by_offset, by_mask),
        *(grad_output, *numbers, 1, deformable_group),
        with_bias=True,
    )
    return by_input, by_offset, by_mask, by_weight, by_bias


DCNv2 = Extension(
    "_ext",
    {"dcn_v2_forward": dcn_v2_forward, "dcn_v2_backward": dcn_v2_backward},
    lacking=("dcn_v2_psroi_pooling_forward", "dcn_v2_psroi_pooling_backward"),
    library="DCNv2",
)
