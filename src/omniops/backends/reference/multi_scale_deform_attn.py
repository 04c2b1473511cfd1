"""Multi-scale deformable attention in plain PyTorch; ``omniops.ops.multi_scale_deform_attn`` has the formula.

Each function is differentiable by autograd, and loops over the levels. The letters are N batch, S pixels of all levels,
Q queries, M heads, D channels of a head, K points of all levels, P those of one. The samples of a level are
(N, M, Q * P, D), what is known of each (N, M, Q * P, 1). K may be two axes, L and P, in locations and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniops.backends import accumulated


@dataclass(frozen=True)
class _Corner:
    """One of the pixels that the samples of a level are interpolated between."""

    index: Tensor
    """Its row of the level's ``_rows``; outside of the map that of the first pixel."""
    inside: Tensor
    weight: Tensor
    """In the interpolation; the derivatives of it by the location follow."""
    weight_by_x: Tensor
    weight_by_y: Tensor


@dataclass(frozen=True)
class _Level:
    pixels: slice
    """Of value's second axis."""
    points: slice
    """Of the axis K."""
    corners: list[_Corner]


def multi_scale_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> Tensor:
    """(N, S, M, D), (N, Q, M, K, 2), (N, Q, M, K) -> (N, Q, M * D)."""
    n, queries, m = attention_weights.shape[:3]
    weights = accumulated(attention_weights).flatten(3)
    out = weights.new_zeros((n, m, queries, value.shape[3]))
    for level in _levels(spatial_shapes, sampling_locations, points_per_level, discrete):
        factors, rows = _by_sample(weights[..., level.points]), _rows(value, level)
        for corner in level.corners:
            products = factors * (corner.weight * _pixels(rows, corner))
            out = out + products.unflatten(2, (queries, -1)).sum(3)
    return out.transpose(1, 2).to(value.dtype).contiguous().view(n, queries, m * value.shape[3])


def multi_scale_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(N, Q, M * D) -> the gradients of value, sampling_locations and attention_weights that ``output_mask`` names."""
    queries, m = attention_weights.shape[1:3]
    weights = accumulated(attention_weights).flatten(3)
    grads = accumulated(grad).unflatten(2, (m, -1)).transpose(1, 2)
    by_value: list[Tensor] = []
    point_gradients: list[list[Tensor]] = [[], [], []]
    """By x, by y and by the weight, for each level."""
    levels = _levels(spatial_shapes, sampling_locations, points_per_level, discrete)
    for level, points in zip(levels, points_per_level, strict=True):
        factors, by_sample = _by_sample(weights[..., level.points]), grads.repeat_interleave(points, 2)
        rows = _rows(value, level)
        by_rows = grads.new_zeros(rows.shape)
        sample_gradients = [torch.zeros_like(factors)] * 3
        for corner in level.corners:
            share = torch.where(corner.inside, factors * corner.weight * by_sample, 0)
            by_rows = by_rows.index_add(0, corner.index.flatten(), share.flatten(0, 2))
            along = (by_sample * _pixels(rows, corner)).sum(3, keepdim=True)
            terms = factors * along * corner.weight_by_x, factors * along * corner.weight_by_y, along * corner.weight
            sample_gradients = [total + term for total, term in zip(sample_gradients, terms, strict=True)]
        if discrete:  # also where the gradient of the result is not finite
            sample_gradients[:2] = [torch.zeros_like(factors)] * 2
        by_value.append(by_rows.view(value[:, level.pixels].shape))
        for found, level_gradient in zip(point_gradients, sample_gradients, strict=True):
            found.append(level_gradient.view(*grads.shape[:2], queries, points).transpose(1, 2))
    by_x, by_y, by_weight = (torch.cat(level_gradients, 3) for level_gradients in point_gradients)
    results = torch.cat(by_value, 1), torch.stack([by_x, by_y], -1), by_weight
    gradients = zip(results, (value, sampling_locations, attention_weights), output_mask, strict=True)
    # The last view has the strides of a new tensor, where a size is 1 too.
    return tuple(
        gradient.to(argument.dtype).contiguous().view(argument.shape) if wanted else grad.new_empty(0)
        for gradient, argument, wanted in gradients
    )


def _levels(
    spatial_shapes: Sequence[int], sampling_locations: Tensor, points_per_level: Sequence[int], discrete: bool
) -> Iterator[_Level]:
    """Each level; one without pixels has no corners."""
    locations = accumulated(sampling_locations).flatten(3, -2)
    pixel, point = 0, 0
    sizes = zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)
    for (height, width), points in zip(sizes, points_per_level, strict=True):
        pixels, level_points = slice(pixel, pixel + height * width), slice(point, point + points)
        pixel, point = pixels.stop, level_points.stop
        corners: list[_Corner] = []
        if height * width > 0:
            x, y = map(_by_sample, locations[..., level_points, :].unbind(-1))
            corners = [_nearest(x, y, height, width)] if discrete else _corners(x, y, height, width)
        yield _Level(pixels, level_points, corners)


def _nearest(x: Tensor, y: Tensor, height: int, width: int) -> _Corner:
    """The pixel that RT-DETRv2's method "discrete" takes."""
    column, row = (
        torch.nan_to_num(position.detach() * size + 0.5, nan=0).clamp(0, size - 1).long()
        for position, size in ((x, width), (y, height))
    )
    one = torch.ones_like(x)
    return _Corner(
        _row_of(row * width + column, height * width), one.bool(), one, torch.zeros_like(x), torch.zeros_like(x)
    )


def _corners(x: Tensor, y: Tensor, height: int, width: int) -> list[_Corner]:
    """The four pixels around each sample, whose weights are those of mmcv's kernel, and its derivatives too."""
    x, y = x * width - 0.5, y * height - 0.5
    # Infinite positions become finite ones outside of the map, so that a weight of theirs times zero is zero.
    outside = (y <= -1) | (y >= height) | (x <= -1) | (x >= width)
    x, y = torch.where(outside, -2, x), torch.where(outside, -2, y)
    left, top = x.detach().floor(), y.detach().floor()
    found = []
    for row, weight_y, sign_y in ((top, 1 - (y - top), -height), (top + 1, y - top, height)):
        for column, weight_x, sign_x in ((left, 1 - (x - left), -width), (left + 1, x - left, width)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row, 0).long() * width + torch.where(inside, column, 0).long()
            row_of_pixel = _row_of(index, height * width)
            found.append(_Corner(row_of_pixel, inside, weight_y * weight_x, sign_x * weight_y, sign_y * weight_x))
    return found


def _rows(value: Tensor, level: _Level) -> Tensor:
    """The pixels of a level, (N * H * W * M, D)."""
    return value[:, level.pixels].flatten(0, 2)


def _pixels(rows: Tensor, corner: _Corner) -> Tensor:
    """(N, M, Q * P, D), zero outside of the map."""
    found = rows.index_select(0, corner.index.flatten()).view(*corner.index.shape[:3], rows.shape[1])
    return torch.where(corner.inside, found.to(corner.weight.dtype), 0)


def _row_of(pixel: Tensor, size: int) -> Tensor:
    """The row of a head's pixel, for each sample of (N, M, Q * P, 1)."""
    n, m = pixel.shape[:2]
    image, head = torch.arange(n, device=pixel.device), torch.arange(m, device=pixel.device)
    return (image[:, None, None, None] * size + pixel) * m + head[:, None, None]


def _by_sample(points: Tensor) -> Tensor:
    """(N, Q, M, P) -> (N, M, Q * P, 1)."""
    # Contiguous, as PyTorch 2.7 traces other strides for what is computed of it than that has.
    return points.transpose(1, 2).flatten(2)[..., None].contiguous()
