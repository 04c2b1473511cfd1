"""Deformable convolution as BasicSR compiles it, ``deform_conv_ext``, which many projects copy with its source.

The Python around it, in BasicSR and its copies as in detectron2, refuses every device but CUDA, although it could call
the compiled module on each. So its two autograd functions are changed too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniops._torch_private import as_pair
from omniops.dropin._extension import Extension
from omniops.dropin.mmcv_ext import deform_conv as mmcv_ext


def free(extension: Extension, module: ModuleType, *names: str) -> None:
    """Let these autograd functions of a module run on every device; on CUDA they stay what they are."""
    for name in names:
        if function := vars(module).get(name):
            modulated = "Modulated" in name
            forward, backward = (_modulated_forward, _modulated_backward) if modulated else (_forward, _backward)
            extension.replace(function, "forward", staticmethod(_by_device(function.forward, forward)))
            extension.replace(function, "backward", staticmethod(_by_device(function.backward, backward)))


def _by_device(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def call(ctx: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (theirs if tensor.is_cuda else ours)(ctx, tensor, *args, **kwargs)

    return call


def _forward(
    ctx: Any,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    ctx.save_for_backward(input, offset, weight)
    pairs = as_pair(stride), as_pair(padding), as_pair(dilation)
    sizes = (size for pair in (weight.shape[2:], *pairs) for size in pair)
    ctx.numbers = dict(zip(("kH", "kW", "dH", "dW", "padH", "padW", "dilationH", "dilationW"), sizes, strict=True))
    ctx.numbers |= {"group": groups, "deformable_group": deformable_groups, "im2col_step": im2col_step}
    output = input.new_empty(result_shape(input, weight, *pairs))
    mmcv_ext.deform_conv_forward(input, weight, offset, output, *_buffers(input), **ctx.numbers)
    return output


@once_differentiable
def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight = ctx.saved_tensors
    by_input = by_offset = by_weight = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        by_input, by_offset = torch.zeros_like(input), torch.zeros_like(offset)
        mmcv_ext.deform_conv_backward_input(
            input, offset, grad_output, by_input, by_offset, weight, _buffers(input)[0], **ctx.numbers
        )
    if ctx.needs_input_grad[2]:
        by_weight = torch.zeros_like(weight)
        mmcv_ext.deform_conv_backward_parameters(
            input, offset, grad_output, by_weight, *_buffers(input), **ctx.numbers, scale=1.0
        )
    return by_input, by_offset, by_weight, *(None,) * 6


def _modulated_forward(
    ctx: Any,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    ctx.save_for_backward(input, offset, mask, weight, bias)
    pairs = as_pair(stride), as_pair(padding), as_pair(dilation)
    sizes = (size for pair in (weight.shape[2:], *pairs) for size in pair)
    ctx.numbers = (*sizes, groups, deformable_groups, bias is not None)
    output = input.new_empty(result_shape(input, weight, *pairs))
    ones, columns = _buffers(input)
    bias_or_ones = ones if bias is None else bias
    mmcv_ext.modulated_deform_conv_forward(
        input, weight, bias_or_ones, ones, offset, mask, output, columns, *ctx.numbers
    )
    return output


@once_differentiable
def _modulated_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight, bias = ctx.saved_tensors
    ones, columns = _buffers(input)
    bias_or_ones = ones if bias is None else bias
    tensors = input, offset, mask, weight, bias_or_ones
    by_input, by_offset, by_mask, by_weight, by_bias = map(torch.zeros_like, tensors)
    mmcv_ext.modulated_deform_conv_backward(
        *(input, weight, bias_or_ones, ones, offset, mask, columns),
        *(by_input, by_weight, by_bias, by_offset, by_mask, grad_output, *ctx.numbers),
    )
    return by_input, by_offset, by_mask, by_weight, None if bias is None else by_bias, *(None,) * 5


def result_shape(
    input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, ...]:
    """(N, C_out, H_out, W_out); without pixels for numbers that allow none, which the kernel refuses by name."""
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), got {tuple(input.shape)}")
    sizes = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return (input.shape[0], weight.shape[0], *(max(size, 0) for size in sizes))


def _buffers(like: Tensor) -> tuple[Tensor, Tensor]:
    """What the compiled functions compute in, and ours do not need."""
    return like.new_empty(0), like.new_empty(0)


def _change_functions(extension: Extension, module: ModuleType) -> None:
    """Free the functions that call the compiled module, and give it to a module that went on without it."""
    names = [name for name in ("DeformConvFunction", "ModulatedDeformConvFunction") if _calls(module, name, extension)]
    if not names:  # another module that is called deform_conv
        return
    if not hasattr(module, extension.name):
        beside = f"{module.__name__.rpartition('.')[0]}.{extension.name}".removeprefix(".")
        extension.replace(module, extension.name, importlib.import_module(beside))
    free(extension, module, *names)


def _calls(module: ModuleType, function: str, extension: Extension) -> bool:
    """Whether a module has such an autograd function, and it calls the compiled module."""
    forward = getattr(vars(module).get(function), "forward", None)
    return inspect.isfunction(forward) and extension.name in inspect.unwrap(forward).__code__.co_names


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "deform_conv_forward": mmcv_ext.deform_conv_forward,
    "deform_conv_backward_input": mmcv_ext.deform_conv_backward_input,
    "deform_conv_backward_parameters": mmcv_ext.deform_conv_backward_parameters,
    "modulated_deform_conv_forward": mmcv_ext.modulated_deform_conv_forward,
    "modulated_deform_conv_backward": mmcv_ext.modulated_deform_conv_backward,
}

deform_conv_ext = Extension(
    ".deform_conv_ext",
    _FUNCTIONS,
    {".deform_conv": _change_functions},
    homes=("deform_conv_ext", "basicsr.ops.dcn.deform_conv_ext", "basicsr.models.ops.dcn.deform_conv_ext"),
)
"""``basicsr.ops.dcn.deform_conv_ext``, and that of the copies in other packages."""
deform_conv_cuda = Extension(
    ".deform_conv_cuda",
    {
        "deform_conv_forward_cuda": mmcv_ext.deform_conv_forward,
        "deform_conv_backward_input_cuda": mmcv_ext.deform_conv_backward_input,
        "deform_conv_backward_parameters_cuda": mmcv_ext.deform_conv_backward_parameters,
        "modulated_deform_conv_cuda_forward": mmcv_ext.modulated_deform_conv_forward,
        "modulated_deform_conv_cuda_backward": mmcv_ext.modulated_deform_conv_backward,
    },
    {".deform_conv": _change_functions},
)
"""The same with older names, as in EDVR and in what was made from MMDetection 1.0."""
