"""Multi-scale deformable attention: Deformable DETR (Zhu et al., arXiv:2010.04159).

Level l of a pyramid has H_l * W_l pixels, which are rows of ``value`` from start_l on, the pixels of the levels before.
With (x, y) the location of point k, which is one of level l's, and the sum over the points of all levels,

    out[n, q, m] = sum over k of weights[n, q, m, k] * bilinear(value_l[n, :, m], x * W_l - 0.5, y * H_l - 0.5)

``bilinear`` takes the pixels outside the map as zero, as ``grid_sample`` without aligned corners does. A location one
pixel outside of the map or farther, an infinite one too, has no derivatives, as in mmcv; one that is not a number makes
the sample so. The method "discrete" of RT-DETRv2 (arXiv:2407.17140) takes the pixel (x * W_l + 0.5, y * H_l + 0.5),
both rounded towards zero and moved to the nearest pixel of the map; it has no derivative by the location.

The backward operator is a plain function of its arguments too, and its own derivative is autograd's, through the
reference kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omniops._torch_private import version_of
from omniops.backends import accumulator
from omniops.backends.reference import multi_scale_deform_attn as reference
from omniops.ops import _checks
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
from omniops.ops._torchscript import Numbers, Pairs, attend, attend_traced, is_scripting, is_tracing

METHODS = ("default", "discrete")


def multi_scale_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Pairs,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Numbers | None = None,
    method: str = "default",
) -> Tensor:
    """Sample each level of a pyramid at some points for each query, and sum the samples weighted.

    What ``MSDeformAttnFunction`` of Deformable DETR, ``mmcv.ops.MultiScaleDeformableAttnFunction`` and
    ``MultiScaleDeformableAttention`` of transformers compute; with ``points_per_level`` what
    ``multi_scale_deformable_attention_v2`` of RT-DETRv2 and D-FINE does.

    Differentiable in every floating tensor, to any order, in reverse and forward mode and under the transforms of
    ``torch.func``. On NVIDIA GPUs the gradient of ``value`` is summed in any order, in a fixed one under
    ``torch.use_deterministic_algorithms(True)``.

    Args:
        value: (N, S, M, D), float64, float32, float16 or bfloat16: the S pixels of all levels, each level row by row,
            with D channels for each of M heads.
        spatial_shapes: for each of L levels its height and width, which make S pixels: a list of pairs, or a tensor
            (L, 2) of integers. Of a tensor on a GPU the numbers have to be read back, which waits for the GPU: once, as
            long as the same tensor is given and PyTorch has not changed it, and at each call if it is one of inference
            mode. What is written to it through ``.data`` or by another library goes unseen. ``torch.compile`` and
            ``torch.export`` cannot trace the reading; ``torch.jit`` reads at each call. Pairs are tuples there.
        sampling_locations: (N, Q, M, L, P, 2), x and y, of the dtype of ``value``, or float32 beside half precision;
            the map reaches from 0 to 1. With ``points_per_level`` (N, Q, M, K, 2), those of the first level first.
        attention_weights: (N, Q, M, L, P), or (N, Q, M, K), of the dtype of ``value``, or float32 beside half
            precision.
        points_per_level: L numbers of points, K in all, where levels have different ones.
        method: "default" samples bilinearly, "discrete" takes one pixel, as RT-DETRv2 can.

    Returns:
        (N, Q, M * D) in the dtype of ``value``. Locations and sums are in float32, in float64 for float64. Under
        autocast ``value`` is cast to its dtype, and the others to float32 unless they are of that dtype.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, number or device.

    Example:
        >>> value = torch.rand(1, 8 * 8 + 4 * 4, 2, 16)  # two levels, two heads of 16 channels
        >>> locations = torch.rand(1, 5, 2, 2, 3, 2)  # five queries, three points a level
        >>> weights = torch.rand(1, 5, 2, 2, 3)
        >>> multi_scale_deform_attn(value, [(8, 8), (4, 4)], locations, weights).shape
        torch.Size([1, 5, 32])
    """
    if is_scripting():  # TorchScript compiles nothing below
        return attend(value, spatial_shapes, sampling_locations, attention_weights, points_per_level, method)
    _checks.tensor(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    _check_method(method)
    if is_tracing():
        return attend_traced(value, spatial_shapes, sampling_locations, attention_weights, points_per_level, method)
    sizes = flat_sizes(spatial_shapes)
    points = _points(points_per_level, len(sizes) // 2, sampling_locations, attention_weights)
    result: Tensor = call(
        _multi_scale_deform_attn, value, sizes, sampling_locations, attention_weights, points, method == "discrete"
    )
    return result


_read: tuple[weakref.ref[Tensor], int, list[int]] | None = None
"""The tensor of spatial shapes that was last read from a device, its version, and what it held."""


def flat_sizes(spatial_shapes: Tensor | Sequence[Sequence[int]]) -> list[int]:
    """The heights and widths of the levels, one after another.

    Raises:
        TypeError: for what is neither a tensor of integers nor pairs of them.
        ValueError: for a wrong shape or a negative number.
    """
    if isinstance(spatial_shapes, Tensor):
        return _sizes_of_tensor(spatial_shapes)
    try:
        pairs = [(height, width) for height, width in spatial_shapes]
    except (TypeError, ValueError):
        raise TypeError(
            f"spatial_shapes must be a tensor (L, 2) of integers or pairs of height and width, got {spatial_shapes!r}"
        ) from None
    return _checks.ints("spatial_shapes", [side for pair in pairs for side in pair])


def _sizes_of_tensor(spatial_shapes: Tensor) -> list[int]:
    global _read
    _checks.tensor(spatial_shapes=spatial_shapes)
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes must have shape (L, 2), got {tuple(spatial_shapes.shape)}")
    if spatial_shapes.dtype not in _checks.INTEGERS or spatial_shapes.dtype == torch.bool:
        raise TypeError(f"spatial_shapes must be of integers, got {_checks.dtype_name(spatial_shapes)}")
    if torch.compiler.is_compiling():
        return [int(side) for pair in spatial_shapes.tolist() for side in pair]
    if spatial_shapes.is_meta:
        raise ValueError("spatial_shapes must hold numbers, got a meta tensor: give a list of pairs")
    # NumPy may have changed memory of the CPU without a new version; tensors of inference mode have no version.
    if spatial_shapes.is_cpu or spatial_shapes.is_inference():
        return _numbers(spatial_shapes)
    read, version = _read, version_of(spatial_shapes)
    if read is None or read[0]() is not spatial_shapes or read[1] != version:
        _read = read = weakref.ref(spatial_shapes), version, _numbers(spatial_shapes)
    return read[2]


def _numbers(spatial_shapes: Tensor) -> list[int]:
    return _checks.ints("spatial_shapes", [side for pair in spatial_shapes.tolist() for side in pair])


def _points(
    points_per_level: Sequence[int] | None, levels: int, sampling_locations: Tensor, attention_weights: Tensor
) -> list[int]:
    if points_per_level is None:
        return points_of_levels(levels, sampling_locations, attention_weights)
    try:
        points = list(points_per_level)
    except TypeError:
        raise TypeError(f"points_per_level must be numbers, one for each level, got {points_per_level!r}") from None
    points = _checks.ints("points_per_level", points)
    _check_points(attention_weights)
    return points


def points_of_levels(levels: int, sampling_locations: Tensor, attention_weights: Tensor) -> list[int]:
    """P of (N, Q, M, L, P) for each level; ValueError for tensors that have no axes L and P."""
    shape = tuple(attention_weights.shape)
    if len(shape) != 5 or shape[3] != levels:
        raise ValueError(
            f"attention_weights must have shape (N, Q, M, L, P) with the {levels} levels of spatial_shapes, or "
            f"points_per_level be given, got {shape}"
        )
    if tuple(sampling_locations.shape) != (*shape, 2):
        raise ValueError(
            f"sampling_locations must have shape (N, Q, M, L, P, 2) = {(*shape, 2)}, as attention_weights has, "
            f"got {tuple(sampling_locations.shape)}"
        )
    # While torch.jit traces, a size is a tensor.
    return _checks.ints("attention_weights.shape", shape[4:]) * levels


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be 'default' or 'discrete', got {method!r}")


def _check_points(attention_weights: Tensor) -> None:
    """Raise ValueError where the points of all levels are not one axis."""
    if attention_weights.dim() != 4:
        raise ValueError(f"attention_weights must have shape (N, Q, M, K), got {tuple(attention_weights.shape)}")


def _check(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
) -> tuple[int, int, int, int]:
    """Raise for wrong arguments of either operator; returns N, Q, M and D."""
    _check_dtypes(value, sampling_locations, attention_weights)
    if value.dim() != 4:
        raise ValueError(f"value must have shape (N, S, M, D), got {tuple(value.shape)}")
    if len(spatial_shapes) == 0 or len(spatial_shapes) % 2 != 0:
        raise ValueError(f"spatial_shapes must have height and width of at least one level, got {list(spatial_shapes)}")
    for name, numbers in (("spatial_shapes", spatial_shapes), ("points_per_level", points_per_level)):
        for number in numbers:
            if number < 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
    levels = len(spatial_shapes) // 2
    if len(points_per_level) != levels:
        raise ValueError(
            f"points_per_level must have a number for each of the {levels} levels of spatial_shapes, "
            f"got {list(points_per_level)}"
        )
    n, pixels, m, d = value.shape
    expected = sum(height * width for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    if pixels != expected:
        pairs = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
        raise ValueError(
            f"value must have the {expected} pixels of spatial_shapes {pairs}, got shape {tuple(value.shape)}"
        )
    if attention_weights.dim() == 5 and all(points == points_per_level[0] for points in points_per_level):
        letters, points = "N, Q, M, L, P", [levels, points_per_level[0]]
    else:
        _check_points(attention_weights)
        letters, points = "N, Q, M, K", [sum(points_per_level)]
    shape = n, attention_weights.shape[1], m, *points
    _checks.shape("attention_weights", attention_weights, shape, f"({letters})")
    _checks.shape("sampling_locations", sampling_locations, (*shape, 2), f"({letters}, 2)")
    return n, shape[1], m, d


def _check_dtypes(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """Raise where the others are neither of the dtype of value nor of that in which it is computed."""
    _checks.alike(value=value)
    computed = accumulator(value)
    for name, tensor in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if tensor.dtype == computed and tensor.device == value.device:
            continue
        _checks.alike(value=value, **{name: tensor})


def _results(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> list[Result]:
    n, queries, m, d = _check(value, spatial_shapes, sampling_locations, attention_weights, points_per_level)
    return [Result((n, queries, m * d), like=value)]


def _backward_results(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
    output_mask: Sequence[bool],
) -> list[Result]:
    n, queries, m, d = _check(value, spatial_shapes, sampling_locations, attention_weights, points_per_level)
    _checks.alike(value=value, grad=grad)
    _checks.shape("grad", grad, (n, queries, m * d), "(N, Q, M * D)")
    if len(output_mask) != 3:
        raise ValueError(f"output_mask must be three bools, got {len(output_mask)}")
    return [
        Result(tuple(tensor.shape) if wanted else (0,), like=grad, dtype=tensor.dtype if wanted else grad.dtype)
        for tensor, wanted in zip((value, sampling_locations, attention_weights), output_mask, strict=True)
    ]


def _flops(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor, *_: Any
) -> int:
    """Of the weighted sums; the samples themselves are not counted, as those of deform_conv2d are not."""
    return 2 * attention_weights.numel() * value.shape[3]


def _backward_flops(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
    output_mask: Sequence[bool],
) -> int:
    """As many for the gradient of value, and for the products with the samples, which give the others."""
    by_value, by_locations, by_weights = output_mask
    times = bool(by_value) + bool(by_locations or by_weights)
    return _flops(value, spatial_shapes, sampling_locations, attention_weights) * times


def _cast(
    dtype: torch.dtype, value: Tensor, spatial_shapes: Any, locations: Tensor, weights: Tensor, *others: Any
) -> tuple[Any, ...]:
    """For autocast: locations would lose pixels in half precision, and weights come from a softmax in float32."""
    if value.dtype == torch.float64 or not value.is_floating_point():
        return value, spatial_shapes, locations, weights, *others
    dtypes = dtype, torch.float32, torch.float64
    locations, weights = (tensor if tensor.dtype in dtypes else tensor.float() for tensor in (locations, weights))
    return value.to(dtype), spatial_shapes, locations, weights, *others


_multi_scale_deform_attn = define(
    "multi_scale_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights, SymInt[] points_per_level, bool discrete) -> Tensor",
    file="multi_scale_deform_attn",
    results=_results,
    flops=_flops,
    autocast=_cast,
)
_multi_scale_deform_attn_backward = define(
    "multi_scale_deform_attn_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights, SymInt[] points_per_level, bool discrete, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    file="multi_scale_deform_attn",
    results=_backward_results,
    flops=_backward_flops,
    batch=Batch(wanted=lambda *args: args[-1]),
)
"""The gradients of value, sampling_locations and attention_weights; those not in output_mask are of no elements."""


class MultiScaleDeformableAttnFunction(Derivative):
    """The derivative of multi_scale_deform_attn, for autograd."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Tensor:
        """Run the operator."""
        MultiScaleDeformableAttnFunction.keep(ctx, *args)
        result: Tensor = below_autograd(_multi_scale_deform_attn, keyset, *args)
        return result

    @staticmethod
    def keep(
        ctx: Any,
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        *numbers: Any,
    ) -> None:
        """Keep all tensors."""
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        ctx.numbers = spatial_shapes, *numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Give the gradients of value, sampling_locations and attention_weights."""
        value, locations, weights = saved_tensors(ctx)
        spatial_shapes, points_per_level, discrete = ctx.numbers
        _, needs_value, _, needs_locations, needs_weights, _, _ = ctx.needs_input_grad
        wanted = needs_value, needs_locations, needs_weights
        gradients = call(
            _multi_scale_deform_attn_backward,
            grad, value, spatial_shapes, locations, weights, points_per_level, discrete, wanted,
        )  # fmt: skip
        by_value, by_locations, by_weights = (x if want else None for x, want in zip(gradients, wanted, strict=True))
        return None, by_value, None, by_locations, by_weights, None, None


class MultiScaleDeformableAttnBackwardFunction(Derivative):
    """The derivative of multi_scale_deform_attn_backward: autograd's, of its reference kernel."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        """Run the operator."""
        MultiScaleDeformableAttnBackwardFunction.keep(ctx, *args)
        results: tuple[Tensor, ...] = below_autograd(_multi_scale_deform_attn_backward, keyset, *args)
        return results

    @staticmethod
    def keep(
        ctx: Any,
        grad: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        *numbers: Any,
    ) -> None:
        """Keep all tensors."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, value, sampling_locations, attention_weights)
        ctx.numbers = spatial_shapes, *numbers

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Give the gradients of grad, value, sampling_locations and attention_weights."""
        spatial_shapes, *numbers = ctx.numbers

        def kernel(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            return reference.multi_scale_deform_attn_backward(grad, value, spatial_shapes, locations, weights, *numbers)

        _, needs_grad, needs_value, _, needs_locations, needs_weights, *_ = ctx.needs_input_grad
        wanted = needs_grad, needs_value, needs_locations, needs_weights
        by_grad, by_value, by_locations, by_weights = reference_gradients(ctx, kernel, wanted, cotangents)
        return None, by_grad, by_value, None, by_locations, by_weights, *(None,) * len(numbers)


def _tangents(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The result is linear in value and in the weights; the term of the locations is the reference kernel's."""
    value, spatial_shapes, locations, weights, *numbers = primals
    by_value, _, by_locations, by_weights, *_ = tangents
    terms = []
    if by_value is not None:
        terms.append(_multi_scale_deform_attn(by_value, spatial_shapes, locations, weights, *numbers))
    if by_weights is not None:
        terms.append(_multi_scale_deform_attn(value, spatial_shapes, locations, by_weights, *numbers))
    if by_locations is not None:
        of_locations = [None, None, by_locations, *[None] * (len(primals) - 3)]
        found = reference_tangents(reference.multi_scale_deform_attn, primals, of_locations)
        terms += [x for x in found if x is not None]
    return [total(terms)]


def _backward_tangents(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    return reference_tangents(reference.multi_scale_deform_attn_backward, primals, tangents)


differentiate(_multi_scale_deform_attn, MultiScaleDeformableAttnFunction, _tangents)
differentiate(_multi_scale_deform_attn_backward, MultiScaleDeformableAttnBackwardFunction, _backward_tangents)
