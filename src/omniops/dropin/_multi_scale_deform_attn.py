"""Multi-scale deformable attention as Deformable DETR compiles it, under the names by which projects import it.

``MultiScaleDeformableAttention`` is a module of no package: Deformable DETR, DINO, Mask2Former and others each bring
its source. groundingdino and detrex have the same functions in a ``_C`` of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from omniops.dropin._extension import Extension
from omniops.dropin.mmcv_ext import multi_scale_deform_attn as mmcv_ext
from omniops.dropin.mmcv_ext._kernel import kernel


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
    _check(value, spatial_shapes, sampling_loc, attn_weight)
    return mmcv_ext.ms_deform_attn_forward(
        value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step
    )


@kernel
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
    _check(value, spatial_shapes, sampling_loc, attn_weight)
    n, _, heads, depth = value.shape
    expected = (n, sampling_loc.shape[1], heads * depth)
    if grad_output.shape != expected:
        raise ValueError(f"grad_output must have shape (N, Q, M * D) = {expected}, got {tuple(grad_output.shape)}")
    by_value, by_locations, by_weights = mmcv_ext.gradients(
        value, spatial_shapes, sampling_loc, attn_weight, grad_output
    )
    return by_value.to(value.dtype), by_locations.to(sampling_loc.dtype), by_weights.to(attn_weight.dtype)


def _check(value: Tensor, spatial_shapes: Tensor, sampling_loc: Tensor, attn_weight: Tensor) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must have shape (N, pixels of all levels, M, D), got {tuple(value.shape)}")
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes must have shape (L, 2), got {tuple(spatial_shapes.shape)}")
    n, _, heads, _ = value.shape
    levels = spatial_shapes.shape[0]
    shape = tuple(sampling_loc.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (n, heads, levels, 2):
        raise ValueError(
            f"sampling_loc must have shape (N, Q, M, L, P, 2) with N = {n}, M = {heads} and L = {levels}, got {shape}"
        )
    if attn_weight.shape != shape[:5]:
        raise ValueError(f"attn_weight must have shape (N, Q, M, L, P) = {shape[:5]}, got {tuple(attn_weight.shape)}")


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
