"""Deformable convolution after omniops.enable, called as BasicSR and detectron2 do, whose Python takes CUDA alone."""

import importlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import omniops

FUNCTIONS = """
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair
{imports}

class {deform}(Function):
    @staticmethod
    def forward(ctx, input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1,
                im2col_step=64):
        if not input.is_cuda:
            raise NotImplementedError
        numbers = [_pair(each)[::-1] for each in (stride, padding, dilation)]
        output = input.new_empty(sizes(input, weight, *numbers))
        {module}.deform_conv_forward(
            input, weight, offset, output, input.new_empty(0), input.new_empty(0), weight.size(3), weight.size(2),
            *numbers[0], *numbers[1], *numbers[2], groups, deformable_groups, im2col_step
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        raise NotImplementedError

class {modulated}(Function):
    @staticmethod
    def forward(ctx, input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1,
                deformable_groups=1):
        if not input.is_cuda:
            raise NotImplementedError
        output = input.new_empty(sizes(input, weight, _pair(stride), _pair(padding), _pair(dilation)))
        {module}.modulated_deform_conv_forward(
            input, weight, input.new_empty(1) if bias is None else bias, input.new_empty(0), offset, mask, output,
            input.new_empty(0), weight.shape[2], weight.shape[3], stride, stride, padding, padding, dilation, dilation,
            groups, deformable_groups, bias is not None
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        raise NotImplementedError

def sizes(input, weight, stride, padding, dilation):
    return input.size(0), weight.size(0), *(
        (input.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) // stride[i] + 1
        for i in range(2)
    )

deform_conv = {deform}.apply
modulated_deform_conv = {modulated}.apply
"""
OPTIONAL = "try:\n    from . import deform_conv_ext\nexcept ImportError:\n    pass"
IN_BASICSR = FUNCTIONS.format(
    imports=OPTIONAL,
    module="deform_conv_ext",
    deform="DeformConvFunction",
    modulated="ModulatedDeformConvFunction",
)
IN_DETECTRON2 = FUNCTIONS.format(
    imports="from detectron2 import _C", module="_C", deform="_DeformConv", modulated="_ModulatedDeformConv"
)
IN_EDVR = (
    IN_BASICSR.replace("deform_conv_ext.deform_conv_forward", "deform_conv_cuda.deform_conv_forward_cuda")
    .replace("deform_conv_ext.modulated_deform_conv_forward", "deform_conv_cuda.modulated_deform_conv_cuda_forward")
    .replace("import deform_conv_ext", "import deform_conv_cuda")
)
# Of each project: the library's name, the module with the functions, its text.
PROJECTS = {
    "BasicSR": ("deform_conv_ext", "basicsr.ops.dcn.deform_conv", IN_BASICSR),
    "a copy of BasicSR": ("deform_conv_ext", "models.modules.ops.dcn.deform_conv", IN_BASICSR),
    "a copy in no folder dcn": ("deform_conv_ext", "archs.deform_conv", IN_BASICSR),
    "a copy in no package": ("deform_conv_ext", "deform_conv", IN_BASICSR.replace("from . import", "import")),
    "EDVR": ("deform_conv_cuda", "models.archs.dcn.deform_conv", IN_EDVR),
    "detectron2": ("detectron2", "detectron2.layers.deform_conv", IN_DETECTRON2),
}
MODULES = ("deform_conv_ext", "deform_conv_cuda", "_C")
PAIRS = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}
NUMBERS = {"stride": 2, "padding": 1, "dilation": 2}


@pytest.fixture(params=PROJECTS)
def layers(request, project):
    """The module with the two functions, enabled; one that goes on without the compiled module was imported before."""
    library, name, text = PROJECTS[request.param]
    project({f"{name.replace('.', '/')}.py": text})
    if library != "detectron2":
        importlib.import_module(name)
    omniops.enable(library)
    return importlib.import_module(name)


def problem(numbers, dtype=torch.float64, n=2):
    """input, offset, mask, weight, bias of 2 weight groups and 4 offset groups; no sample is at an integer position."""
    generator = torch.Generator().manual_seed(0)
    stride, padding, dilation = (torch.nn.modules.utils._pair(numbers[name]) for name in PAIRS)
    size = [(s + 2 * padding[i] - dilation[i] * 2 - 1) // stride[i] + 1 for i, s in enumerate((9, 8))]
    shapes = (n, 8, 9, 8), (n, 4 * 9 * 2, *size), (n, 4 * 9, *size), (6, 4, 3, 3), (6,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] = (2 * torch.randint(-24, 24, shapes[1], generator=generator) + 1) / 16
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def formula(input, offset, mask, weight, bias, numbers):
    tv = pytest.importorskip("torchvision", exc_type=ImportError).ops
    return tv.deform_conv2d(input, offset, weight, bias, mask=mask, **numbers)


def result_and_gradients(function, tensors):
    result = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, tensors, grad)]


def test_deform_conv(layers):
    input, offset, _, weight, _ = problem(PAIRS)
    tensors = [input, offset, weight]
    found = result_and_gradients(lambda i, o, w: layers.deform_conv(i, o, w, *PAIRS.values(), 2, 4), tensors)
    assert_close(found, result_and_gradients(lambda i, o, w: formula(i, o, None, w, None, PAIRS), tensors))
    assert (
        layers.deform_conv(input, offset, weight, *PAIRS.values(), 2, 4).grad_fn.name().startswith(("_Deform", "Def"))
    )


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_modulated_deform_conv(layers, with_bias):
    tensors = problem(NUMBERS)[: 5 if with_bias else 4]

    def theirs(input, offset, mask, weight, bias=None):
        return layers.modulated_deform_conv(input, offset, mask, weight, bias, *NUMBERS.values(), 2, 4)

    def expected(input, offset, mask, weight, bias=None):
        return formula(input, offset, mask, weight, bias, NUMBERS)

    assert_close(result_and_gradients(theirs, tensors), result_and_gradients(expected, tensors))


def test_only_some_gradients(layers):
    input, offset, _, weight, _ = problem(NUMBERS)
    loss = formula(input, offset, None, weight, None, NUMBERS).square().sum()
    by_input, by_offset, by_weight = torch.autograd.grad(loss, [input, offset, weight])
    for wanted, arguments, expected in (
        ([weight], (input.detach(), offset.detach(), weight), [by_weight]),
        ([input, offset], (input, offset, weight.detach()), [by_input, by_offset]),
        ([offset], (input.detach(), offset, weight.detach()), [by_offset]),
    ):
        loss = layers.deform_conv(*arguments, *NUMBERS.values(), 2, 4).square().sum()
        assert_close(torch.autograd.grad(loss, wanted), tuple(expected))


def test_the_gradient_of_the_offset_is_the_compiled_modules_at_the_border(layers):
    """0 where a position is -1, as with every padded tap before training; torchvision's is the slope into the map."""
    input, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    offset = torch.zeros(1, 18, 4, 4, requires_grad=True)
    layers.deform_conv(input, offset, weight, 1, 1).sum().backward()
    assert offset.grad[0, 0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_dtypes(layers, dtype, tolerance):
    tensors = [tensor.detach() for tensor in problem(NUMBERS, dtype)]
    found = layers.modulated_deform_conv(*tensors, *NUMBERS.values(), 2, 4)
    expected = formula(*(tensor.double() for tensor in tensors), NUMBERS)
    assert found.dtype == dtype
    assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_no_samples(layers):
    tensors = problem(NUMBERS, n=0)
    result, *gradients = result_and_gradients(
        lambda i, o, m, w, b: layers.modulated_deform_conv(i, o, m, w, b, *NUMBERS.values(), 2, 4), tensors
    )
    assert result.shape == (0, 6, 4, 3)
    assert all(gradient.shape == tensor.shape for gradient, tensor in zip(gradients, tensors, strict=True))
    assert not any(gradient.any() for gradient in gradients)


def test_wrong_arguments_are_named(layers):
    input, offset, mask, weight, bias = (tensor.detach() for tensor in problem(NUMBERS))
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\), got \(8, 9, 8\)"):
        layers.deform_conv(input[0], offset, weight, *NUMBERS.values(), 2, 4)
    with pytest.raises(ValueError, match="input must have a height of at least 3"):
        layers.modulated_deform_conv(input[:, :, :1], offset, mask, weight, bias, 2, 1, 2, 2, 4)
    with pytest.raises(ValueError, match="offset must have"):
        layers.deform_conv(input, offset[:, 1:], weight, *NUMBERS.values(), 2, 4)


def test_on_cuda_the_projects_own_functions_call_the_module(layers, monkeypatch):
    module = next(vars(layers)[name] for name in MODULES if name in vars(layers))
    called = []
    for name in ("deform_conv_forward", "modulated_deform_conv_forward"):
        for alias in (name, f"{name}_cuda", name.replace("_forward", "_cuda_forward")):
            monkeypatch.setitem(vars(module), alias, lambda *arguments, name=name: called.append((name, arguments[-1])))
    with FakeTensorMode(), torch.no_grad():
        input, offset, mask, weight, bias = (torch.empty(tensor.shape, device="cuda") for tensor in problem(NUMBERS))
        assert layers.deform_conv(input, offset, weight, 2, 1, 2, 2, 4, 1).shape == (2, 6, 4, 3)
        assert layers.modulated_deform_conv(input, offset, mask, weight, bias, 2, 1, 2, 2, 4).shape == (2, 6, 4, 3)
    assert called == [("deform_conv_forward", 1), ("modulated_deform_conv_forward", True)]


def test_disabled_the_functions_are_what_they_were(layers):
    input, offset, _, weight, _ = problem(NUMBERS)
    omniops.disable()
    with pytest.raises(NotImplementedError):
        layers.deform_conv(input, offset, weight, *NUMBERS.values(), 2, 4)
    assert layers.__name__.startswith("detectron2.") or not {*MODULES} & {*vars(layers)}
    assert not [name for name in sys.modules if name.rpartition(".")[2] in MODULES[:2] or name == "detectron2._C"]


def test_a_module_of_no_package(project):
    """As a copy of the source outside of any package compiles it."""
    project({"layer.py": "import deform_conv_ext\n"})
    omniops.enable("deform_conv_ext")
    module = importlib.import_module("layer").deform_conv_ext
    input, offset, mask, weight, bias = (tensor.detach() for tensor in problem(NUMBERS))
    output = torch.empty(2, 6, 4, 3, dtype=torch.float64)
    module.modulated_deform_conv_forward(
        *(input, weight, bias, bias, offset, mask, output, bias, 3, 3, 2, 2, 1, 1, 2, 2, 2, 4, True)
    )
    assert_close(output, formula(input, offset, mask, weight, bias, NUMBERS))


def test_who_serves_looks_into_basicsr_without_its_import(project):
    folder = project({"basicsr/ops/dcn/deform_conv.py": IN_BASICSR})
    (folder / "basicsr" / "__init__.py").write_text("raise RuntimeError('imported')")
    library = omniops.dropin.LIBRARIES["deform_conv_ext"]
    assert library.serving()["cuda"] == "omniops"
    (folder / "basicsr" / "ops" / "dcn" / "deform_conv_ext.py").touch()
    importlib.invalidate_caches()
    assert library.serving()["cuda"] == "deform_conv_ext"


def test_another_module_of_that_name_is_left_alone(project):
    """As torchvision.ops.deform_conv, or one with such a function that calls no compiled module."""
    project({"archs/deform_conv.py": IN_BASICSR.replace("deform_conv_ext.", "compiled.")})
    omniops.enable()
    module = importlib.import_module("archs.deform_conv")
    with pytest.raises(NotImplementedError):
        module.deform_conv(torch.zeros(1, 1, 4, 4), torch.zeros(1, 18, 4, 4), torch.zeros(1, 1, 3, 3), 1, 1)


def test_all_enabled_detectron2s_functions_run_too(project):
    """Two extensions look at detectron2.layers.deform_conv."""
    project({"detectron2/layers/deform_conv.py": IN_DETECTRON2})
    omniops.enable()
    module = importlib.import_module("detectron2.layers.deform_conv")
    found = module.deform_conv(torch.ones(1, 1, 4, 4), torch.zeros(1, 18, 2, 2), torch.ones(1, 1, 3, 3))
    assert found.tolist() == [[[[9, 9], [9, 9]]]]
