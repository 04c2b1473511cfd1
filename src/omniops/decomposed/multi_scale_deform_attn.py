"""Multi-scale deformable attention in core ATen; ``omniops.ops.multi_scale_deform_attn`` has the formula.

For each level a ``grid_sample`` from (N * M, D, H, W) at (N * M, Q, P) positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated


def multi_scale_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> Tensor:
    """(N, S, M, D), (N, Q, M, K, 2), (N, Q, M, K) -> (N, Q, M * D)."""
    n, _, m, d = value.shape
    queries = sampling_locations.shape[1]
    maps = accumulated(value).permute(0, 2, 3, 1).reshape(n * m, d, -1)
    # (N, M, Q, K, 2) and (N * M, 1, Q, K); K may be two axes, L and P.
    locations = accumulated(sampling_locations).flatten(3, -2).transpose(1, 2)
    weights = accumulated(attention_weights).flatten(3).transpose(1, 2).reshape(n * m, 1, queries, -1)
    out = maps.new_zeros((n * m, d, queries))
    pixel, point = 0, 0
    for height, width, points in zip(spatial_shapes[::2], spatial_shapes[1::2], points_per_level, strict=True):
        pixels, level_points = slice(pixel, pixel + height * width), slice(point, point + points)
        pixel, point = pixels.stop, level_points.stop
        if height * width > 0 and points > 0:
            positions = locations[:, :, :, level_points].reshape(n * m, queries, points, 2)
            sample = _nearest if discrete else _bilinear
            samples = sample(maps[:, :, pixels], height, width, positions)
            out = out + (samples * weights[..., level_points]).sum(3)
    return out.reshape(n, m * d, queries).transpose(1, 2).to(value.dtype)


def _bilinear(pixels: Tensor, height: int, width: int, positions: Tensor) -> Tensor:
    """(B, D, H*W), (B, Q, P, 2) -> (B, D, Q, P)."""
    # What is clamped lies outside of the map all the same; infinite positions become finite.
    grid = (2 * positions - 1).clamp(-3, 3)
    return F.grid_sample(pixels.reshape(*pixels.shape[:2], height, width), grid, align_corners=False)


def _nearest(pixels: Tensor, height: int, width: int, positions: Tensor) -> Tensor:
    """The pixel that RT-DETRv2's method "discrete" takes: (B, D, H*W), (B, Q, P, 2) -> (B, D, Q, P)."""
    column, row = (
        torch.where(positions[..., axis].isnan(), 0, positions[..., axis] * size + 0.5).clamp(0, size - 1).long()
        for axis, size in ((0, width), (1, height))
    )
    index = (row * width + column).flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
    samples: Tensor = pixels.gather(2, index).unflatten(2, positions.shape[1:3])
    return samples
