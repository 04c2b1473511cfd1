"""Multi-scale deformable attention as Deformable DETR compiles it, under the names by which projects import it.

``MultiScaleDeformableAttention`` is a module of no package: Deformable DETR, DINO, Mask2Former and others each bring
its source. groundingdino and detrex have the same functions in a ``_C`` of their own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omniops.dropin._extension import Extension
from omniops.dropin.mmcv_ext import multi_scale_deform_attn as mmcv_ext


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """The samples of all levels, weighted and summed: (N, Q, M * D), in the dtype of ``value``.

    ``value`` is (N, pixels of all levels, M heads, D), ``spatial_shapes`` (L, 2), heights and widths, ``sampling_loc``
    (N, Q, M, L, P, 2), x and y from 0 to 1, ``attn_weight`` (N, Q, M, L, P). The levels follow each other as
    ``spatial_shapes`` says, and the batch is never taken in the pieces that ``im2col_step`` asks for. Any floating
    dtypes may meet, as autocast makes them do; float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: for a wrong shape.
    """
    spatial_shapes = spatial_shapes.cpu()  # read several times, waited for once
    _check(value, spatial_shapes, sampling_loc, attn_weight)
    values, locations, weights = _of_one_dtype(value, sampling_loc, attn_weight)
    result = mmcv_ext.ms_deform_attn_forward(values, spatial_shapes, level_start_index, locations, weights, im2col_step)
    return result.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, sampling_loc and attn_weight, each in its dtype, for that of the result, (N, Q, M * D).

    Raises:
        ValueError: for a wrong shape.
    """
    spatial_shapes = spatial_shapes.cpu()  # read several times, waited for once
    _check(value, spatial_shapes, sampling_loc, attn_weight)
    n, _, heads, depth = value.shape
    expected = (n, sampling_loc.shape[1], heads * depth)
    if grad_output.shape != expected:
        raise ValueError(f"grad_output must have shape (N, Q, M * D) = {expected}, got {tuple(grad_output.shape)}")
    gradients = torch.empty_like(value), torch.empty_like(sampling_loc), torch.empty_like(attn_weight)
    values, locations, weights, grad = _of_one_dtype(value, sampling_loc, attn_weight, grad_output)
    mmcv_ext.ms_deform_attn_backward(
        values, spatial_shapes, level_start_index, locations, weights, grad, *gradients, im2col_step
    )
    return gradients


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _check(value: Tensor, spatial_shapes: Tensor, sampling_loc: Tensor, attn_weight: Tensor) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must have shape (N, pixels of all levels, M, D), got {tuple(value.shape)}")
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes must have shape (L, 2), got {tuple(spatial_shapes.shape)}")
    n, pixels, heads, _ = value.shape
    levels = spatial_shapes.shape[0]
    shape = tuple(sampling_loc.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (n, heads, levels, 2):
        raise ValueError(
            f"sampling_loc must have shape (N, Q, M, L, P, 2) with N = {n}, M = {heads} and L = {levels}, got {shape}"
        )
    if attn_weight.shape != shape[:5]:
        raise ValueError(f"attn_weight must have shape (N, Q, M, L, P) = {shape[:5]}, got {tuple(attn_weight.shape)}")
    sizes = spatial_shapes.tolist()
    if sum(height * width for height, width in sizes) != pixels:
        raise ValueError(f"value must have as many pixels as the levels of spatial_shapes, {sizes}, got {pixels}")


def _give_module(extension: Extension, module: ModuleType) -> None:
    """Give a module that went on without the compiled one what it lacks."""
    if not hasattr(module, "_C"):
        extension.replace(module, "_C", importlib.import_module(extension.name))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ms_deform_attn_forward": ms_deform_attn_forward,
    "ms_deform_attn_backward": ms_deform_attn_backward,
}

MultiScaleDeformableAttention = Extension("MultiScaleDeformableAttention", _FUNCTIONS)
groundingdino = Extension(
    "groundingdino._C", _FUNCTIONS, {"groundingdino.models.GroundingDINO.ms_deform_attn": _give_module}
)
detrex = Extension("detrex._C", _FUNCTIONS)
