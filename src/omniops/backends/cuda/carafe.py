"""CARAFE in Triton: chooses and launches the kernels; ``omniops.ops.carafe`` has the formula.

What bounds CARAFE on these GPUs is less the bytes of the device's memory than the loads through the L1 cache: with
k = 5 and s = 2 every feature takes part in a hundred products. So each kernel keeps its results in registers, walks the
k*k taps (or the channels), and shares a loaded value among as many products as the registers allow. A result belongs to
one program, whose order of summation is fixed: no atomics, the same bits every run.

``_carafe_any`` holds the kernels for every case, ``_carafe_pairs`` the faster ones of the common case,
``_carafe_launches`` chooses between them, and ``_carafe_tuning`` says how large their tiles are.

What a kernel is compiled for is the same for all sizes of map: dtypes, k, s and t, how tensors lie, whether they begin
at a multiple of 16 bytes, and what the channels of a group fill. Only beyond 2**31 elements of an image is it another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniops.backends import memory_format, prepared
from omniops.backends.cuda import _carafe_launches
from omniops.backends.cuda._carafe_launches import Settings
from omniops.backends.cuda._launch import on_device


@prepared
def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Callable[..., Tensor]:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    settings = Settings(kernel_size, group_size, scale_factor, stride)
    if _is_copied(features) or _is_copied(masks):
        run_dense = carafe.prepare(_dense(features), _dense(masks), *settings)
        return lambda features, masks, *_: run_dense(_dense(features), _dense(masks))
    out = _result((*features.shape[:2], *masks.shape[2:]), like=features)
    shape, strides = tuple(out.shape), out.stride()
    launch = _carafe_launches.forward(features, masks, out, settings)

    def run(features: Tensor, masks: Tensor, *_: int) -> Tensor:
        out = features.new_empty_strided(shape, strides)
        with on_device(features) as stream:
            launch(stream, features, masks, out)
        return out

    return run


@prepared
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
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The gradients of features, where ``masks`` is given, and of masks, where ``features`` is; else no elements."""
    settings = Settings(kernel_size, group_size, scale_factor, stride)
    if any(tensor is not None and _is_copied(tensor) for tensor in (grad, features, masks)):
        run_dense = carafe_backward.prepare(_dense(grad), _dense(features), _dense(masks), height, width, *settings)
        return lambda grad, features, masks, *_: run_dense(_dense(grad), _dense(features), _dense(masks))
    n, c, *resolution = grad.shape
    by_features = _result((n, c, height, width), like=grad)
    by_masks = _result((n, group_size * kernel_size**2, *resolution), like=grad)
    features_layout = tuple(by_features.shape), by_features.stride()
    masks_layout = tuple(by_masks.shape), by_masks.stride()
    launch_features = None if masks is None else _carafe_launches.backward_features(grad, masks, by_features, settings)
    launch_masks = None if features is None else _carafe_launches.backward_masks(grad, features, by_masks, settings)

    def run(grad: Tensor, features: Tensor | None, masks: Tensor | None, *_: int) -> tuple[Tensor, Tensor]:
        with on_device(grad) as stream:
            if masks is None or launch_features is None:
                by_features = grad.new_empty(0)
            else:
                by_features = grad.new_empty_strided(*features_layout)
                launch_features(stream, grad, masks, by_features)
            if features is None or launch_masks is None:
                by_masks = grad.new_empty(0)
            else:
                by_masks = grad.new_empty_strided(*masks_layout)
                launch_masks(stream, grad, features, by_masks)
        return by_features, by_masks

    return run


def _result(shape: Sequence[int], like: Tensor) -> Tensor:
    """A result, without memory: what is known of it before it is made."""
    layout = memory_format(like)
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta", memory_format=layout)


def _is_copied(tensor: Tensor) -> bool:
    """Whether a row spans more than the kernels' 32-bit columns reach, or repeats an element.

    The latter is the gradient of a sum. It is rare elsewhere, and would need kernels of its own.
    """
    return tensor.shape[3] * tensor.stride(3) >= 2**31 or (tensor.stride(3) == 0 and tensor.shape[3] > 1)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied where the kernels want it so."""
    return tensor.contiguous() if tensor is not None and _is_copied(tensor) else tensor
