"""Deformable convolution in core ATen; ``omniops.ops.deform_conv2d`` has the formula.

The samples of all taps are columns, and one product sums them: with B = N * D maps of c = C / D channels and T taps, a
``grid_sample`` from (B, c, H, W) at (B, T * H_out, W_out) positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated


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
    n, c = input.shape[:2]
    c_out, per_group, *kernel_size = weight.shape
    taps = kernel_size[0] * kernel_size[1]
    offset_groups = offset.shape[1] // (2 * taps)
    pixels = offset.shape[2] * offset.shape[3]
    grid = _grid(input, offset, kernel_size, stride, padding, dilation)
    maps = accumulated(input).reshape(n * offset_groups, c // offset_groups, *input.shape[2:])
    columns = F.grid_sample(maps, grid, align_corners=False)
    if mask is not None:
        columns = columns * accumulated(mask).reshape(n * offset_groups, 1, taps * offset.shape[2], offset.shape[3])
    groups = c // per_group
    columns = columns.reshape(n, groups, per_group * taps, pixels)
    kernels = accumulated(weight).reshape(groups, c_out // groups, per_group * taps)
    # A product of matrices where there is one group, which every runtime has in two and three axes.
    out = torch.matmul(kernels[0], columns[:, 0]) if groups == 1 else torch.matmul(kernels, columns)
    out = out.reshape(n, c_out, *offset.shape[2:])
    if bias is not None:
        out = out + accumulated(bias)[:, None, None]
    return out.to(input.dtype)


def _grid(
    input: Tensor,
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The positions of the samples, (B, T * H_out, W_out, 2), x and y from -1 to 1 between the edges of the map."""
    kh, kw = kernel_size
    height, width = offset.shape[2:]
    moves = accumulated(offset).reshape(-1, kh * kw, 2, height, width)
    coordinates = []
    for axis, (size, shape) in enumerate(((height, (height, 1)), (width, (1, width)))):
        starts = torch.arange(size, device=offset.device, dtype=moves.dtype) * stride[axis] - padding[axis]
        taps = torch.arange(kernel_size[axis], device=offset.device, dtype=moves.dtype) * dilation[axis]
        of_tap = (taps[:, None] if axis == 0 else taps[None]).expand(kh, kw).reshape(kh * kw, 1, 1)
        position = starts.reshape(shape) + of_tap + moves[:, :, axis]
        # What is clamped lies outside of the map all the same; infinite positions become finite.
        coordinates.append(((2 * position + 1) / input.shape[2 + axis] - 1).clamp(-3, 3))
    return torch.stack(coordinates[::-1], -1).reshape(-1, kh * kw * height, width, 2)
