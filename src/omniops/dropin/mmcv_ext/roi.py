"""Pooling of regions of interest.

``input`` is (N, C, H, W), ``rois`` (K, 5): the index of the image, then x1, y1, x2, y2, which ``spatial_scale`` brings
to pixels of the input. Each region is cut into bins, and results are (K, C, bins down, bins across).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omniops.dropin.mmcv_ext._kernel import at_least_float32, kernel
from omniops.dropin.mmcv_ext._torchvision import torchvision_ops

MAX = 0
"""A pool_mode of roi_align; the other, 1, is the average."""

_MOST_SAMPLES = 2**24
"""The numbers that one step samples at most, where it samples in PyTorch."""


@kernel
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output`` with each bin's average sample, or with its largest and ``argmax_y``, ``argmax_x`` with where."""
    input = at_least_float32(input)
    rois = rois.to(input.dtype)
    size = (aligned_height, aligned_width)
    if pool_mode != MAX:
        roi_align = torchvision_ops("roi_align").roi_align
        output.copy_(roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))
        return
    begin, extent = _regions(rois, spatial_scale, 0.5 if aligned else 0.0)
    if not aligned:
        extent = extent.clamp(min=1)
    # mmcv's largest of no samples, of regions without area, or what a half has nearest to it.
    output.fill_(max(torch.finfo(torch.float32).min, torch.finfo(output.dtype).min))
    argmax_y.fill_(-1)
    argmax_x.fill_(-1)
    for rows, grid in _steps(extent, size, sampling_ratio, input.shape[1]):
        positions = _positions(_bins(begin[rows], extent[rows], size), extent[rows], size, grid)
        pixels, weights = _neighbours(*positions, *input.shape[2:])
        samples = _sample(_channels_last(input), _on_maps(pixels, rois[rows, 0], input), weights)
        largest, best = _largest(samples)
        output[rows] = largest.to(output.dtype)
        for argmax, position in zip((argmax_y, argmax_x), positions, strict=True):
            everywhere = position.flatten(3)[:, None].expand(*best.shape, -1)
            argmax[rows] = everywhere.gather(4, best[..., None])[..., 0].to(argmax.dtype)


@kernel
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``grad_input``."""
    grad = at_least_float32(grad_output)
    rois = rois.to(grad.dtype)
    if pool_mode != MAX:
        torchvision_ops("roi_align")
        size = (aligned_height, aligned_width)
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
            )
        )
        return
    pixels, weights = _neighbours(argmax_y.to(grad.dtype), argmax_x.to(grad.dtype), *grad_input.shape[2:])
    _scatter(grad_input, rois, pixels, grad * weights)


@kernel
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` with each bin's largest pixel and ``argmax`` with its number in the map, 0 and -1 for none.

    Bins are not torchvision's: a region ends a whole pixel of the image behind x2, y2, and is not rounded.
    """
    height, width = input.shape[2:]
    begin, end = at_least_float32(rois[:, 1:3]) * spatial_scale, (at_least_float32(rois[:, 3:5]) + 1) * spatial_scale
    size = (pooled_height, pooled_width)
    channels_last = _channels_last(input)
    output.zero_()
    argmax.fill_(-1)
    for rows, grid in _steps(end - begin, size, 0, input.shape[1]):
        first, extent = begin[rows], (end - begin)[rows]
        y, inside_y = _pixels(first[:, 1], extent[:, 1], pooled_height, grid[0] + 2, height)
        x, inside_x = _pixels(first[:, 0], extent[:, 0], pooled_width, grid[1] + 2, width)
        inside = inside_y[:, :, None, :, None] & inside_x[:, None, :, None, :]
        pixels = y[:, :, None, :, None] * width + x[:, None, :, None, :]
        samples = channels_last[_on_maps(pixels[None], rois[rows, 0], input)[0]]
        samples.masked_fill_(~inside[..., None], -torch.inf)
        largest, best = _largest(samples)
        empty = ~inside.flatten(3).any(3)[:, None]
        output[rows] = largest.masked_fill_(empty, 0)
        pixels = pixels.flatten(3)[:, None].expand(*best.shape, -1).gather(4, best[..., None])[..., 0]
        argmax[rows] = pixels.masked_fill_(empty, -1).to(argmax.dtype)


@kernel
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``grad_input``."""
    _scatter(grad_input, rois, argmax.clamp(min=0)[None], torch.where(argmax >= 0, grad_output, 0)[None])


@kernel
def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill ``output`` with each bin's average sample.

    ``offset`` is (K, 2, bins down, bins across), x before y: ``gamma`` times it moves a bin, in units of its region's
    width and height; or it has no elements.
    """
    input = at_least_float32(input)
    rois = rois.to(input.dtype)
    begin, extent = _regions(rois, spatial_scale, 0.5)
    size = (pooled_height, pooled_width)
    channels_last = _channels_last(input)
    output.zero_()
    for rows, grid in _steps(extent, size, sampling_ratio, input.shape[1]):
        bins = _moved(_bins(begin[rows], extent[rows], size), extent[rows], offset, rows, gamma)
        pixels, weights = _neighbours(*_positions(bins, extent[rows], size, grid), *input.shape[2:])
        samples = _sample(channels_last, _on_maps(pixels, rois[rows, 0], input), weights)
        output[rows] = samples.mean((3, 4)).movedim(3, 1).to(output.dtype)


@kernel
def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill ``grad_input`` and, where there are offsets, ``grad_offset``.

    The derivative by the offsets is the forward's own, also at the border of the map, where that of mmcv's kernel is
    not.
    """
    input = at_least_float32(input)
    rois = rois.to(input.dtype)
    begin, extent = _regions(rois, spatial_scale, 0.5)
    size = (pooled_height, pooled_width)
    channels_last = _channels_last(input)
    by_input = torch.zeros_like(channels_last)
    for rows, grid in _steps(extent, size, sampling_ratio, input.shape[1]):
        grad = grad_output[rows].to(input.dtype).movedim(1, 3)[:, :, :, None, None] / (grid[0] * grid[1])
        with torch.enable_grad():
            moves = offset.detach().requires_grad_()
            bins = _moved(_bins(begin[rows], extent[rows], size), extent[rows], moves, rows, gamma)
            pixels, weights = _neighbours(*_positions(bins, extent[rows], size, grid), *input.shape[2:])
        pixels = _on_maps(pixels, rois[rows, 0], input)
        for pixel, weight in zip(pixels, weights.detach(), strict=True):
            by_input.index_add_(0, pixel.flatten(), (grad * weight[..., None]).flatten(0, -2))
        if offset.numel():
            by_weights = torch.stack([(grad * channels_last[pixel]).sum(-1) for pixel in pixels])
            grad_offset += torch.autograd.grad(weights, moves, by_weights)[0]
    n, c, h, w = input.shape
    grad_input.copy_(by_input.view(n, h, w, c).movedim(3, 1))


def _regions(rois: Tensor, spatial_scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """The first corner and the extent of each region, (K, 2), x before y, with the centre of a pixel at ``shift``."""
    begin = rois[:, 1:3] * spatial_scale - shift
    return begin, rois[:, 3:5] * spatial_scale - shift - begin


def _steps(
    extent: Tensor, size: tuple[int, int], sampling_ratio: int, channels: int
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Regions whose bins have as many samples, down and across, so many at a time as memory allows."""
    alike: dict[tuple[int, int], list[int]] = {}
    down, across = (extent.flip(1) / extent.new_tensor(size)).ceil().long().T.tolist()
    for k, grid in enumerate(zip(down, across, strict=True)):
        alike.setdefault((sampling_ratio, sampling_ratio) if sampling_ratio > 0 else grid, []).append(k)
    for grid, rows in alike.items():
        if min(grid) < 1:
            continue
        most = max(1, _MOST_SAMPLES // (channels * size[0] * size[1] * grid[0] * grid[1]))
        for first in range(0, len(rows), most):
            yield torch.tensor(rows[first : first + most], device=extent.device), grid


def _bins(begin: Tensor, extent: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """y and x where each bin begins, (K, bins down, bins across)."""
    i, j = (torch.arange(bins, device=begin.device) for bins in size)
    y = begin[:, 1, None] + i * (extent[:, 1, None] / size[0])
    x = begin[:, 0, None] + j * (extent[:, 0, None] / size[1])
    return y[:, :, None].expand(-1, -1, size[1]), x[:, None].expand(-1, size[0], -1)


def _moved(
    bins: tuple[Tensor, Tensor], extent: Tensor, offset: Tensor, rows: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    if offset.numel() == 0:
        return bins
    moves = gamma * extent[:, :, None, None] * offset[rows].to(extent.dtype)
    return bins[0] + moves[:, 1], bins[1] + moves[:, 0]


def _pixels(begin: Tensor, extent: Tensor, bins: int, most: int, length: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the pixels of each bin, (K, bins, most), and which of them are the bin's and on the map."""
    number = torch.arange(bins, device=begin.device)
    step = extent[:, None] / bins
    low = (number * step + begin[:, None]).floor().clamp(0, length).long()
    high = ((number + 1) * step + begin[:, None]).ceil().clamp(0, length).long()
    pixels = low[..., None] + torch.arange(most, device=begin.device)
    return pixels.clamp(max=length - 1), pixels < high[..., None]


def _positions(
    bins: tuple[Tensor, Tensor], extent: Tensor, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """y and x of the samples, (K, bins down, bins across, samples down, samples across)."""
    u, v = (torch.arange(samples, device=extent.device) + 0.5 for samples in grid)
    y = bins[0][..., None] + u * (extent[:, 1] / size[0])[:, None, None, None] / grid[0]
    x = bins[1][..., None] + v * (extent[:, 0] / size[1])[:, None, None, None] / grid[1]
    return y[..., :, None].expand(*y.shape, grid[1]), x[..., None, :].expand(*y.shape, grid[1])


def _neighbours(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each position, as y * width + x, and their weights in bilinear interpolation.

    Positions up to a pixel outside of the map are moved to its border, and those further out weigh nothing.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    rows = (top, 1 - down), ((top + 1).clamp(max=height - 1), down)
    columns = (left, 1 - right), ((left + 1).clamp(max=width - 1), right)
    corners = [(row * width + column, a * b * inside) for row, a in rows for column, b in columns]
    return torch.stack([pixel for pixel, _ in corners]).long(), torch.stack([weight for _, weight in corners])


def _channels_last(input: Tensor) -> Tensor:
    """(N * H * W, C)."""
    return input.movedim(1, 3).flatten(0, 2)


def _on_maps(pixels: Tensor, batch: Tensor, input: Tensor) -> Tensor:
    """The pixels' rows of :func:`_channels_last`."""
    return batch.long().view(1, -1, 1, 1, 1, 1) * (input.shape[2] * input.shape[3]) + pixels


def _sample(channels_last: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """(K, bins down, bins across, samples down, samples across, C)."""
    samples = channels_last[pixels[0]] * weights[0, ..., None]
    for pixel, weight in zip(pixels[1:], weights[1:], strict=True):
        samples += channels_last[pixel] * weight[..., None]
    return samples


def _largest(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The largest sample of each bin and its number, (K, C, bins down, bins across)."""
    largest, best = samples.flatten(1, 2).flatten(2, 3).max(2)
    return largest.mT.unflatten(2, samples.shape[1:3]), best.mT.unflatten(2, samples.shape[1:3])


def _scatter(grad_input: Tensor, rois: Tensor, pixels: Tensor, values: Tensor) -> None:
    """Fill ``grad_input`` with the sums of ``values``, (..., K, C, bins), at their pixels."""
    n, c, h, w = grad_input.shape
    maps = rois[:, :1].long() * c + torch.arange(c, device=rois.device)
    values = at_least_float32(values)
    by_input = values.new_zeros(n * c * h * w)
    by_input.index_add_(0, (maps[..., None, None] * (h * w) + pixels).flatten(), values.flatten())
    grad_input.copy_(by_input.view(n, c, h, w))
