"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159), which mmcv asks for on CUDA alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omniops.dropin.mmcv_ext._kernel import kernel


@kernel
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The samples of all levels, weighted and summed.

    ``value`` is (N, pixels of all levels, M heads, D), ``value_spatial_shapes`` (L, 2), heights and widths,
    ``sampling_locations`` (N, Q, M, L, P, 2), x and y from 0 to 1, ``attention_weights`` (N, Q, M, L, P). The result
    is (N, Q, M * D).
    """
    return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)


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
    """Fill the three gradients. That of a location exactly a pixel outside of the map is 0, as in mmcv."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)]
        result = _attend(inputs[0], value_spatial_shapes, *inputs[1:])
        computed = torch.autograd.grad(result, inputs, grad_output)
    sides = value_spatial_shapes.flip(1)[:, None].to(sampling_locations.device)
    places = sampling_locations.detach() * sides - 0.5
    outside = ((places <= -1) | (places >= sides)).any(-1, keepdim=True)
    by_value, by_locations, by_weights = computed
    grad_value.copy_(by_value)
    grad_sampling_loc.copy_(by_locations.masked_fill(outside, 0))
    grad_attn_weight.copy_(by_weights)


def _attend(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    n, _, heads, depth = value.shape
    queries = locations.shape[1]
    result = value.new_zeros(n * heads, depth, queries)
    sizes = [(int(height), int(width)) for height, width in shapes.tolist()]
    levels = value.split([height * width for height, width in sizes], 1)
    for level, (size, values) in enumerate(zip(sizes, levels, strict=True)):
        maps = values.permute(0, 2, 3, 1).reshape(n * heads, depth, *size)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        result = result + (samples * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return result.view(n, heads * depth, queries).mT.contiguous()
