"""Pooling of regions of interest.

``input`` is (N, C, H, W), ``rois`` (K, 5): the index of the image, then x1, y1, x2, y2, which ``spatial_scale`` brings
to pixels of the input. Each region is cut into bins, and results are (K, C, bins down, bins across).

Each ``..._forward`` raises ValueError for a number in ``rois`` that is not finite, and for the index of an image that
``input`` does not have; but for roi_align's average, on the CPU alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from omniops.backends import accumulated
from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.dropin.mmcv_ext._large_regions import Bin, add_gradient, average, bins_of, large_regions
from omniops.dropin.mmcv_ext._torchvision import torchvision_ops

MAX = 0
"""A pool_mode of roi_align; the other, 1, is the average."""

_MAX_SAMPLES = 2**24
"""The numbers that one step samples at most, where it samples in PyTorch, or one number for each of a region's results.

This bounds the working memory, however large regions are: :func:`_steps` takes so many regions at a time, and
:func:`_batches_of_samples` so many of a region's samples.
"""

_ROUNDING = 8
"""Samples to each side for rounding: in float32 it moves a position by less, up to 10^7 pixels away from the map."""


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
    input = accumulated(input)
    rois = rois.to(input.dtype)
    size = (aligned_height, aligned_width)
    if pool_mode != MAX:
        roi_align = torchvision_ops("roi_align").roi_align
        # On other devices torchvision's kernels do not look, and to look here would be to wait for the device.
        if rois.device.type == "cpu":
            _check_rois(rois[:, 0].tolist(), bool(rois.isfinite().all()), len(input))
        small, large = _small_and_large(rois, spatial_scale, size, sampling_ratio, aligned, input.shape[2:])
        averages = roi_align(input, rois[small], size, spatial_scale, sampling_ratio, aligned)
        output[small] = averages.to(output.dtype)
        for k, down, across in large:
            output[k] = average(input[int(rois[k, 0])], down, across)
        return
    begin, extent = _aligned_regions(rois, spatial_scale, aligned)
    # mmcv's largest of no samples, of regions without area, or what a half has nearest to it.
    output.fill_(max(torch.finfo(torch.float32).min, torch.finfo(output.dtype).min))
    # Off the map, so that no gradient comes from no samples. In mmcv that is -1, where a sample may be.
    argmax_y.fill_(-2)
    argmax_x.fill_(-2)
    channels_last = _channels_last(input)
    for rows, grid, counts in _steps(rois, input, extent, size, sampling_ratio):
        bins = _bins(begin[rows], extent[rows], size)
        found: tuple[Tensor, ...] = ()
        for indices in _batches_of_samples(counts, rows, output):
            positions = _positions(bins, extent[rows], size, grid, counts, indices)
            pixels, weights = _neighbours(*positions, *input.shape[2:])
            samples = _sample(channels_last, _on_maps(pixels, rois[rows, 0], input), weights)
            found = _larger(found, _largest(samples, *positions))
        for result, values in zip((output, argmax_y, argmax_x), found, strict=True):
            result[rows] = values.to(result.dtype)


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
    grad = accumulated(grad_output)
    rois = rois.to(grad.dtype)
    if pool_mode != MAX:
        torchvision_ops("roi_align")
        size = (aligned_height, aligned_width)
        small, large = _small_and_large(rois, spatial_scale, size, sampling_ratio, aligned, grad_input.shape[2:])
        by_input = torch.ops.torchvision._roi_align_backward(
            grad[small], rois[small], spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
        for k, down, across in large:
            add_gradient(by_input[int(rois[k, 0])], grad[k], down, across)
        grad_input.copy_(by_input)
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
    rois = accumulated(rois)
    begin, end = rois[:, 1:3] * spatial_scale, (rois[:, 3:5] + 1) * spatial_scale
    size = (pooled_height, pooled_width)
    channels_last = _channels_last(input)
    output.zero_()
    argmax.fill_(-1)
    # A bin ends on pixels that it covers in part, and covers none that are not on the map.
    for rows, _, counts in _steps(rois, input, end - begin, size, 0, lambda pixels, side: min(pixels + 2, side)):
        first, extent = begin[rows], (end - begin)[rows]
        found: tuple[Tensor, ...] = ()
        for down, across in _batches_of_samples(counts, rows, output):
            y, inside_y = _pixels(first[:, 1], extent[:, 1], pooled_height, down, height)
            x, inside_x = _pixels(first[:, 0], extent[:, 0], pooled_width, across, width)
            inside = inside_y[:, :, None] & inside_x[:, None]
            pixels = y[:, :, None] * width + x[:, None]
            samples = channels_last[_on_maps(pixels[None], rois[rows, 0], input)[0]]
            samples.masked_fill_(~inside[..., None], -torch.inf)
            found = _larger(found, _largest(samples, pixels.masked_fill_(~inside, -1)))
        largest, best = found
        output[rows] = largest.masked_fill_(best < 0, 0)
        argmax[rows] = best.to(argmax.dtype)


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
    input = accumulated(input)
    rois = rois.to(input.dtype)
    begin, extent = _regions(rois, spatial_scale, 0.5)
    size = (pooled_height, pooled_width)
    channels_last = _channels_last(input)
    sums = input.new_zeros(output.shape)
    for rows, grid, counts in _steps(rois, input, extent, size, sampling_ratio):
        bins = _moved(_bins(begin[rows], extent[rows], size), extent[rows], offset, rows, gamma)
        for indices in _batches_of_samples(counts, rows, output):
            pixels, weights = _neighbours(
                *_positions(bins, extent[rows], size, grid, counts, indices), *input.shape[2:]
            )
            samples = _sample(channels_last, _on_maps(pixels, rois[rows, 0], input), weights)
            sums[rows] += samples.sum(3).movedim(3, 1)
        sums[rows] /= float(grid[0] * grid[1])
    output.copy_(sums)


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
    input = accumulated(input)
    rois = rois.to(input.dtype)
    begin, extent = _regions(rois, spatial_scale, 0.5)
    size = (pooled_height, pooled_width)
    channels_last = _channels_last(input)
    by_input = torch.zeros_like(channels_last)
    by_offset = offset.new_zeros(offset.shape, dtype=input.dtype)
    for rows, grid, counts in _steps(rois, input, extent, size, sampling_ratio):
        grad = grad_output[rows].to(input.dtype).movedim(1, 3)[:, :, :, None] / float(grid[0] * grid[1])
        for indices in _batches_of_samples(counts, rows, grad_output):
            with torch.enable_grad():
                moves = offset.detach().to(input.dtype).requires_grad_()
                bins = _moved(_bins(begin[rows], extent[rows], size), extent[rows], moves, rows, gamma)
                positions = _positions(bins, extent[rows], size, grid, counts, indices)
                pixels, weights = _neighbours(*positions, *input.shape[2:])
            pixels = _on_maps(pixels, rois[rows, 0], input)
            for pixel, weight in zip(pixels, weights.detach(), strict=True):
                by_input.index_add_(0, pixel.flatten(), (grad * weight[..., None]).flatten(0, -2))
            if offset.numel():
                by_weights = torch.stack([(grad * channels_last[pixel]).sum(-1) for pixel in pixels])
                by_offset += torch.autograd.grad(weights, moves, by_weights)[0]
    grad_offset += by_offset
    n, c, h, w = input.shape
    grad_input.copy_(by_input.view(n, h, w, c).movedim(3, 1))


def _regions(rois: Tensor, spatial_scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """The first corner and the extent of each region, (K, 2), x before y, with the centre of a pixel at ``shift``."""
    begin = rois[:, 1:3] * spatial_scale - shift
    return begin, rois[:, 3:5] * spatial_scale - shift - begin


def _aligned_regions(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """The regions of roi_align, which are at least a pixel wide and high where they are not aligned."""
    begin, extent = _regions(rois, spatial_scale, 0.5 if aligned else 0.0)
    return begin, extent if aligned else extent.clamp(min=1)


def _small_and_large(
    rois: Tensor, spatial_scale: float, size: tuple[int, int], sampling_ratio: int, aligned: bool, sides: Sequence[int]
) -> tuple[slice | list[int], list[tuple[int, list[Bin], list[Bin]]]]:
    """The regions for torchvision's kernel, and those that would take it too much memory with their bins on the map."""
    if rois.device.type != "cpu" or sampling_ratio > 0:
        return slice(None), []
    begin, extent = _aligned_regions(rois, spatial_scale, aligned)
    large = []
    for k in large_regions(extent, size):
        (x, y), (width, height) = begin[k], extent[k]
        large.append((k, bins_of(y, height, size[0], sides[0]), bins_of(x, width, size[1], sides[1])))
    if not large:
        return slice(None), []
    numbers = {k for k, _, _ in large}
    return [k for k in range(len(rois)) if k not in numbers], large


def _check_rois(indices: list[float], finite: bool, images: int) -> None:
    for row, index in enumerate(indices):
        if not 0 <= index < images:
            raise ValueError(
                f"rois must have the index of an image in its first column, from 0 to {images - 1} as input has batch "
                f"size {images}, got {index:g} in row {row}"
            )
    if not finite:
        raise ValueError("rois must be finite, got NaN or infinity: look for it in what predicts the boxes")


def _on_map(samples: int, side: int) -> int:
    """How many of a bin's samples along an axis can be on the map, and one beside it at each end.

    So many samples are almost a pixel apart: at most side + 3 are from -1 to side.
    """
    return min(samples, side + 4 + 2 * _ROUNDING)


def _steps(
    rois: Tensor,
    input: Tensor,
    extent: Tensor,
    size: tuple[int, int],
    sampling_ratio: int,
    counted: Callable[[int, int], int] = _on_map,
) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """Regions whose bins have as many samples, so many at a time as memory allows; those samples, down and across; and
    of them those to look at: all of a given ``sampling_ratio``, else ``counted`` of their number and the map's side.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    samples = (extent.flip(1) / extent.new_tensor(size)).ceil()
    # One transfer brings what a step needs and the indices of the images: to check them costs no further one.
    finite = rois.isfinite().all(1, keepdim=True).to(rois.dtype)
    down, across, indices, are_finite = torch.cat([samples, rois[:, :1], finite], 1).T.tolist()
    _check_rois(indices, all(are_finite), len(input))
    for k, numbers in enumerate(zip(down, across, strict=True)):
        if sampling_ratio > 0:
            grid = (sampling_ratio, sampling_ratio)
        elif all(1 <= number < math.inf for number in numbers):
            grid = (int(numbers[0]), int(numbers[1]))
        else:
            continue
        alike.setdefault(grid, []).append(k)
    for grid, rows in alike.items():
        counts = grid
        if sampling_ratio <= 0:
            counts = (counted(grid[0], input.shape[2]), counted(grid[1], input.shape[3]))
        limit = max(1, _MAX_SAMPLES // (input.shape[1] * size[0] * size[1] * counts[0] * counts[1]))
        for first in range(0, len(rows), limit):
            yield torch.tensor(rows[first : first + limit], device=extent.device), grid, counts


def _batches_of_samples(counts: tuple[int, int], rows: Tensor, results: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of samples, down and across, line by line, so many at a time as memory allows for these regions."""
    total = counts[0] * counts[1]
    limit = max(1, _MAX_SAMPLES // (len(rows) * results[0].numel()))
    for first in range(0, total, limit):
        number = torch.arange(first, min(first + limit, total), device=results.device)
        yield number // counts[1], number % counts[1]


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


def _pixels(begin: Tensor, extent: Tensor, bins: int, number: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Along one axis: pixels of each bin by their number, (K, bins, S), and which are the bin's and on the map."""
    index = torch.arange(bins, device=begin.device)
    step = extent[:, None] / bins
    low = (index * step + begin[:, None]).floor().clamp(0, length).long()
    high = ((index + 1) * step + begin[:, None]).ceil().clamp(0, length).long()
    pixels = low[..., None] + number
    return pixels.clamp(max=length - 1), pixels < high[..., None]


def _positions(
    bins: tuple[Tensor, Tensor],
    extent: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    counts: tuple[int, int],
    indices: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """y and x of the samples of these ``indices``, (K, bins down, bins across, S), of :func:`_steps`'s ``counts``."""
    steps = extent[:, 1, None, None, None] / size[0], extent[:, 0, None, None, None] / size[1]
    y, x = (_along(*axis) for axis in zip(bins, steps, map(float, grid), counts, indices, strict=True))
    return y, x


def _along(begin: Tensor, length: Tensor, samples: float, count: int, number: Tensor) -> Tensor:
    """Where samples of bins are along one axis, counted from the first that can be on the map, or is just before it.

    What is left out is off the map and weighs nothing. One such sample stays at each end that has any, so that the
    first of the largest samples is on the map if it was among all.
    """
    position = number + 0.5
    if count < samples:
        before = ((-1 - begin.detach())[..., None] / (length / samples)).floor() - 1 - _ROUNDING
        position = position + before.clamp(0, samples - count)
    return begin[..., None] + position * length / samples


def _neighbours(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each position, as y * width + x, and their weights in bilinear interpolation.

    Positions up to a pixel outside of the map are moved to its border, and those further out, or NaN, weigh nothing.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.nan_to_num().clamp(0, height - 1), x.nan_to_num().clamp(0, width - 1)
    top, left = y.detach().long(), x.detach().long()
    down, right = y - top, x - left
    rows = (top, 1 - down), ((top + 1).clamp(max=height - 1), down)
    columns = (left, 1 - right), ((left + 1).clamp(max=width - 1), right)
    corners = [(row * width + column, a * b * inside) for row, a in rows for column, b in columns]
    return torch.stack([pixel for pixel, _ in corners]), torch.stack([weight for _, weight in corners])


def _channels_last(input: Tensor) -> Tensor:
    """(N * H * W, C)."""
    return input.movedim(1, 3).flatten(0, 2)


def _on_maps(pixels: Tensor, batch: Tensor, input: Tensor) -> Tensor:
    """The pixels' rows of :func:`_channels_last`."""
    return batch.long().view(1, -1, 1, 1, 1) * (input.shape[2] * input.shape[3]) + pixels


def _sample(channels_last: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """(K, bins down, bins across, S, C)."""
    samples = channels_last[pixels[0]] * weights[0, ..., None]
    for pixel, weight in zip(pixels[1:], weights[1:], strict=True):
        samples += channels_last[pixel] * weight[..., None]
    return samples


def _largest(samples: Tensor, *coordinates: Tensor) -> tuple[Tensor, ...]:
    """The first of each bin's largest samples and its coordinates, each (K, C, bins down, bins across)."""
    largest, best = samples.flatten(1, 2).max(2)
    found = largest, *(values.flatten(1, 2).gather(2, best) for values in coordinates)
    return tuple(values.mT.unflatten(2, samples.shape[1:3]) for values in found)


def _larger(found: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of what :func:`_largest` gave for the batches of samples so far, if any, and for a later one."""
    if not found:
        return more
    largest, later = torch.stack([found[0], more[0]]).max(0)
    return largest, *(torch.where(later == 0, a, b) for a, b in zip(found[1:], more[1:], strict=True))


def _scatter(grad_input: Tensor, rois: Tensor, pixels: Tensor, values: Tensor) -> None:
    """Fill ``grad_input`` with the sums of ``values``, (..., K, C, bins), at their pixels."""
    n, c, h, w = grad_input.shape
    maps = rois[:, :1].long() * c + torch.arange(c, device=rois.device)
    values = accumulated(values)
    by_input = values.new_zeros(n * c * h * w)
    by_input.index_add_(0, (maps[..., None, None] * (h * w) + pixels).flatten(), values.flatten())
    grad_input.copy_(by_input.view(n, c, h, w))
