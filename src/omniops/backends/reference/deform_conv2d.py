"""Deformable convolution in plain PyTorch; ``omniops.ops.deform_conv2d`` has the formula.

Each function is differentiable by autograd, and loops over the taps, so that one tap's columns are the workspace, or
every tap's where autograd keeps them. The letters are n batch, g weight group, d offset group, c channel of a group, o
channel of the result, p position of the result. Positions are (N, D, P).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from omniops.backends import accumulated, finish


@dataclass(frozen=True)
class _Corner:
    """One of the four pixels around the samples of a tap, each (N, D, 1, P)."""

    index: Tensor
    """Where it lies in the flattened map; 0 outside."""
    inside: Tensor
    weight: Tensor
    """In the interpolation; the derivatives of it by the sample's position follow."""
    weight_by_y: Tensor
    weight_by_x: Tensor


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
    groups = input.shape[1] // weight.shape[1]
    kernels = accumulated(weight).unflatten(0, (groups, -1)).flatten(3)
    out: Tensor | None = None
    for tap, corners, factor in _taps(input, offset, mask, weight.shape[2:], stride, padding, dilation):
        columns = (_interpolated(input, corners) * factor).flatten(1, 2).unflatten(1, (groups, -1))
        product = _product(kernels[..., tap], columns)
        out = product if out is None else out + product
    assert out is not None
    out = out.flatten(1, 2).unflatten(2, offset.shape[2:])
    if bias is not None:
        out = out + accumulated(bias)[:, None, None]
    return finish(out, input)


def _product(kernels: Tensor, columns: Tensor) -> Tensor:
    """(g, o, c), (n, g, c, p) -> (n, g, o, p); of a copy for each image, as MPS reads what is expanded wrongly."""
    return torch.matmul(kernels.expand(columns.shape[0], -1, -1, -1).contiguous(), columns)


def deform_conv2d_backward_data(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C_out, H_out, W_out) -> the gradients of input, offset and mask."""
    groups = input.shape[1] // weight.shape[1]
    kernels = accumulated(weight).unflatten(0, (groups, -1)).flatten(3)
    grads = accumulated(grad).flatten(2).unflatten(1, (groups, -1))
    by_input = grads.new_zeros(input.flatten(2).shape).unflatten(1, (offset.shape[1] // (2 * kernels.shape[-1]), -1))
    by_offset, by_mask = [], []
    for tap, corners, factor in _taps(input, offset, mask, weight.shape[2:], stride, padding, dilation):
        by_column = _product(kernels[..., tap].mT, grads).flatten(1, 2)
        by_column = by_column.unflatten(1, by_input.shape[1:3])
        by_sample = by_column * factor
        by_y, by_x = torch.zeros_like(factor), torch.zeros_like(factor)
        for corner in corners:
            share = torch.where(corner.inside, corner.weight * by_sample, 0)
            by_input = by_input.scatter_add(3, corner.index.expand_as(share), share)
            along = (by_sample * _pixels(input, corner)).sum(2, keepdim=True)
            by_y = by_y + along * corner.weight_by_y
            by_x = by_x + along * corner.weight_by_x
        by_offset += [by_y, by_x]
        by_mask.append((by_column * _interpolated(input, corners)).sum(2, keepdim=True))
    gradient_of_mask = offset.new_zeros(0)
    if mask is not None:
        gradient_of_mask = finish(torch.cat(by_mask, 2).flatten(1, 2).unflatten(2, mask.shape[2:]), mask)
    return (
        finish(by_input.flatten(1, 2).unflatten(2, input.shape[2:]), input),
        finish(torch.cat(by_offset, 2).flatten(1, 2).unflatten(2, offset.shape[2:]), offset),
        gradient_of_mask,
    )


def deform_conv2d_backward_weight(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """(N, C_out, H_out, W_out) -> (C_out, C / groups, kh, kw)."""
    grads = accumulated(grad).flatten(2).unflatten(1, (groups, -1))
    by_tap = []
    for _, corners, factor in _taps(input, offset, mask, kernel_size, stride, padding, dilation):
        columns = (_interpolated(input, corners) * factor).flatten(1, 2).unflatten(1, (groups, -1))
        by_tap.append(torch.einsum("ngop,ngcp->goc", grads, columns))
    return finish(torch.stack(by_tap, -1).flatten(0, 1).unflatten(2, tuple(kernel_size)), grad)


def deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(N, C_out, H_out, W_out) -> the gradients of input, offset, weight, bias and mask that ``output_mask`` names."""
    numbers = stride, padding, dilation
    gradients: list[Tensor] = [grad.new_empty(0)] * 5
    if output_mask[0] or output_mask[1] or output_mask[4]:
        gradients[0], gradients[1], gradients[4] = deform_conv2d_backward_data(
            grad, input, offset, weight, mask, *numbers
        )
    if output_mask[2]:
        groups = input.shape[1] // weight.shape[1]
        by_weight = deform_conv2d_backward_weight(grad, input, offset, mask, weight.shape[2:], groups, *numbers)
        gradients[2] = finish(by_weight, weight)
    if output_mask[3]:
        gradients[3] = accumulated(grad).sum((0, 2, 3)).to(grad.dtype)
    return tuple(
        gradient if wanted else grad.new_empty(0) for gradient, wanted in zip(gradients, output_mask, strict=True)
    )


def _taps(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[tuple[int, list[_Corner], Tensor]]:
    """For each tap its number, the four corners of its samples, and the samples' factors, (N, D, 1, P)."""
    taps = kernel_size[0] * kernel_size[1]
    moves = accumulated(offset).flatten(2).unflatten(1, (-1, taps, 2))
    factors = moves.new_ones(()).expand(1, 1, taps, 1) if mask is None else mask.flatten(2).unflatten(1, (-1, taps))
    height, width = offset.shape[2:]
    rows = torch.arange(height, device=offset.device) * stride[0] - padding[0]
    columns = torch.arange(width, device=offset.device) * stride[1] - padding[1]
    for tap, (u, v) in enumerate(product(range(kernel_size[0]), range(kernel_size[1]))):
        y = (rows + u * dilation[0])[:, None].expand(height, width).flatten() + moves[:, :, tap, 0]
        x = (columns + v * dilation[1]).expand(height, width).flatten() + moves[:, :, tap, 1]
        yield tap, _corners(y[:, :, None], x[:, :, None], input.shape[2], input.shape[3]), factors[:, :, tap, None]


def _corners(y: Tensor, x: Tensor, height: int, width: int) -> list[_Corner]:
    # Infinite positions become finite ones outside the map, so that a weight of theirs times zero is zero.
    outside = (y < -1) | (y >= height) | (x < -1) | (x >= width)
    y, x = torch.where(outside, -2, y), torch.where(outside, -2, x)
    top, left = y.detach().floor(), x.detach().floor()
    found = []
    for row, weight_y, sign_y in ((top, 1 - (y - top), -1), (top + 1, y - top, 1)):
        for column, weight_x, sign_x in ((left, 1 - (x - left), -1), (left + 1, x - left, 1)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            # Before the product, which float32 would round in maps of more than 2**24 pixels.
            index = torch.where(inside, row, 0).long() * width + torch.where(inside, column, 0).long()
            found.append(_Corner(index, inside, weight_y * weight_x, sign_y * weight_x, sign_x * weight_y))
    return found


def _pixels(input: Tensor, corner: _Corner) -> Tensor:
    """(N, D, c, P), zero outside the map."""
    flat = input.flatten(2).unflatten(1, (corner.index.shape[1], -1))
    index = corner.index.expand(-1, -1, flat.shape[2], -1)
    return torch.where(corner.inside, flat.gather(3, index).to(corner.weight.dtype), 0)


def _interpolated(input: Tensor, corners: list[_Corner]) -> Tensor:
    top_left, top_right, low_left, low_right = (corner.weight * _pixels(input, corner) for corner in corners)
    total: Tensor = top_left + top_right + low_left + low_right
    return total
