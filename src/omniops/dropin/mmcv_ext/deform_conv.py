"""Deformable convolution, DCNv1 and DCNv2. The batch is never taken in the pieces that ``im2col_step`` asks for.

The gradient of the offset is mmcv's, which is 0 where a position is exactly -1; ours and torchvision's is the slope
towards the map there.

DCNv2 reads ``offset[b]`` and ``mask[b]`` as flat memory, as mmcv does: of a larger tensor, such as that of another
level of a pyramid, the first numbers of each sample are taken in the shape that the result asks for, and the gradient
goes to them alone. A smaller one, which mmcv reads beyond its end, raises ValueError, as does a wrong number of
channels of the input. DCNv1 takes no other shapes than that of the result, in mmcv and here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.backends import accumulated
from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.ops.deform_conv2d import deform_conv2d

Numbers = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""stride, padding and dilation, each (vertical, horizontal)."""


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
    _check_channels(input, weight, group)
    _check_offset_channels(offset, 2 * deformable_group * kH * kW)
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
    numbers = (dH, dW), (padH, padW), (dilationH, dilationW)
    by_input, by_offset, *_ = torch.ops.omniops.deform_conv2d_backward(
        gradOutput, input, offset, weight, None, *numbers, [True, True, False, False, False]
    )
    gradInput.copy_(by_input)
    gradOffset.copy_(_without_border(by_offset, offset, (kH, kW), numbers))


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
    numbers = (dH, dW), (padH, padW), (dilationH, dilationW)
    # Of the weight only the shape is used, which its gradient has too.
    gradients = torch.ops.omniops.deform_conv2d_backward(
        gradOutput, input, offset, gradWeight, None, *numbers, [False, False, True, False, False]
    )
    gradWeight.add_(gradients[2], alpha=scale)


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
    _check_channels(input, weight, group)
    channels = deformable_group * kernel_h * kernel_w
    offset = _as_read("offset", offset, 2 * channels, output)
    mask = _as_read("mask", mask, channels, output)
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
    channels = deformable_group * kernel_h * kernel_w
    offset = _as_read("offset", offset, 2 * channels, grad_output)
    mask = _as_read("mask", mask, channels, grad_output)
    by_input, by_offset, by_weight, by_bias, by_mask = torch.ops.omniops.deform_conv2d_backward(
        grad_output, input, offset, weight, mask, *numbers, [True, True, True, with_bias, True]
    )
    grad_input.copy_(by_input)
    _fill_as_read(grad_offset, _without_border(by_offset, offset, (kernel_h, kernel_w), numbers))
    _fill_as_read(grad_mask, by_mask)
    grad_weight.add_(by_weight)
    if with_bias:
        grad_bias.add_(by_bias)


def _check_channels(input: Tensor, weight: Tensor, group: int) -> None:
    if input.shape[1] != weight.shape[1] * group:
        raise ValueError(
            f"input must have {weight.shape[1] * group} channels, those of weight in {group} groups, "
            f"got {input.shape[1]}"
        )


def _check_offset_channels(offset: Tensor, channels: int) -> None:
    if offset.shape[1] != channels:
        raise ValueError(f"offset must have {channels} channels, 2 * deform_groups * kh * kw, got {offset.shape[1]}")


def _as_read(name: str, tensor: Tensor, channels: int, result: Tensor) -> Tensor:
    """(N, channels, H_out, W_out): the first numbers of each sample, in order."""
    n, _, height, width = result.shape
    shape = (n, channels, height, width)
    if tensor.shape == shape:
        return tensor
    samples = tensor.flatten(1)
    numbers = channels * height * width
    if len(samples) < n or samples.shape[1] < numbers:
        raise ValueError(
            f"{name} must have at least the numbers of shape {shape}, batch by batch, got {tuple(tensor.shape)}"
        )
    return samples[:n, :numbers].reshape(shape)


def _fill_as_read(grad: Tensor, computed: Tensor) -> None:
    """Fill the gradient of what :func:`_as_read` read, with 0 for the numbers that it left."""
    if grad.shape == computed.shape:
        grad.copy_(computed)
        return
    samples, numbers = grad.new_zeros(grad.flatten(1).shape), computed.flatten(1)
    samples[: len(numbers), : numbers.shape[1]] = numbers
    grad.copy_(samples.view(grad.shape))


def _without_border(by_offset: Tensor, offset: Tensor, kernel_size: tuple[int, int], numbers: Numbers) -> Tensor:
    """The gradient of the offset with 0 for positions of -1; beyond it and at the other border it has 0 already."""
    height, width = offset.shape[2:]
    moves = accumulated(offset).unflatten(1, (-1, *kernel_size, 2))
    taps = [
        torch.arange(taps, device=offset.device)[:, None] * dilation
        + torch.arange(size, device=offset.device) * stride
        - padding
        for taps, size, stride, padding, dilation in zip(kernel_size, (height, width), *numbers, strict=True)
    ]
    y = moves[:, :, :, :, 0] + taps[0][:, None, :, None]
    x = moves[:, :, :, :, 1] + taps[1][:, None, :]
    border = ((y == -1) | (x == -1))[:, :, :, :, None]
    by_moves: Tensor = by_offset.unflatten(1, (-1, *kernel_size, 2)).masked_fill(border, 0)
    return by_moves.flatten(1, 4)
