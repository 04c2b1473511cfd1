"""CARAFE: content-aware reassembly of features (Wang et al., ICCV 2019, arXiv:1905.02188).

One operator serves CARAFE's upsampling and the downsampling of CARAFE++ (arXiv:2012.04733). The features are visited
at *centres*, every ``stride`` pixels, ceil(H / stride) x ceil(W / stride) of them, and each centre gives a block of
``scale_factor`` x ``scale_factor`` results. With g = c // (C / G), p = k // 2, s = scale_factor, t = stride:

    out[n, c, i, j] = sum over u, v of masks[n, g*k*k + u*k + v, i, j] * features[n, c, i//s*t + u - p, j//s*t + v - p]

and zero outside the map. Upsampling has t = 1, downsampling s = 1.

The form sum(grad * out) is linear in features, masks and grad, and the two operators here give its three partial
derivatives. So the derivative of each is made of them again, and gradients of any order need no further kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omniops.ops import _checks
from omniops.ops._batch import Batch
from omniops.ops._library import (
    Derivative,
    Result,
    below_autograd,
    call,
    define,
    differentiate,
    saved_tensors,
    total,
    without_autocast,
)
from omniops.ops._torchscript import is_scripting


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Upsample by content-aware reassembly, as ``mmcv.ops.carafe``.

    Each result is a weighted sum of the ``kernel_size`` x ``kernel_size`` features around the one it lies in, with
    weights of its own: ``masks``, usually softmax-normalised over the kernel. Differentiable in both to any order, in
    reverse and forward mode and under the transforms of ``torch.func``.

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

    Example:
        >>> features, masks = torch.randn(1, 8, 4, 4), torch.randn(1, 25, 8, 8).softmax(1)
        >>> omniops.carafe(features, masks, kernel_size=5, group_size=1, scale_factor=2).shape
        torch.Size([1, 8, 8, 8])
    """
    if is_scripting():  # TorchScript compiles nothing below
        scripted: Tensor = torch.ops.omniops.carafe(features, masks, kernel_size, group_size, scale_factor, 1)
        return scripted
    _checks.tensor(features=features, masks=masks)
    sizes = _checks.integer(kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    result: Tensor = call(_carafe, features, masks, *sizes, 1)
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

    Example:
        >>> features, masks = torch.randn(1, 8, 5, 4), torch.randn(1, 25, 3, 2).softmax(1)
        >>> omniops.carafe_downsample(features, masks, kernel_size=5, group_size=1, stride=2).shape
        torch.Size([1, 8, 3, 2])
    """
    if is_scripting():
        scripted: Tensor = torch.ops.omniops.carafe(features, masks, kernel_size, group_size, 1, stride)
        return scripted
    _checks.tensor(features=features, masks=masks)
    kernel_size, group_size, stride = _checks.integer(kernel_size=kernel_size, group_size=group_size, stride=stride)
    result: Tensor = call(_carafe, features, masks, kernel_size, group_size, 1, stride)
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


def _backward_results(
    grad: Tensor,
    features: Tensor | None,
    masks: Tensor | None,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> list[Result]:
    tensors = _checks.not_none(grad=grad, features=features, masks=masks)
    _checks.four_dimensional(**tensors)
    _checks.alike(**tensors)
    n, c = grad.shape[:2]
    _check_sizes("grad", c, kernel_size, group_size, scale_factor, stride)
    result = _upsampled(height, width, scale_factor, stride)
    _checks.shape("grad", grad, (n, c, *result), _result_in_words(scale_factor, stride))
    if features is not None:
        _checks.shape("features", features, (n, c, height, width), "(N, C, H, W)")
    masks_shape = (n, group_size * kernel_size**2, *result)
    if masks is not None:
        _checks.shape("masks", masks, masks_shape, _masks_in_words(scale_factor, stride))
    return [
        Result((0,) if masks is None else (n, c, height, width), like=grad),
        Result((0,) if features is None else masks_shape, like=grad),
    ]


def _flops(features: Tensor, masks: Tensor, kernel_size: int, *_: int) -> int:
    """Of the sums that make the result."""
    return 2 * features.shape[1] * kernel_size**2 * masks.shape[0] * masks.shape[2] * masks.shape[3]


def _backward_flops(
    grad: Tensor, features: Tensor | None, masks: Tensor | None, height: int, width: int, kernel_size: int, *_: int
) -> int:
    """As many for each gradient that is wanted as for the result."""
    return 2 * grad.numel() * kernel_size**2 * ((features is not None) + (masks is not None))


_carafe = define(
    "carafe(Tensor features, Tensor masks, int kernel_size, int group_size, int scale_factor, int stride) -> Tensor",
    file="carafe",
    results=_carafe_result,
    flops=_flops,
    autocast=True,
)
_carafe_backward = define(
    "carafe_backward(Tensor grad, Tensor? features, Tensor? masks, SymInt height, SymInt width, "
    "int kernel_size, int group_size, int scale_factor, int stride) -> (Tensor, Tensor)",
    file="carafe",
    results=_backward_results,
    flops=_backward_flops,
    batch=Batch(wanted=lambda grad, features, masks, *_: (masks is not None, features is not None)),
)
"""The gradients of features and masks. The former is of no elements without masks, the latter without features."""


class CARAFEFunction(Derivative):
    """The derivative of carafe, for autograd."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Tensor:
        """Run the operator."""
        CARAFEFunction.keep(ctx, *args)
        result: Tensor = below_autograd(_carafe, keyset, *args)
        return result

    @staticmethod
    def keep(ctx: Any, features: Tensor, masks: Tensor, *numbers: int) -> None:
        """Keep of features and masks what the gradient of the other needs."""
        _, needs_features, needs_masks, *_ = ctx.needs_input_grad
        ctx.save_for_backward(features if needs_masks else None, masks if needs_features else None)
        ctx.numbers = *features.shape[2:], *numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Give the gradients of features and masks."""
        features, masks = saved_tensors(ctx)
        by_features, by_masks = call(_carafe_backward, grad, features, masks, *ctx.numbers)
        return (
            None,
            None if masks is None else by_features,
            None if features is None else by_masks,
            *(None, None, None, None),
        )


class CARAFEBackwardFunction(Derivative):
    """The derivative of carafe_backward, for autograd.

    Its cotangents are one of features and one of masks. In each term of the form one of them stands in its place, and
    the derivative has the dtypes of what it is the derivative of, also where it is taken under autocast.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Run the operator."""
        CARAFEBackwardFunction.keep(ctx, *args)
        result: tuple[Tensor, Tensor] = below_autograd(_carafe_backward, keyset, *args)
        return result

    @staticmethod
    def keep(ctx: Any, grad: Tensor, features: Tensor | None, masks: Tensor | None, *numbers: int) -> None:
        """Keep all tensors."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, features, masks)
        ctx.numbers = numbers

    @staticmethod
    def backward(ctx: Any, by_features: Tensor | None, by_masks: Tensor | None) -> tuple[Any, ...]:
        """Give the gradients of grad, features and masks."""
        grad, features, masks = saved_tensors(ctx)
        needs_grad, needs_features, needs_masks = ctx.needs_input_grad[1:4]
        # What has no elements stands for a gradient that nobody asked for.
        by_features, by_masks = (None if masks is None else by_features), (None if features is None else by_masks)
        gradient: Tensor | None = None
        if needs_grad:
            with without_autocast(grad):
                terms = [
                    _carafe(first, second, *ctx.numbers[2:])
                    for first, second in ((by_features, masks), (features, by_masks))
                    if first is not None and second is not None
                ]
            gradient = terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else None
        needs_features, needs_masks = needs_features and by_masks is not None, needs_masks and by_features is not None
        second = (None, None)
        if needs_features or needs_masks:
            second = _carafe_backward(
                grad, by_features if needs_masks else None, by_masks if needs_features else None, *ctx.numbers
            )
        return None, gradient, second[0] if needs_features else None, second[1] if needs_masks else None, *(None,) * 6


def _tangents(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One term for each factor of the products."""
    features, masks, *numbers = primals
    by_features, by_masks, *_ = tangents
    pairs = (by_features, masks), (features, by_masks)
    terms = [_carafe(one, other, *numbers) for one, other in pairs if one is not None and other is not None]
    return [total(terms)]


def _backward_tangents(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As of carafe, for each of the two gradients."""
    grad, features, masks, *numbers = primals
    by_grad, by_features, by_masks, *_ = tangents
    terms: tuple[list[Tensor], list[Tensor]] = [], []
    for one, others in ((by_grad, (features, masks)), (grad, (by_features, by_masks))):
        if one is not None and any(other is not None for other in others):
            found = _carafe_backward(one, *others, *numbers)
            # A gradient is of no elements without the other's tensor.
            for gradient, given, factor in zip(terms, found, reversed(others), strict=True):
                if factor is not None:
                    gradient.append(given)
    return [total(terms[0]), total(terms[1])]


differentiate(_carafe, CARAFEFunction, _tangents)
differentiate(_carafe_backward, CARAFEBackwardFunction, _backward_tangents)
