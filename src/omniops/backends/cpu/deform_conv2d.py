"""Deformable convolution in C++; ``omniops.ops.deform_conv2d`` has the formula, ``csrc/deform_conv2d.h`` the kernels'
contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import omniops._C as _C
from omniops._torch_private import x86_has_bfloat16
from omniops.backends import prepared, strides
from omniops.backends.columns import Columns, Geometry
from omniops.backends.cpu._dtypes import DTYPES


def _call(
    geometry: Geometry,
    image: Sequence[int],
    offset: Sequence[int],
    dtype: torch.dtype,
    columns_dtype: torch.dtype,
) -> _C.DeformConv2d:
    return _C.DeformConv2d(
        DTYPES[dtype],
        DTYPES[columns_dtype],
        image[3],
        image[1:3],
        offset[2:],
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.offset_groups,
    )


def _sample(
    image: Tensor, offset: Tensor, mask: Tensor | None, call: _C.DeformConv2d, first: int, columns: Tensor
) -> None:
    _C.deform_conv2d_sample(
        call,
        first,
        columns.shape[1],
        image.data_ptr(),
        offset.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        columns.data_ptr(),
        torch.get_num_threads(),
    )


def _gradients(
    by_columns: Tensor,
    image: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    call: _C.DeformConv2d,
    first: int,
    by_image: Tensor,
    by_offset: Tensor,
    by_mask: Tensor | None,
) -> None:
    _C.deform_conv2d_gradients(
        call,
        first,
        by_columns.shape[1],
        by_columns.data_ptr(),
        image.data_ptr(),
        offset.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        by_image.data_ptr(),
        by_offset.data_ptr(),
        0 if by_mask is None else by_mask.data_ptr(),
        torch.get_num_threads(),
    )


def _transpose(sizes: tuple[int, int, int], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    out_strides = strides(shape)

    def run(tensor: Tensor) -> Tensor:
        out = tensor.new_empty_strided(shape, out_strides)
        _C.transpose(tensor.element_size(), *sizes, tensor.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out

    return run


def _columns_dtype(dtype: torch.dtype) -> torch.dtype:
    """What columns are in, and so multiplied in: bfloat16 where the processor multiplies that, or it would be slow."""
    if dtype == torch.bfloat16 and x86_has_bfloat16():
        return dtype
    return torch.promote_types(dtype, torch.float32)


# Columns of 8 MiB: kernels and products find each other's in the caches, and there are few turns between them.
_COLUMNS = Columns(
    sample=_sample,
    gradients=_gradients,
    max_bytes=2**23,
    call=_call,
    columns_dtype=_columns_dtype,
    transpose=_transpose,
)

deform_conv2d = prepared(_COLUMNS.forward)
deform_conv2d_backward = prepared(_COLUMNS.backward)
