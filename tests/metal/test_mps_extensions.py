"""The compiled modules that omniops.enable serves, on the pretended MPS device: the CPU's results, within the rules.

Autograd does not know the pretended device, so what it computes itself runs on "meta", without values.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mps_device import mps_device
from torch import Tensor
from torch.autograd import Function

from omniops.dropin import _dcn_v2, _deform_conv, _detectron2, _multi_scale_deform_attn, _sam2

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


SHAPES, STARTS = torch.tensor([[6, 5], [3, 4]]), torch.tensor([0, 30])
PLACES = torch.rand((2, 7, 2, 2, 3, 2), generator=generator) * 1.6 - 0.3
ATTENTION = random(2, 42, 2, 4), SHAPES, STARTS, PLACES, random(2, 7, 2, 2, 3)
NUMBERS = (1, 1, 1, 1, 1)
DEFORM_CONV = random(2, 4, 7, 6), random(2, 18, 7, 6), random(6, 4, 3, 3)
MODULATED = random(2, 4, 7, 6), random(2, 18, 7, 6), random(2, 9, 7, 6), random(6, 4, 3, 3), random(6)
DCN_V2 = MODULATED[0], *MODULATED[3:], *MODULATED[1:3], 3, 3, 1, 1, 1, 1, 1, 1, 1
GRAD = random(2, 6, 7, 6)
BOXES = torch.cat([random(9, 2), 1 + random(9, 2).abs(), 90 * random(9, 1)], 1)


class DeformConvFunction(Function):
    """What _deform_conv changes."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, *args: Any) -> Any:
        raise NotImplementedError


class ModulatedDeformConvFunction(DeformConvFunction):
    """And this."""


LAYERS = SimpleNamespace(DeformConvFunction=DeformConvFunction, ModulatedDeformConvFunction=ModulatedDeformConvFunction)


@pytest.fixture(autouse=True)
def _freed():
    extension = _deform_conv.deform_conv_ext
    extension.enable(None)
    _deform_conv.free(extension, LAYERS, *vars(LAYERS))  # type: ignore[arg-type]
    yield
    extension.disable()


def results(function: Any, arguments: tuple[Any, ...], device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
    def made(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    returned = function(*map(made, arguments))
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [tensor.cpu() for tensor in returned if tensor is not None]


def forward_and_backward(function: type[Function], count: int) -> Any:
    """What forward and backward of an autograd function compute, without autograd."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, grad = arguments
        ctx = SimpleNamespace(needs_input_grad=[True] * count)
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        with torch.no_grad():
            result = function.forward(ctx, *inputs)
            return result, *function.backward(ctx, grad)

    return call


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ms_deform_attn_forward": (_multi_scale_deform_attn.ms_deform_attn_forward, (*ATTENTION, 64)),
    "ms_deform_attn_backward": (
        _multi_scale_deform_attn.ms_deform_attn_backward,
        (*ATTENTION, random(2, 7, 8), 64),
    ),
    "deform_conv": (forward_and_backward(DeformConvFunction, 3), (*DEFORM_CONV, *NUMBERS, GRAD)),
    "modulated_deform_conv": (forward_and_backward(ModulatedDeformConvFunction, 5), (*MODULATED, *NUMBERS, GRAD)),
    "modulated_deform_conv without a bias": (
        forward_and_backward(ModulatedDeformConvFunction, 5),
        (*MODULATED[:4], None, *NUMBERS, GRAD),
    ),
    "dcn_v2_forward": (_dcn_v2.dcn_v2_forward, DCN_V2),
    "dcn_v2_backward": (_dcn_v2.dcn_v2_backward, (*DCN_V2[:5], GRAD, *DCN_V2[5:])),
    "get_connected_componnets": (_sam2.get_connected_componnets, ((random(2, 1, 13, 17) > 0).to(torch.uint8),)),
    "box_iou_rotated": (_detectron2.box_iou_rotated, (BOXES, BOXES[:5])),
    "nms_rotated": (_detectron2.nms_rotated, (BOXES, random(9), 0.3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_results_of_the_cpu(name, dtype):
    function, arguments = CALLS[name]
    expected = results(function, arguments, "cpu", dtype)
    with mps_device(values=True) as device:
        found = results(function, arguments, device, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gradients_of_attention_keep_the_rules(dtype):
    """At the size of Deformable DETR's encoder."""
    shapes = torch.tensor([[100, 134], [50, 67], [25, 34], [13, 17]])
    pixels, points = int(shapes.prod(1).sum()), (2, 300, 8, 4, 4)
    with mps_device(values=False):
        value, locations, weights = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, pixels, 8, 32), (*points, 2), points)
        )
        grad = torch.empty(2, 300, 256, dtype=dtype, device="meta")
        gradients = _multi_scale_deform_attn.ms_deform_attn_backward(
            value, shapes, torch.zeros(4), locations, weights, grad, 64
        )
    assert [gradient.shape for gradient in gradients] == [value.shape, locations.shape, weights.shape]


@pytest.mark.parametrize("function", [DeformConvFunction, ModulatedDeformConvFunction])
def test_training_keeps_the_rules(function):
    """At the size of a Mask R-CNN's third stage."""
    shapes: dict[str, tuple[int, ...]] = {"input": (2, 256, 100, 152), "offset": (2, 18, 100, 152)}
    if function is ModulatedDeformConvFunction:
        shapes["mask"] = (2, 9, 100, 152)
    shapes["weight"] = (256, 256, 3, 3)
    with mps_device(values=False):
        tensors = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes.values()]
        bias = [] if function is DeformConvFunction else [torch.empty(256, device="meta", requires_grad=True)]
        result = function.apply(*tensors, *bias, *NUMBERS)
        gradients = torch.autograd.grad(result, [*tensors, *bias], torch.empty_like(result))
    assert [tensor.shape for tensor in gradients] == [tensor.shape for tensor in (*tensors, *bias)]
