"""CARAFE in C++; ``omniops.ops.carafe`` has the formula, ``csrc/carafe.h`` the kernels' contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import omniops._C as _C
from omniops.backends import empty, memory_format
from omniops.backends.cpu._dtypes import DTYPES


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    out = empty((*features.shape[:2], *masks.shape[2:]), like=features)
    sizes = (*features.shape, kernel_size, group_size, scale_factor, stride)
    return _run(_C.carafe, features, masks, out, sizes)


def carafe_backward(
    grad: Tensor,
    features: Tensor | None,
    masks: Tensor | None,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of features, which take ``masks``, and of masks; without elements where None was given."""
    sizes = (kernel_size, group_size, scale_factor, stride)
    return (
        grad.new_empty(0) if masks is None else carafe_backward_features(grad, masks, height, width, *sizes),
        grad.new_empty(0) if features is None else carafe_backward_masks(grad, features, *sizes),
    )


def carafe_backward_features(
    grad: Tensor,
    masks: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H, W)."""
    out = empty((*grad.shape[:2], height, width), like=grad)
    sizes = (*out.shape, kernel_size, group_size, scale_factor, stride)
    return _run(_C.carafe_backward_features, grad, masks, out, sizes)


def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    n, _, height, width = grad.shape
    out = empty((n, group_size * kernel_size**2, height, width), like=grad)
    sizes = (*features.shape, kernel_size, group_size, scale_factor, stride)
    return _run(_C.carafe_backward_masks, grad, features, out, sizes)


def _run(kernel: Callable[..., None], first: Tensor, second: Tensor, out: Tensor, sizes: tuple[Any, ...]) -> Tensor:
    """Call ``kernel`` with both arguments dense in the memory format of the first, which the result has too."""
    layout = memory_format(first)
    first = first.contiguous(memory_format=layout)
    second = second.contiguous(memory_format=layout)
    kernel(
        first.data_ptr(),
        second.data_ptr(),
        out.data_ptr(),
        DTYPES[first.dtype],
        layout == torch.channels_last,
        *sizes,
        torch.get_num_threads(),
    )
    return out
