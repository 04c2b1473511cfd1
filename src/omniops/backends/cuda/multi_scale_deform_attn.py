"""Multi-scale deformable attention in Triton: which kernels serve a call; the operator's file has the formula.

``_multi_scale_deform_forward`` and ``_multi_scale_deform_backward`` hold the kernels. The gradient of value is added up
by atomics in float32; under ``torch.use_deterministic_algorithms`` it is a gather of sorted samples
(``_multi_scale_deform_gather``), with the same bits every run. The other gradients belong to one program each.

Tensors that are not contiguous, or begin at no multiple of 16 bytes, are copied. So what a kernel is compiled for is
dtypes, M, D and the points of each level, whatever the sizes of the maps and the number of queries; for few queries it
is another, with blocks of another size, and beyond 2**31 elements of an image a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops.backends import accumulated, prepared
from omniops.backends.cuda._launch import on_device
from omniops.backends.cuda._multi_scale_deform_launches import MAX_LEVELS, Problem, check_sizes

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of value, sampling_locations and attention_weights."""


@prepared
def multi_scale_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> Callable[..., Tensor]:
    """(N, S, M, D), (N, Q, M, K, 2), (N, Q, M, K) -> (N, Q, M * D); K may be two axes, levels and points."""
    if len(points_per_level) > MAX_LEVELS:
        check_sizes(value.shape, spatial_shapes, attention_weights.shape, points_per_level)
        return _forward_of_groups
    problem = Problem(value, spatial_shapes, attention_weights, points_per_level, discrete)
    launch, shape = problem.forward(), (problem.n, problem.queries, problem.m * problem.d)

    def run(value: Tensor, _: Any, locations: Tensor, weights: Tensor, *__: Any) -> Tensor:
        out = value.new_empty(shape)
        with on_device(value) as stream:
            launch(stream, value, locations, weights, out)
        return out

    if all(map(_is_dense, (value, sampling_locations, attention_weights))):
        return run
    return lambda value, _, locations, weights, *__: run(_dense(value), _, _dense(locations), _dense(weights))


@prepared
def multi_scale_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
    output_mask: Sequence[bool],
) -> Callable[..., Gradients]:
    """The gradients of value, sampling_locations and attention_weights, of no elements where not in ``output_mask``."""
    if len(points_per_level) > MAX_LEVELS:
        check_sizes(value.shape, spatial_shapes, attention_weights.shape, points_per_level)
        return _backward_of_groups
    problem = Problem(value, spatial_shapes, attention_weights, points_per_level, discrete)
    needs_value, needs_locations, needs_weights = output_mask
    needs_samples = needs_locations or needs_weights
    launch_samples = problem.backward(False, True) if needs_samples else None
    gather = problem.gathered() if needs_value else None
    add = problem.backward(True, needs_samples) if needs_value else None
    finish = problem.finish() if needs_value and value.dtype != problem.sums else None

    def run(grad: Tensor, value: Tensor, _: Any, locations: Tensor, weights: Tensor, *__: Any) -> Gradients:
        by_value = by_locations = by_weights = grad
        with on_device(value) as stream:
            if needs_samples:
                by_locations, by_weights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
            if add is None or gather is None or torch.are_deterministic_algorithms_enabled():
                if gather is not None:
                    by_value = gather(stream, grad, value, locations, weights)
                if launch_samples is not None:
                    launch_samples(stream, grad, value, locations, weights, by_value, by_locations, by_weights)
            elif finish is None:
                by_value = value.new_zeros(value.shape)
                add(stream, grad, value, locations, weights, by_value, by_locations, by_weights)
            else:
                sums = value.new_zeros(problem.sum_shape, dtype=problem.sums)
                add(stream, grad, value, locations, weights, sums, by_locations, by_weights)
                by_value = value.new_empty(value.shape)
                finish(stream, sums, by_value)
        return (
            by_value if needs_value else grad.new_empty(0),
            by_locations if needs_locations else grad.new_empty(0),
            by_weights if needs_weights else grad.new_empty(0),
        )

    if all(map(_is_dense, (grad, value, sampling_locations, attention_weights))):
        return run
    return lambda grad, value, _, locations, weights, *__: run(
        _dense(grad), _dense(value), _, _dense(locations), _dense(weights)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the kernels take it as it is: contiguous, and loaded 16 bytes at once."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _dense(tensor: Tensor) -> Tensor:
    return tensor if _is_dense(tensor) else tensor.clone(memory_format=torch.contiguous_format)


class _Group(NamedTuple):
    """Levels that are served together."""

    pixels: slice
    points: slice
    spatial_shapes: list[int]
    points_per_level: list[int]


def _groups(spatial_shapes: Sequence[int], points_per_level: Sequence[int]) -> Iterator[_Group]:
    """The groups of levels that have pixels and points."""
    pixel, point = 0, 0
    for first in range(0, len(points_per_level), MAX_LEVELS):
        shapes = list(spatial_shapes[2 * first : 2 * (first + MAX_LEVELS)])
        points = list(points_per_level[first : first + MAX_LEVELS])
        pixels = slice(pixel, pixel + sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True)))
        group_points = slice(point, point + sum(points))
        pixel, point = pixels.stop, group_points.stop
        if pixels.start < pixel and group_points.start < point:
            yield _Group(pixels, group_points, shapes, points)


def _forward_of_groups(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> Tensor:
    n, _, m, d = value.shape
    locations, weights = sampling_locations.flatten(3, -2), attention_weights.flatten(3)
    total = accumulated(value.new_zeros((n, attention_weights.shape[1], m * d)))
    for group in _groups(spatial_shapes, points_per_level):
        total += multi_scale_deform_attn(
            accumulated(value[:, group.pixels]),
            group.spatial_shapes,
            locations[..., group.points, :],
            weights[..., group.points],
            group.points_per_level,
            discrete,
        )
    return total.to(value.dtype)


def _backward_of_groups(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
    output_mask: Sequence[bool],
) -> Gradients:
    needs_value, needs_locations, needs_weights = output_mask
    by_value = value.new_zeros(value.shape if needs_value else 0)
    locations, weights = sampling_locations.flatten(3, -2), attention_weights.flatten(3)
    by_locations = locations.new_zeros(locations.shape if needs_locations else 0)
    by_weights = weights.new_zeros(weights.shape if needs_weights else 0)
    for group in _groups(spatial_shapes, points_per_level):
        gradients = multi_scale_deform_attn_backward(
            grad,
            value[:, group.pixels],
            group.spatial_shapes,
            locations[..., group.points, :],
            weights[..., group.points],
            group.points_per_level,
            discrete,
            output_mask,
        )
        if needs_value:
            by_value[:, group.pixels] = gradients[0]
        if needs_locations:
            by_locations[..., group.points, :] = gradients[1]
        if needs_weights:
            by_weights[..., group.points] = gradients[2]
    nothing = grad.new_empty(0)
    return (
        by_value if needs_value else nothing,
        by_locations.view(sampling_locations.shape) if needs_locations else nothing,
        by_weights.view(attention_weights.shape) if needs_weights else nothing,
    )
