"""CARAFE in C++; ``omniops.ops.carafe`` has the formula, ``csrc/carafe.h`` the kernels' contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import omniops._C as _C
from omniops.backends import memory_format, prepared, strides
from omniops.backends.cpu._dtypes import DTYPES

Run = Callable[..., Tensor]


@prepared
def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int) -> Run:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    shape = (*features.shape[:2], *masks.shape[2:])
    return _prepare(_C.carafe, features, shape, (*features.shape, kernel_size, group_size, scale_factor, stride))


@prepared
def carafe_backward(
    grad: Tensor, features: Tensor | None, masks: Tensor | None, height: int, width: int, *sizes: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The gradients of features, which take ``masks``, and of masks; without elements where None was given."""
    by_features = None if masks is None else carafe_backward_features.prepare(grad, masks, height, width, *sizes)
    by_masks = None if features is None else carafe_backward_masks.prepare(grad, features, *sizes)

    def run(grad: Tensor, features: Tensor | None, masks: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        return (
            grad.new_empty(0) if by_features is None else by_features(grad, masks),
            grad.new_empty(0) if by_masks is None else by_masks(grad, features),
        )

    return run


@prepared
def carafe_backward_features(
    grad: Tensor,
    masks: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> Run:
    """(N, C, H*s/t, W*s/t), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H, W)."""
    shape = (*grad.shape[:2], height, width)
    return _prepare(_C.carafe_backward_features, grad, shape, (*shape, kernel_size, group_size, scale_factor, stride))


@prepared
def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Run:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    n, _, height, width = grad.shape
    shape = (n, group_size * kernel_size**2, height, width)
    sizes = (*features.shape, kernel_size, group_size, scale_factor, stride)
    return _prepare(_C.carafe_backward_masks, grad, shape, sizes)


def _prepare(kernel: Callable[..., None], first: Tensor, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Run:
    """Call ``kernel`` with both arguments dense in the memory format of the first, which the result has too."""
    layout = memory_format(first)
    out_strides = strides(shape, layout)
    arguments = (DTYPES[first.dtype], layout == torch.channels_last, *sizes)

    def run(first: Tensor, second: Tensor, *_: Any) -> Tensor:
        out = first.new_empty_strided(shape, out_strides)
        first, second = first.contiguous(memory_format=layout), second.contiguous(memory_format=layout)
        kernel(first.data_ptr(), second.data_ptr(), out.data_ptr(), *arguments, torch.get_num_threads())
        return out

    return run
