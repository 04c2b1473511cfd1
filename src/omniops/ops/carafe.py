"""CARAFE: content-aware reassembly of features (Wang et al., ICCV 2019, arXiv:1905.02188).

One operator serves CARAFE's upsampling and the downsampling of CARAFE++ (arXiv:2012.04733). The features are visited
at *centres*, every ``stride`` pixels, ceil(H / stride) x ceil(W / stride) of them, and each centre gives a block of
``scale_factor`` x ``scale_factor`` results. With g = c // (C / G), p = k // 2, s = scale_factor, t = stride:

    out[n, c, i, j] = sum over u, v of masks[n, g*k*k + u*k + v, i, j] * features[n, c, i//s*t + u - p, j//s*t + v - p]

and zero outside the map. Upsampling has t = 1, downsampling s = 1.

The form sum(grad * out) is linear in features, masks and grad, and the three operators here are its three partial
derivatives. So the derivative of each is made of the other two, and gradients of any order need no further kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omniops.ops import _checks
from omniops.ops._library import Result, define, without_autocast


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Upsample by content-aware reassembly, as ``mmcv.ops.carafe``.

    Each result is a weighted sum of the ``kernel_size`` x ``kernel_size`` features around the one it lies in, with
    weights of its own: ``masks``, usually softmax-normalised over the kernel. Differentiable in both to any order.

    Args:
        features: (N, C, H, W), float64, float32, float16 or bfloat16, in any memory layout.
        masks: (N, group_size * kernel_size**2, H * scale_factor, W * scale_factor), of the same dtype and device.
        kernel_size: the side k of the reassembly kernel, odd.
        group_size: the number G of channel groups, each with masks of its own; divides C.
        scale_factor: the upsampling factor s, at least 1.

    Returns:
        (N, C, H * scale_factor, W * scale_factor), in the dtype and memory format of ``features``. float16 and
        bfloat16 accumulate in float32. Under autocast inputs other than float64 are cast to its dtype.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, number or device.
    """
    _checks.tensor(features=features, masks=masks)
    sizes = _checks.integer(kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    result: Tensor = _carafe(features, masks, *sizes, 1)
    return result


carafe_naive = carafe
"""mmcv's other name of the same operator."""


def carafe_downsample(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, stride: int) -> Tensor:
    """Downsample by content-aware reassembly, as CARAFE++ does (arXiv:2012.04733).

    Each result is a weighted sum of the ``kernel_size`` x ``kernel_size`` features around every ``stride``-th pixel,
    placed as a convolution with that stride and padding ``kernel_size // 2`` places them.

    Args:
        features: (N, C, H, W), float64, float32, float16 or bfloat16, in any memory layout.
        masks: (N, group_size * kernel_size**2, ceil(H / stride), ceil(W / stride)), of the same dtype and device.
        kernel_size: the side k of the reassembly kernel, odd.
        group_size: the number G of channel groups, each with masks of its own; divides C.
        stride: the downsampling factor, at least 1.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), in the dtype and memory format of ``features``.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, number or device.
    """
    _checks.tensor(features=features, masks=masks)
    kernel_size, group_size, stride = _checks.integer(kernel_size=kernel_size, group_size=group_size, stride=stride)
    result: Tensor = _carafe(features, masks, kernel_size, group_size, 1, stride)
    return result


def _check_sizes(channels: str, c: int, kernel_size: int, group_size: int, scale_factor: int, stride: int) -> None:
    _checks.integer(kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor, stride=stride)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if c % group_size != 0:
        raise ValueError(f"group_size must divide the {c} channels of {channels}, got {group_size}")


def _upsampled(height: int, width: int, scale_factor: int, stride: int) -> tuple[int, int]:
    """The resolution of the result: scale_factor for each centre, one centre every stride pixels.

    Written as convolutions have it, so that torch.export sees the equality with the size of a strided convolution.
    """
    return ((height - 1) // stride + 1) * scale_factor, ((width - 1) // stride + 1) * scale_factor


def _masks_in_words(scale_factor: int, stride: int) -> str:
    return f"(N, group_size * kernel_size**2, {_size_in_words(scale_factor, stride)})"


def _result_in_words(scale_factor: int, stride: int) -> str:
    return f"(N, C, {_size_in_words(scale_factor, stride)})"


def _size_in_words(scale_factor: int, stride: int) -> str:
    """The resolution in the arguments that the caller gave: of carafe, of carafe_downsample, or of both at once."""
    centres = ("H", "W") if stride == 1 else ("ceil(H / stride)", "ceil(W / stride)")
    blocks = "" if scale_factor == 1 and stride != 1 else " * scale_factor"
    return ", ".join(f"{size}{blocks}" for size in centres)


def _carafe_result(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> list[Result]:
    _checks.four_dimensional(features=features, masks=masks)
    _checks.alike(features=features, masks=masks)
    n, c, h, w = features.shape
    _check_sizes("features", c, kernel_size, group_size, scale_factor, stride)
    height, width = _upsampled(h, w, scale_factor, stride)
    _checks.shape(
        "masks", masks, (n, group_size * kernel_size**2, height, width), _masks_in_words(scale_factor, stride)
    )
    return [Result((n, c, height, width), like=features)]


def _backward_features_result(
    grad: Tensor,
    masks: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> list[Result]:
    _checks.four_dimensional(grad=grad, masks=masks)
    _checks.alike(grad=grad, masks=masks)
    n, c = grad.shape[:2]
    _check_sizes("grad", c, kernel_size, group_size, scale_factor, stride)
    result = _upsampled(height, width, scale_factor, stride)
    _checks.shape("grad", grad, (n, c, *result), _result_in_words(scale_factor, stride))
    _checks.shape("masks", masks, (n, group_size * kernel_size**2, *result), _masks_in_words(scale_factor, stride))
    return [Result((n, c, height, width), like=grad)]


def _backward_masks_result(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> list[Result]:
    _checks.four_dimensional(grad=grad, features=features)
    _checks.alike(grad=grad, features=features)
    n, c, h, w = features.shape
    _check_sizes("features", c, kernel_size, group_size, scale_factor, stride)
    height, width = _upsampled(h, w, scale_factor, stride)
    _checks.shape("grad", grad, (n, c, height, width), _result_in_words(scale_factor, stride))
    return [Result((n, group_size * kernel_size**2, height, width), like=grad)]


_carafe = define(
    "carafe(Tensor features, Tensor masks, int kernel_size, int group_size, int scale_factor, int stride) -> Tensor",
    file="carafe",
    results=_carafe_result,
    autocast=True,
)
_backward_features = define(
    "carafe_backward_features(Tensor grad, Tensor masks, SymInt height, SymInt width, "
    "int kernel_size, int group_size, int scale_factor, int stride) -> Tensor",
    file="carafe",
    results=_backward_features_result,
)
_backward_masks = define(
    "carafe_backward_masks(Tensor grad, Tensor features, "
    "int kernel_size, int group_size, int scale_factor, int stride) -> Tensor",
    file="carafe",
    results=_backward_masks_result,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *sizes = inputs
    ctx.save_for_backward(
        first if ctx.needs_input_grad[1] else None,
        second if ctx.needs_input_grad[0] else None,
    )
    ctx.sizes = sizes[-4:]


def _save_features(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, output)
    ctx.resolution = inputs[0].shape[-2:]


def _save_second_features(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, output)
    ctx.resolution = inputs[1].shape[-2:]


# In each formula below one of features, masks and grad is the operator's result, so its cotangent stands in its place.
# A derivative has the dtypes of what it is the derivative of, also where it is taken under autocast.


def _again(features: Tensor, masks: Tensor, sizes: Any) -> Tensor:
    with without_autocast(features):
        result: Tensor = _carafe(features, masks, *sizes)
    return result


def _carafe_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    features, masks = ctx.saved_tensors
    return (
        None if masks is None else _backward_features(grad, masks, *ctx.resolution, *ctx.sizes),
        None if features is None else _backward_masks(grad, features, *ctx.sizes),
        *(None,) * 4,
    )


def _backward_features_backward(ctx: Any, features: Tensor) -> tuple[Any, ...]:
    grad, masks = ctx.saved_tensors
    return (
        None if masks is None else _again(features, masks, ctx.sizes),
        None if grad is None else _backward_masks(grad, features, *ctx.sizes),
        *(None,) * 6,
    )


def _backward_masks_backward(ctx: Any, masks: Tensor) -> tuple[Any, ...]:
    grad, features = ctx.saved_tensors
    return (
        None if features is None else _again(features, masks, ctx.sizes),
        None if grad is None else _backward_features(grad, masks, *ctx.resolution, *ctx.sizes),
        *(None,) * 4,
    )


torch.library.register_autograd(_carafe, _carafe_backward, setup_context=_save_features)
torch.library.register_autograd(_backward_features, _backward_features_backward, setup_context=_save)
torch.library.register_autograd(_backward_masks, _backward_masks_backward, setup_context=_save_second_features)
