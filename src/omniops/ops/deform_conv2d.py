"""Deformable convolution: DCNv1 (Dai et al., arXiv:1703.06211) and, with a mask, DCNv2 (Zhu et al., arXiv:1811.11168).

With K = kernel height * kernel width taps t = (u, v), G weight groups and D offset groups, d = c // (C / D):

    y = i * stride - padding + u * dilation + offset[n, (d*K + t)*2, i, j]          (x alike, from the next channel)
    column[n, c, t, i, j] = mask[n, d*K + t, i, j] * bilinear(input[n, c], y, x)
    out[n, o, i, j] = bias[o] + sum over the channels c of o's group and t of weight[o, c, t] * column[n, c, t, i, j]

``bilinear`` takes the pixels outside the map as zero. An infinite position lies outside, and all its derivatives are 0,
where torchvision's kernel for CPUs has NaN in the gradient of the offset; a position that is not a number makes the
sample so. Where a position is whole, the derivative by it is the one to the right, as in torchvision.

The backward operator is a plain function of its arguments too, and its own derivative is autograd's, through the
reference kernel: that keeps the samples of every tap, so that memory for the second derivative has no bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated
from omniops.backends.reference import deform_conv2d as reference
from omniops.ops import _checks, _torchscript
from omniops.ops._batch import Batch
from omniops.ops._library import (
    Derivative,
    Result,
    below_autograd,
    call,
    define,
    differentiate,
    reference_gradients,
    reference_tangents,
    saved_tensors,
    total,
)
from omniops.ops._torchscript import is_scripting, is_tracing


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve with taps moved by ``offset`` and weighted by ``mask``: ``torchvision.ops.deform_conv2d``.

    mmcv's function of the same name has other arguments, in the order (input, offset, weight, stride, padding,
    dilation, groups, deform_groups): give these by name, the numbers of groups not at all. In TorchScript two numbers
    are a tuple.

    Differentiable in every tensor, to any order, in reverse and forward mode and under the transforms of
    ``torch.func``; beyond the first order memory grows with the batch, to some hundreds of times the input for 3x3
    taps. At infinite offsets the gradient of the offset is 0 (on CPUs torchvision's is NaN).
    On NVIDIA GPUs the gradient of ``input`` is summed in any order, in a fixed one under
    ``torch.use_deterministic_algorithms(True)``.

    The numbers of groups follow from the shapes: G = C / weight.shape[1] weight groups, and
    D = offset.shape[1] / (2 * kh * kw) offset groups. G divides C and C_out, D divides C.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16, in any memory layout.
        offset: (N, D * kh * kw * 2, H_out, W_out): for each offset group and tap, in row-major order, the tap's
            displacement (dy, dx) in pixels.
        weight: (C_out, C / G, kh, kw).
        bias: (C_out,) or None.
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal). As in
            ``torch.nn.functional.conv2d`` also "valid", which is 0, and "same", where the stride is 1: then the result
            has the size of the input, and of an odd number of zeros the one more is below and on the right.
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        mask: (N, D * kh * kw, H_out, W_out), the factor of each sample (DCNv2), or None (DCNv1).

    Returns:
        (N, C_out, H_out, W_out) in the dtype and memory format of ``input``, where
        H_out = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1. float16 and bfloat16 accumulate in float32,
        within a chunk of the batch where that is taken in several.
        Under autocast tensors other than float64 are cast to its dtype.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, number or device. C is at least 1, and so are H and W unless N is 0.

    Example:
        >>> x, weight = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3)
        >>> offset, mask = torch.randn(1, 2 * 9, 8, 8), torch.rand(1, 9, 8, 8)
        >>> omniops.deform_conv2d(x, offset, weight, padding=1, mask=mask).shape
        torch.Size([1, 6, 8, 8])
    """
    if is_scripting():  # TorchScript compiles nothing below
        return _torchscript.convolve(input, offset, weight, bias, stride, padding, dilation, mask)
    _check_tensors(input, offset, weight, bias, mask)
    strides, dilations = _checks.pair("stride", stride), _checks.pair("dilation", dilation)
    input, paddings = _padded(input, weight, padding, strides, dilations)
    result: Tensor = call(_deform_conv2d, input, offset, weight, bias, mask, strides, paddings, dilations)
    return result


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """``deform_conv2d`` with a mask, with the arguments of ``mmcv.ops.modulated_deform_conv2d`` in mmcv's order.

    The numbers of groups are given, and must agree with the shapes, from which ``deform_conv2d`` infers them.

    Args:
        input: (N, C, H, W), as for ``deform_conv2d``.
        offset: (N, deform_groups * kh * kw * 2, H_out, W_out).
        mask: (N, deform_groups * kh * kw, H_out, W_out).
        weight: (C_out, C / groups, kh, kw).
        bias: (C_out,) or None.
        stride: as for ``deform_conv2d``.
        padding: as for ``deform_conv2d``.
        dilation: as for ``deform_conv2d``.
        groups: the number of weight groups.
        deform_groups: the number of offset groups.

    Returns:
        (N, C_out, H_out, W_out), as ``deform_conv2d``.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, number or device.

    Example:
        >>> x, weight = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3)
        >>> offset, mask = torch.randn(1, 2 * 9, 8, 8), torch.rand(1, 9, 8, 8)
        >>> omniops.modulated_deform_conv2d(x, offset, mask, weight, padding=1).shape
        torch.Size([1, 6, 8, 8])
    """
    if not is_scripting():
        _checks.tensor(input=input, offset=offset, mask=mask, weight=weight)
        groups, deform_groups = _checks.integer(groups=groups, deform_groups=deform_groups)
        _checks.four_dimensional(input=input, offset=offset, weight=weight)
    if not is_tracing():  # to which sizes are tensors
        _check_groups(input, offset, weight, groups, deform_groups)
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def _check_tensors(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    _checks.tensor(input=input, offset=offset, weight=weight)
    if bias is not None:
        _checks.tensor(bias=bias)
    if mask is not None:
        _checks.tensor(mask=mask)


def _check_groups(input: Tensor, offset: Tensor, weight: Tensor, groups: int, deform_groups: int) -> None:
    """Raise ValueError where the numbers of groups are not those of the shapes."""
    if weight.shape[1] * groups != input.shape[1]:
        raise ValueError(
            f"weight must have shape (C_out, C / groups, kh, kw) with groups {groups} and the {input.shape[1]} "
            f"channels of input, got {_torchscript.shape_of(weight)}"
        )
    taps = weight.shape[2] * weight.shape[3]
    if offset.shape[1] != deform_groups * 2 * taps:
        raise ValueError(
            f"offset must have deform_groups * kh * kw * 2 = {deform_groups * 2 * taps} channels, got {offset.shape[1]}"
        )


def _padded(
    input: Tensor, weight: Tensor, padding: Any, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The padding as a number for each axis, and the input, with the zeros of "same" that only one side has."""
    if not isinstance(padding, str):
        return input, _checks.pair("padding", padding)
    if padding not in ("valid", "same"):
        raise ValueError(f"padding must be 'valid', 'same', an int or two, got {padding!r}")
    if padding == "valid":
        return input, [0, 0]
    _checks.four_dimensional(input=input, weight=weight)
    _check_numbers(stride, (0, 0), dilation)
    if tuple(stride) != (1, 1):
        raise ValueError(f"stride must be 1 with padding='same', got {tuple(stride)}")
    kernel_size = _torchscript.sizes(weight)[2:] if is_tracing() else weight.shape[2:]
    height, width = (dilation[i] * (kernel_size[i] - 1) for i in (0, 1))
    if height % 2 or width % 2:
        # A sample between the last pixel and such a zero is what it is between that pixel and the outside.
        input = F.pad(input, (0, width % 2, 0, height % 2))
    return input, [height // 2, width // 2]


def _check_numbers(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    for name, numbers, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(numbers) != 2:
            raise ValueError(f"{name} must be a number or two, got {len(numbers)}")
        for number in numbers:
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {tuple(numbers)}")


def _result_size(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """H_out and W_out; raises for numbers that allow none."""
    _check_numbers(stride, padding, dilation)
    sizes = []
    for i, axis in enumerate(("height", "width")):
        span = dilation[i] * (kernel_size[i] - 1) + 1
        padded = input.shape[2 + i] + 2 * padding[i]
        if padded < span:
            raise ValueError(
                f"input must have a {axis} of at least {span - 2 * padding[i]} for weight's kernel of "
                f"{tuple(kernel_size)}, dilation {tuple(dilation)} and padding {tuple(padding)}, "
                f"got shape {tuple(input.shape)}"
            )
        sizes.append((padded - span) // stride[i] + 1)
    return sizes[0], sizes[1]


def _check(
    input: Tensor,
    offset: Tensor,
    kernel_size: Sequence[int],
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """What forward and backward ask of input, offset and mask; returns H_out and W_out."""
    _checks.four_dimensional(input=input, offset=offset)
    n, c, h, w = input.shape
    if c == 0 or (n != 0 and 0 in (h, w)):
        raise ValueError(f"input must have at least one channel and one pixel, got shape {tuple(input.shape)}")
    taps = kernel_size[0] * kernel_size[1]
    if taps == 0:
        raise ValueError(f"weight must have a kernel of at least one tap, got {tuple(kernel_size)}")
    height, width = _result_size(input, kernel_size, stride, padding, dilation)
    groups = offset.shape[1] // (2 * taps)
    if groups == 0 or offset.shape[1] % (2 * taps) != 0 or c % groups != 0:
        raise ValueError(
            f"offset must have 2 * {taps} channels for each offset group, and a number of offset groups that divides "
            f"the {c} channels of input, got {offset.shape[1]} channels"
        )
    _checks.shape("offset", offset, (n, 2 * taps * groups, height, width), "(N, D * kh * kw * 2, H_out, W_out)")
    if mask is not None:
        _checks.shape("mask", mask, (n, taps * groups, height, width), "(N, D * kh * kw, H_out, W_out)")
    return height, width


def _check_weight(input: Tensor, weight: Tensor) -> None:
    c, (c_out, per_group) = input.shape[1], weight.shape[:2]
    if per_group == 0 or c % per_group != 0 or c_out % (c // per_group) != 0:
        raise ValueError(
            f"weight must have shape (C_out, C / G, kh, kw) with a number of groups G that divides both C_out and the "
            f"{c} channels of input, got {tuple(weight.shape)}"
        )


def _forward_results(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Result]:
    _checks.alike(**_checks.not_none(input=input, offset=offset, weight=weight, bias=bias, mask=mask))
    _checks.four_dimensional(input=input, offset=offset, weight=weight)
    height, width = _check(input, offset, weight.shape[2:], mask, stride, padding, dilation)
    _check_weight(input, weight)
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[0],), "(C_out,)")
    return [Result((input.shape[0], weight.shape[0], height, width), like=input)]


def _backward_results(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Result]:
    _checks.alike(**_checks.not_none(grad=grad, input=input, offset=offset, weight=weight, mask=mask))
    _checks.four_dimensional(grad=grad, weight=weight)
    height, width = _check(input, offset, weight.shape[2:], mask, stride, padding, dilation)
    _check_weight(input, weight)
    _checks.shape("grad", grad, (input.shape[0], weight.shape[0], height, width), "(N, C_out, H_out, W_out)")
    if len(output_mask) != 5:
        raise ValueError(f"output_mask must be five bools, got {len(output_mask)}")
    if output_mask[4] and mask is None:
        raise ValueError("output_mask must not ask for the gradient of mask, as there is none")
    results = [Result(input.shape, like=input), Result(offset.shape, like=offset), Result(weight.shape, like=weight)]
    results += [
        Result((weight.shape[0],), like=grad),
        Result((0,) if mask is None else mask.shape, like=offset if mask is None else mask),
    ]
    return [result if wanted else Result((0,), like=grad) for result, wanted in zip(results, output_mask, strict=True)]


def _flops(input: Tensor, offset: Tensor, weight: Tensor, *_: Any) -> int:
    """As many as of the convolution of the samples, which are not counted themselves, as the bias is not."""
    return 2 * weight.numel() * offset.shape[0] * offset.shape[2] * offset.shape[3]


def _backward_flops(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *numbers: Any
) -> int:
    """Those of the convolution once for the gradients of the samples, once for that of the weight, where wanted."""
    by_input, by_offset, by_weight, _, by_mask = numbers[-1]
    return _flops(input, offset, weight) * (bool(by_input or by_offset or by_mask) + bool(by_weight))


_deform_conv2d = define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor",
    file="deform_conv2d",
    results=_forward_results,
    flops=_flops,
    autocast=True,
    batch=Batch(shared=("weight", "bias")),
)
_deform_conv2d_backward = define(
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
    "int[] stride, int[] padding, int[] dilation, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    file="deform_conv2d",
    results=_backward_results,
    flops=_backward_flops,
    batch=Batch(shared=("weight",), sums=(2, 3), wanted=lambda *args: args[-1]),
)
"""The gradients of input, offset, weight, bias and mask; those that output_mask is False for are of no elements."""


class DeformConv2dFunction(Derivative):
    """The derivative of deform_conv2d, for autograd."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Tensor:
        """Run the operator."""
        DeformConv2dFunction.keep(ctx, *args)
        result: Tensor = below_autograd(_deform_conv2d, keyset, *args)
        return result

    @staticmethod
    def keep(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        *numbers: Sequence[int],
    ) -> None:
        """Keep all tensors but the bias."""
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.numbers = numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Give the gradients of input, offset, weight, bias and mask."""
        wanted = ctx.needs_input_grad[1:6]
        gradients = call(_deform_conv2d_backward, grad, *saved_tensors(ctx), *ctx.numbers, wanted)
        gradients = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
        return None, *gradients, None, None, None


class DeformConv2dBackwardFunction(Derivative):
    """The derivative of deform_conv2d_backward: autograd's, of its reference kernel."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        """Run the operator."""
        DeformConv2dBackwardFunction.keep(ctx, *args)
        results: tuple[Tensor, ...] = below_autograd(_deform_conv2d_backward, keyset, *args)
        return results

    @staticmethod
    def keep(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        *numbers: Sequence[int],
    ) -> None:
        """Keep all tensors."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, input, offset, weight, mask)
        ctx.numbers = numbers

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Give the gradients of grad, input, offset, weight and mask."""

        def kernel(*tensors: Any) -> tuple[Tensor, ...]:
            return reference.deform_conv2d_backward(*tensors, *ctx.numbers)

        found = reference_gradients(ctx, kernel, ctx.needs_input_grad[1:6], cotangents)
        return None, *found, *(None,) * len(ctx.numbers)


def _tangents(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The result is linear in each tensor but the offset."""
    input, offset, weight, _, mask, *numbers = primals
    by_input, by_offset, by_weight, by_bias, by_mask, *_ = tangents
    terms = []
    if by_input is not None:
        terms.append(_deform_conv2d(by_input, offset, weight, None, mask, *numbers))
    if by_weight is not None:
        terms.append(_deform_conv2d(input, offset, by_weight, by_bias, mask, *numbers))
    elif by_bias is not None:
        terms.append(by_bias[:, None, None].expand(offset.shape[0], -1, *offset.shape[2:]))
    if by_mask is not None:
        terms.append(_deform_conv2d(input, offset, weight, None, by_mask, *numbers))
    if by_offset is not None:
        terms.append(_tangent_of_offset(input, offset, weight, mask, numbers, by_offset))
    return [total(terms)]


def _tangent_of_offset(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, numbers: Sequence[Any], by_offset: Tensor
) -> Tensor:
    """Between two rows a sample's derivative by y is that in the lower row less that in the upper one; alike for x.

    Half precision would round these before the difference.
    """
    wide, kernels = accumulated(input), accumulated(weight)
    positions, moves = (accumulated(x).unflatten(1, (-1, 2)).unbind(2) for x in (offset, by_offset))
    terms = []
    for axis in (0, 1):
        factors = moves[axis] if mask is None else moves[axis] * accumulated(mask)
        for step, signed in ((1, factors), (0, -factors)):
            pair = list(positions)
            pair[axis] = positions[axis].floor() + step
            terms.append(_deform_conv2d(wide, torch.stack(pair, 2).flatten(1, 2), kernels, None, signed, *numbers))
    tangent: Tensor = sum(terms[1:], terms[0]).to(input.dtype)
    return tangent


def _backward_tangents(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    return reference_tangents(reference.deform_conv2d_backward, primals, tangents)


differentiate(_deform_conv2d, DeformConv2dFunction, _tangents)
differentiate(_deform_conv2d_backward, DeformConv2dBackwardFunction, _backward_tangents)
