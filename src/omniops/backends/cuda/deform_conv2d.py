"""Deformable convolution in Triton: which kernels serve a call; ``omniops.ops.deform_conv2d`` has the formula.

A forward is one of four (``_deform_forward``):
- with few output channels one kernel makes no columns: ``fused`` for offset groups of 16 channels or more, which
  share a plan of their samples, and ``narrow`` for smaller ones;
- elsewhere columns in memory and a matrix product after them were measured to be faster (docs/benchmarks.md), as the
  weights are then read fewer times: ``split_columns``, in float16, for float32 where channels allow it, else
  ``with_columns`` of the input's dtype.

The backward is in ``_deform_backward``. ``_deform_launches`` has the sizes of a call and the launches of the kernels,
which are in the files named after what they take: ``_deform_prepare`` (borders, plans, weights by tap),
``_deform_columns``, ``_deform_float16_columns``, ``_deform_fused`` and ``_deform_fused_narrow``. Positions are taken in
chunks, so that the workspace has a bound whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omniops.backends import prepared
from omniops.backends.cuda import _deform_forward as forwards
from omniops.backends.cuda._deform_backward import Backward, Gradients
from omniops.backends.cuda._deform_launches import Problem, layout_of, strides_like
from omniops.backends.cuda._float32_products import has_tf32, is_tf32


@prepared
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Callable[..., Tensor]:
    """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
    problem = Problem(input, offset, weight, mask, stride, padding, dilation)
    tensor_cores = has_tf32(input)
    if forwards.is_split(problem, tensor_cores):
        return forwards.split_columns(problem, bias)
    if forwards.is_fused(problem, tensor_cores):
        return forwards.fused(problem, bias)
    if forwards.is_narrow(problem, tensor_cores):
        return forwards.narrow(problem, bias)
    return forwards.with_columns(problem, bias, tensor_cores)


@prepared
def deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> Callable[..., Gradients]:
    """The gradients of input, offset, weight, bias and mask, of no elements where ``output_mask`` is false."""
    problem = Problem(input, offset, weight, mask, stride, padding, dilation)
    strides = [
        strides_like(argument, argument.shape) for argument in (input, offset, weight, offset if mask is None else mask)
    ]
    kept: dict[tuple[bool, bool], Backward] = {}
    is_float32 = input.dtype == torch.float32 and has_tf32(input)
    layout = tuple(grad.stride()), layout_of(grad)
    # As the one of a sum, which is a single element: copied, it is no further layout to compile the kernels for.
    is_copied = layout[1] == 0
    if is_copied:
        layout = tuple(strides_like(grad, grad.shape)), 1
    wanted = tuple(output_mask)

    def run(grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *_: Any) -> Gradients:
        switches = is_float32 and not is_tf32(), torch.are_deterministic_algorithms_enabled()
        backward = kept.get(switches)
        if backward is None:
            backward = kept.setdefault(switches, Backward(problem, wanted, strides, layout, is_float32, *switches))
        return backward(grad.contiguous() if is_copied else grad, input, offset, weight, mask)

    return run
