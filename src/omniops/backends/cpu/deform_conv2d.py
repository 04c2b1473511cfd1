"""Deformable convolution in C++; ``omniops.ops.deform_conv2d`` has the formula, ``csrc/deform_conv2d.h`` the kernels'
contract.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import omniops._C as _C
from omniops.backends import prepared
from omniops.backends.columns import Columns, Geometry
from omniops.backends.cpu._dtypes import DTYPES


def _sample(
    image: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry, first: int, columns: Tensor
) -> None:
    _C.deform_conv2d_sample(
        _geometry(image, offset, geometry, first, columns),
        DTYPES[image.dtype],
        DTYPES[columns.dtype],
        image.data_ptr(),
        offset.data_ptr(),
        _address(mask),
        columns.data_ptr(),
        torch.get_num_threads(),
    )


def _gradients(
    by_columns: Tensor,
    image: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    first: int,
    by_image: Tensor,
    by_offset: Tensor,
    by_mask: Tensor | None,
) -> None:
    _C.deform_conv2d_gradients(
        _geometry(image, offset, geometry, first, by_columns),
        DTYPES[image.dtype],
        DTYPES[by_columns.dtype],
        by_columns.data_ptr(),
        image.data_ptr(),
        offset.data_ptr(),
        _address(mask),
        by_image.data_ptr(),
        by_offset.data_ptr(),
        _address(by_mask),
        torch.get_num_threads(),
    )


def _geometry(
    image: Tensor, offset: Tensor, geometry: Geometry, first: int, columns: Tensor
) -> _C.DeformConv2dGeometry:
    return _C.DeformConv2dGeometry(
        image.shape[3],
        image.shape[1:3],
        offset.shape[2:],
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.offset_groups,
        first,
        columns.shape[1],
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _transpose(tensor: Tensor, sizes: tuple[int, int, int], shape: tuple[int, ...]) -> Tensor:
    out = tensor.new_empty(shape)
    _C.transpose(tensor.element_size(), *sizes, tensor.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def _columns_dtype(dtype: torch.dtype) -> torch.dtype:
    """What columns are in, and so multiplied in: bfloat16 where the processor multiplies that, or it would be slow."""
    if dtype == torch.bfloat16 and _multiplies_bfloat16():
        return dtype
    return torch.promote_types(dtype, torch.float32)


@cache
def _multiplies_bfloat16() -> bool:
    # Private names, for want of public ones; where they have gone, columns are float32.
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


# Columns of 8 MiB: kernels and products find each other's in the caches, and there are few turns between them.
_COLUMNS = Columns(
    sample=_sample, gradients=_gradients, most_bytes=2**23, columns_dtype=_columns_dtype, transpose=_transpose
)

deform_conv2d = prepared(_COLUMNS.forward)
deform_conv2d_backward = prepared(_COLUMNS.backward)
