"""Deformable convolution for selftest and bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends.reference import deform_conv2d as kernels
from omniops.benchmarking.contenders import BOTH, FORWARD, OURS, Contender, Shape, contender
from omniops.benchmarking.goals import Goal, TimeGoal
from omniops.benchmarking.timing import CALL, GRAPH, HOST
from omniops.cli.cases._check import Check, in_layout
from omniops.ops.deform_conv2d import deform_conv2d

NAME = "deform_conv2d"
IN_TF32 = True

_Pair = tuple[int, int]


def checks() -> Iterator[Check]:
    """Odd sizes, both kinds of groups, numbers that differ along the axes, with and without mask and bias, layouts, and
    the channels that each forward of CUDA is for: in runs of 16 and 32, in runs of 4, and 128 of one offset group."""
    yield _check((2, 8, 9, 11), 6)
    yield _check((2, 8, 9, 11), 6, masked=False)
    yield _check((1, 12, 17, 23), 16, groups=4, offset_groups=2, layout="channels_last")
    yield _check((2, 12, 7, 10), 9, groups=3, offset_groups=4, stride=(2, 1), bias=False)
    yield _check((1, 6, 13, 8), 10, kernel_size=(5, 3), stride=(1, 2), padding=(3, 0), dilation=(2, 1), groups=2)
    yield _check((2, 10, 8, 12), 5, kernel_size=(1, 4), padding=(0, 3), dilation=(1, 2), offset_groups=5)
    yield _check((1, 64, 14, 19), 64, offset_groups=16)
    yield _check((2, 64, 9, 7), 72, groups=2, offset_groups=2, layout="channels_last")
    yield _check((1, 96, 7, 11), 20, groups=2, offset_groups=3, masked=False)
    yield _check((1, 128, 7, 9), 80)
    yield _check((1, 40, 33, 47), 24, kernel_size=(1, 1), padding=(0, 0), masked=False, layout="channels_last")
    yield _check((3, 9, 10, 7), 12, groups=3, offset_groups=9, dilation=(2, 3), padding=(2, 3), layout="transposed")
    yield _check((1, 5, 1, 1), 7)


def _check(
    shape: Shape,
    c_out: int,
    *,
    kernel_size: _Pair = (3, 3),
    stride: _Pair = (1, 1),
    padding: _Pair = (1, 1),
    dilation: _Pair = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
    masked: bool = True,
    bias: bool = True,
    layout: str = "contiguous",
) -> Check:
    n, c, h, w = shape
    taps = offset_groups * kernel_size[0] * kernel_size[1]
    size = [
        (length + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i, length in enumerate((h, w))
    ]
    generator = torch.Generator().manual_seed(h * w + c)
    sizes = {"input": shape, "offset": (n, 2 * taps, *size), "weight": (c_out, c // groups, *kernel_size)}
    if bias:
        sizes["bias"] = (c_out,)
    if masked:
        sizes["mask"] = (n, taps, *size)
    inputs = {name: torch.randn(size, dtype=torch.float64, generator=generator) for name, size in sizes.items()}
    # Odd sixteenths up to 3 pixels: exact in every dtype, and no sample is at an integer position, where the last digit
    # of its position would decide on its derivative.
    moves = torch.randint(-24, 24, sizes["offset"], generator=generator)
    inputs["offset"] = (2 * moves + 1).double() / 16
    inputs = {name: in_layout(tensor, layout) if tensor.dim() == 4 else tensor for name, tensor in inputs.items()}
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    words = [f"k{_digits(kernel_size)}", f"G{groups}", f"D{offset_groups}"]
    words += [f"{name[0]}{_digits(pair)}" for name, pair in numbers.items() if pair != (1, 1)]
    words += [f"no {name}" for name in ("bias", "mask") if name not in inputs]
    words += [layout] if layout != "contiguous" else []
    label = f"{shape} to {c_out} {' '.join(words)}"
    return Check(label, _with_names(deform_conv2d, inputs, numbers), _with_names(_oracle, inputs, numbers), inputs)


def _digits(pair: _Pair) -> str:
    return "x".join(map(str, dict.fromkeys(pair)))


def _with_names(function: Callable[..., Tensor], names: Any, numbers: dict[str, _Pair]) -> Callable[..., Tensor]:
    """The function, of tensors in the order of their names."""
    order = tuple(names)
    return lambda *tensors: function(**dict(zip(order, tensors, strict=True)), **numbers)


def _oracle(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **numbers: _Pair,
) -> Tensor:
    return kernels.deform_conv2d(input, offset, weight, bias, mask, **numbers)


# N, C, H, W, and the number of offset groups where it is not 1. C_out is C; 3x3 taps, padding 1, mask and bias.
_LARGE = (2, 256, 100, 152)
_BATCH = (8, 64, 128, 128)
_DEEP = (4, 512, 32, 32)
# Stages 3 to 5 of ResNet-50 with images of 800x1216, two of them as in training.
_RESNET = ((2, 128, 100, 152), (2, 256, 50, 76), (2, 512, 25, 38))
# BasicVSR++'s alignment of a frame.
_ALIGNMENT = (1, 64, 180, 320, 16)
_ON_CPU = (1, 256, 64, 64)
_SMALL_ON_CPU = (1, 64, 32, 32)

_TINY = (1, 64, 32, 32)
# There the kernels of _TINY would take longer than the call.
_TINY_ON_CPU = (1, 8, 8, 8)

_ON_CUDA = (_LARGE, _BATCH, _DEEP)
_ALL_ON_CUDA = (*_ON_CUDA, *_RESNET, _ALIGNMENT)
_CONV, _PEER = "conv2d", "torchvision"

GOALS = (
    Goal("forward at most 1.5x conv2d", "cuda", FORWARD, _CONV, FORWARD, 1.5, _ON_CUDA, mode=GRAPH),
    Goal("both ways at most 3x conv2d", "cuda", BOTH, _CONV, BOTH, 3, _ON_CUDA, mode=GRAPH),
    # torchvision's calls are in no graph.
    Goal("a call forward faster than torchvision", "cuda", FORWARD, _PEER, FORWARD, 1, _ALL_ON_CUDA, mode=CALL),
    Goal("a call both ways faster than torchvision", "cuda", BOTH, _PEER, BOTH, 1, _ALL_ON_CUDA, mode=CALL),
    Goal("a call forward at least 2x torchvision", "cuda", FORWARD, _PEER, FORWARD, 1 / 2, _ON_CUDA, mode=CALL),
    Goal("a call both ways at least 4x torchvision", "cuda", BOTH, _PEER, BOTH, 1 / 4, _ON_CUDA, mode=CALL),
    *(
        Goal("16 offset groups at least 2x torchvision", "cuda", way, _PEER, way, 1 / 2, (_ALIGNMENT,), mode=CALL)
        for way in (FORWARD, BOTH)
    ),
    TimeGoal("the host's forward", "cuda", FORWARD, 100, (_TINY,), HOST),
    TimeGoal("the host's both ways", "cuda", BOTH, 500, (_TINY,), HOST),
    Goal("forward in bfloat16 as in float16", "cuda", FORWARD, OURS, FORWARD, 1.05, _ON_CUDA, "bfloat16", "float16"),
    Goal("both ways in bfloat16 as in float16", "cuda", BOTH, OURS, BOTH, 1.05, _ON_CUDA, "bfloat16", "float16"),
    Goal("forward at most 2x conv2d", "cpu", FORWARD, _CONV, FORWARD, 2, (_ON_CPU,)),
    Goal("both ways at most 3x conv2d", "cpu", BOTH, _CONV, BOTH, 3, (_ON_CPU,)),
    Goal("forward at least 3x torchvision", "cpu", FORWARD, _PEER, FORWARD, 1 / 3, (_ON_CPU,)),
    Goal("both ways at least 4x torchvision", "cpu", BOTH, _PEER, BOTH, 1 / 4, (_ON_CPU,)),
    *(
        Goal(f"the host's {text} at most 3x {peer}", "cpu", way, peer, way, 3, (_TINY_ON_CPU,), mode=HOST)
        for text, way in (("forward", FORWARD), ("both ways", BOTH))
        for peer in (_CONV, _PEER)
    ),
)
"""The project's goals; they are for an H200 and two CPU threads, so only benchmarks/ judges them."""


def shapes(device_type: str, quick: bool) -> tuple[Shape, ...]:
    """The input's shapes, and the number of offset groups where it is not 1."""
    if quick:
        return ((1, 8, 12, 16, 2),)
    return (_ON_CPU, _SMALL_ON_CPU) if device_type == "cpu" else _ALL_ON_CUDA


def host_shape(device_type: str) -> Shape:
    """An input so small that its kernels take no time."""
    return _TINY_ON_CPU if device_type == "cpu" else _TINY


def traffic(shape: Shape) -> dict[str, int]:
    """Elements read and written if each were moved once: the inputs and the result; then their gradients too."""
    result = shape[0] * shape[1] * shape[2] * shape[3]
    forward = sum(tensor.numel() for tensor in _inputs(shape, torch.float32, torch.device("meta"))) + result
    return {FORWARD: forward, BOTH: 2 * forward}


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Contender]:
    """omniops, its reference kernels, and torchvision where installed; the plain convolution beside them.

    The plain convolution has neither offsets nor mask: a yardstick. Unless told otherwise PyTorch lets convolutions of
    float32 use TF32 on CUDA, but not matrix products, which omniops and torchvision go by.
    """
    inputs = _inputs(shape, dtype, device)
    yield contender(OURS, _positional(deform_conv2d), inputs)
    yield _reference(inputs)
    with suppress(ImportError, RuntimeError):  # RuntimeError where it was built for another torch
        peer = import_module("torchvision.ops").deform_conv2d
        # Its CUDA kernels run on the default stream, where no capture sees them.
        yield contender(_PEER, _positional(peer), inputs, capturable=False)
    convolution = contender(_CONV, partial(F.conv2d, padding=1), (inputs.input, inputs.weight, inputs.bias))
    yield convolution
    if device.type == "cuda" and dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        yield _without_tf32(convolution)


class _Inputs(NamedTuple):
    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> _Inputs:
    """Offsets of about a pixel, masks from 0 to 1."""
    n, c, h, w, offset_groups = (*shape, 1)[:5]
    taps = 9 * offset_groups
    return _Inputs(
        torch.randn((n, c, h, w), device=device).to(dtype),
        torch.randn((n, 2 * taps, h, w), device=device).to(dtype),
        (torch.randn((c, c, 3, 3), device=device) / (3 * c**0.5)).to(dtype),
        torch.randn(c, device=device).to(dtype),
        torch.rand((n, taps, h, w), device=device).to(dtype),
    )


def _positional(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, offset, weight, bias, mask: function(input, offset, weight, bias, padding=1, mask=mask)


def _without_tf32(convolution: Contender) -> Contender:
    def exact(call: Callable[[], object]) -> object:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            return call()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    forward_backward = None if convolution.forward_backward is None else partial(exact, convolution.forward_backward)
    return Contender(
        f"{convolution.name} without TF32", partial(exact, convolution.forward), forward_backward, on_host=False
    )


def _reference(inputs: _Inputs) -> Contender:
    input, offset, weight, _, mask = inputs
    numbers = (1, 1), (1, 1), (1, 1)
    grad = torch.randn_like(input)

    def forward() -> Tensor:
        return kernels.deform_conv2d(*inputs, *numbers)

    def forward_backward() -> tuple[Tensor, ...]:
        return (
            forward(),
            *kernels.deform_conv2d_backward_data(grad, input, offset, weight, mask, *numbers),
            kernels.deform_conv2d_backward_weight(grad, input, offset, mask, (3, 3), 1, *numbers),
            grad.sum((0, 2, 3)),
        )

    return Contender("reference kernels", forward, forward_backward, on_host=False)
