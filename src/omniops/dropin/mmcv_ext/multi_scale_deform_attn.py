"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159), which mmcv asks for on CUDA alone.

``value`` is (N, pixels of all levels, M heads, D), ``value_spatial_shapes`` (L, 2), heights and widths,
``sampling_locations`` (N, Q, M, L, P, 2), x and y from 0 to 1, ``attention_weights`` (N, Q, M, L, P). The levels follow
each other as ``value_spatial_shapes`` says, and the batch is never taken in the pieces that ``im2col_step`` asks for.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from omniops.backends import accumulator
from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.ops._library import without_autocast
from omniops.ops.multi_scale_deform_attn import flat_sizes, multi_scale_deform_attn, points_of_levels


@kernel
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The samples of all levels, weighted and summed: (N, Q, M * D), in the dtype of ``value``."""
    return attend(value, value_spatial_shapes, sampling_locations, attention_weights)


@kernel
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the three gradients."""
    computed = gradients(value, value_spatial_shapes, sampling_locations, attention_weights, grad_output)
    for grad, found in zip((grad_value, grad_sampling_loc, grad_attn_weight), computed, strict=True):
        grad.copy_(found)


def attend(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator on tensors of any floating dtypes: (N, Q, M * D), in the dtype of ``value``, under autocast too."""
    values, locations, weights = _computable(value, locations, weights)
    with without_autocast(value):
        return multi_scale_deform_attn(values, spatial_shapes, locations, weights).to(value.dtype)


def gradients(
    value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of value, locations and weights, each in its shape, and in its dtype if the operator takes that."""
    sizes = flat_sizes(spatial_shapes)
    points = points_of_levels(len(sizes) // 2, locations, weights)
    value, locations, weights = _computable(value, locations, weights)
    by_value, by_locations, by_weights = torch.ops.omniops.multi_scale_deform_attn_backward(
        grad.to(value.dtype), value, sizes, locations, weights, points, False, [True, True, True]
    )
    return by_value, by_locations, by_weights


def _computable(value: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
    """The tensors as they are where the operator takes their dtypes, else all in one that holds them."""
    tensors = [value, locations, weights]
    if {locations.dtype, weights.dtype} <= {value.dtype, accumulator(value)}:
        return tensors
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]
