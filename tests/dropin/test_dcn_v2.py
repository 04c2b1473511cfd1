"""DCNv2 after omniops.enable, called as CenterTrack and FairMOT call its compiled module ``_ext``."""

import importlib

import pytest
import torch
from torch.testing import assert_close

import omniops

LAYER = """
import torch
import _ext

class _DCNv2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, mask, weight, bias, *numbers):
        ctx.save_for_backward(input, weight, bias, offset, mask)
        ctx.numbers = numbers
        return _ext.dcn_v2_forward(input, weight, bias, offset, mask, *numbers)

    @staticmethod
    def backward(ctx, grad):
        i, o, m, w, b = _ext.dcn_v2_backward(*ctx.saved_tensors, grad, *ctx.numbers)
        return i, o, m, w, b, *(None,) * 9

dcn_v2_conv = _DCNv2.apply
"""
NUMBERS = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
FLAT = (3, 3, 2, 1, 1, 2, 1, 2, 2)
COMPILED = """
def dcn_v2_forward(*args):
    raise RuntimeError("Not compiled with GPU support" if args[0].is_cuda else "Not implemented on the CPU")
"""


@pytest.fixture
def layer(project):
    project({"layer.py": LAYER, "_ext.py": ""})
    (project({}) / "_ext.py").unlink()
    omniops.enable("DCNv2")
    return importlib.import_module("layer")


def problem(dtype=torch.float64, n=2):
    """input, offset, mask, weight, bias; no sample is at an integer position."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, 4, 7, 8), (n, 36, 4, 8), (n, 18, 4, 8), (6, 4, 3, 3), (6,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] = (2 * torch.randint(-24, 24, shapes[1], generator=generator) + 1) / 16
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def formula(input, offset, mask, weight, bias):
    tv = pytest.importorskip("torchvision", exc_type=ImportError).ops
    return tv.deform_conv2d(input, offset, weight, bias, mask=mask, **NUMBERS)


@pytest.mark.parametrize("n", [2, 0])
def test_values_and_gradients(layer, n):
    tensors = problem(n=n)
    result = layer.dcn_v2_conv(*tensors, *FLAT)
    expected = formula(*tensors)
    assert_close(result, expected)
    grad = torch.randn_like(expected)
    assert_close(torch.autograd.grad(result, tensors, grad), torch.autograd.grad(expected, tensors, grad))


def test_the_gradient_of_the_offset_is_the_compiled_modules_at_the_border(layer):
    offset = torch.zeros(1, 18, 4, 4, requires_grad=True)
    ones = [torch.ones(shape) for shape in ((1, 1, 4, 4), (1, 9, 4, 4), (1, 1, 3, 3), (1,))]
    layer.dcn_v2_conv(ones[0], offset, *ones[1:], 3, 3, 1, 1, 1, 1, 1, 1, 1).sum().backward()
    assert offset.grad[0, 0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_dtypes(layer, dtype, tolerance):
    tensors = [tensor.detach() for tensor in problem(dtype)]
    found, expected = layer.dcn_v2_conv(*tensors, *FLAT), formula(*(tensor.double() for tensor in tensors))
    assert found.dtype == dtype
    assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_wrong_arguments_are_named(layer):
    input, offset, mask, weight, bias = (tensor.detach() for tensor in problem())
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\), got \(4, 7, 8\)"):
        layer.dcn_v2_conv(input[0], offset, mask, weight, bias, *FLAT)
    with pytest.raises(ValueError, match="input must have 4 channels"):
        layer.dcn_v2_conv(input[:, :2], offset, mask, weight, bias, *FLAT)
    with pytest.raises(ValueError, match="mask must have at least the numbers of shape"):
        layer.dcn_v2_conv(input, offset, mask[:, 1:], weight, bias, *FLAT)


def test_what_is_lacking_says_so(layer):
    with pytest.raises(NotImplementedError, match="omniops has no dcn_v2_psroi_pooling_forward for DCNv2"):
        layer._ext.dcn_v2_psroi_pooling_forward(torch.zeros(1))


def test_a_compiled_one_is_served_on_the_cpu(project):
    project({"layer.py": LAYER, "_ext.py": COMPILED})
    omniops.enable("DCNv2")
    module = importlib.import_module("layer")
    tensors = [tensor.detach() for tensor in problem()]
    assert_close(module.dcn_v2_conv(*tensors, *FLAT), formula(*tensors))
    omniops.disable()
    with pytest.raises(RuntimeError, match="Not implemented on the CPU"):
        module.dcn_v2_conv(*tensors, *FLAT)


def test_others_may_call_a_module_ext_too():
    omniops.enable()
    with pytest.raises(ModuleNotFoundError, match="_ext"):
        importlib.import_module("_ext")
    omniops.enable("DCNv2")
    assert importlib.import_module("_ext").dcn_v2_forward
