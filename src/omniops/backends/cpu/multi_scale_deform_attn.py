"""Multi-scale deformable attention in C++; ``omniops.ops.multi_scale_deform_attn`` has the formula,
``csrc/multi_scale_deform_attn.h`` the kernels' contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import omniops._C as _C
from omniops.backends import accumulator, prepared, strides
from omniops.backends.cpu._dtypes import DTYPES


@prepared
def multi_scale_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> Callable[..., Tensor]:
    """(N, S, M, D), (N, Q, M, K, 2), (N, Q, M, K) -> (N, Q, M * D); K may be two axes, L and P."""
    call = _call(value, spatial_shapes, attention_weights, points_per_level, discrete)
    shape = (*attention_weights.shape[:2], value.shape[2] * value.shape[3])
    out_strides, point_dtype = strides(shape), accumulator(value)
    is_dense = _are_dense(value) and _are_dense(sampling_locations, attention_weights, dtype=point_dtype)

    def run(value: Tensor, _: Any, sampling_locations: Tensor, attention_weights: Tensor, *__: Any) -> Tensor:
        out = value.new_empty_strided(shape, out_strides)
        if not is_dense:
            value = value.contiguous()
            sampling_locations = sampling_locations.to(point_dtype).contiguous()
            attention_weights = attention_weights.to(point_dtype).contiguous()
        _C.multi_scale_deform_attn(
            call,
            value.data_ptr(),
            sampling_locations.data_ptr(),
            attention_weights.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    return run


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
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(N, Q, M * D) -> the gradients of value, sampling_locations and attention_weights that ``output_mask`` names."""
    call = _call(value, spatial_shapes, attention_weights, points_per_level, discrete)
    needs, point_dtype = tuple(output_mask), accumulator(value)
    is_dense = _are_dense(grad, value) and _are_dense(sampling_locations, attention_weights, dtype=point_dtype)
    value_layout, locations_layout, weights_layout = (
        (tensor.shape, strides(tensor.shape)) for tensor in (value, sampling_locations, attention_weights)
    )

    def run(
        grad: Tensor, value: Tensor, _: Any, sampling_locations: Tensor, attention_weights: Tensor, *__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        locations, weights = sampling_locations, attention_weights
        if not is_dense:
            grad, value = grad.contiguous(), value.contiguous()
            locations, weights = locations.to(point_dtype).contiguous(), weights.to(point_dtype).contiguous()
        by_value = value.new_empty_strided(*value_layout) if needs[0] else None
        by_locations = locations.new_empty_strided(*locations_layout) if needs[1] else None
        by_weights = weights.new_empty_strided(*weights_layout) if needs[2] else None
        _C.multi_scale_deform_attn_backward(
            call,
            grad.data_ptr(),
            value.data_ptr(),
            locations.data_ptr(),
            weights.data_ptr(),
            *(0 if gradient is None else gradient.data_ptr() for gradient in (by_value, by_locations, by_weights)),
            torch.get_num_threads(),
        )
        return (
            grad.new_empty(0) if by_value is None else by_value,
            grad.new_empty(0) if by_locations is None else by_locations.to(sampling_locations.dtype),
            grad.new_empty(0) if by_weights is None else by_weights.to(attention_weights.dtype),
        )

    return run


def _are_dense(*tensors: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take the tensors as they are."""
    return all(tensor.is_contiguous() and dtype in (None, tensor.dtype) for tensor in tensors)


def _call(
    value: Tensor,
    spatial_shapes: Sequence[int],
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> _C.MultiScaleDeformAttn:
    n, _, m, d = value.shape
    queries = attention_weights.shape[1]
    return _C.MultiScaleDeformAttn(
        DTYPES[value.dtype], n, queries, m, d, list(spatial_shapes), list(points_per_level), discrete
    )
