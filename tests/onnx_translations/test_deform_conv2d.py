"""Deformable convolution in ONNX: DeformConv, and what stands for it in opsets without it."""

import pytest
import torch
from torch import nn

import omniops

DYNAMIC = torch.export.Dim.DYNAMIC
MAPS = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
"""Batch, height and width of any size."""


class Convolution(nn.Module):
    """deform_conv2d with its offset, and its mask, as inputs."""

    def __init__(self, randn, channels, groups, kernel_size, bias, dtype=torch.float32, **numbers):
        super().__init__()
        self.weight = nn.Parameter(randn(2 * groups, channels // groups, *kernel_size, dtype=dtype))
        self.bias = nn.Parameter(randn(2 * groups, dtype=dtype)) if bias else None
        self.numbers = numbers

    def forward(self, x, offset, mask=None):
        return omniops.deform_conv2d(x, offset, self.weight, self.bias, mask=mask, **self.numbers)


def predicting(convolution, randn):
    """A Pack whose offsets move its taps by some pixels, some out of the map."""
    with torch.no_grad():
        for parameter in convolution.conv_offset.parameters():
            parameter.copy_(randn(*parameter.shape))
    return convolution.eval()


def node_types(program):
    return [node.op_type for node in program.model_proto.graph.node]


@pytest.mark.parametrize("opset_version", [18, 20])
def test_nodes(export, randn, has_deform_conv, opset_version):
    pack = predicting(omniops.DeformConv2dPack(4, 6, 3, padding=1), randn)
    types = node_types(export(pack, randn(1, 4, 5, 6), opset_version=opset_version))
    native = has_deform_conv and opset_version == 20
    assert types == ["Conv", "DeformConv"] if native else {"GridSample", "MatMul"} < set(types)


def test_attributes(export, randn, has_deform_conv):
    if not has_deform_conv:
        pytest.skip("this PyTorch makes translations for opset 18 alone, which has no DeformConv")
    convolution = Convolution(randn, 8, 2, (3, 2), True, stride=(2, 1), padding=(1, 2), dilation=(1, 3))
    program = export(convolution, randn(2, 8, 7, 9), randn(2, 4 * 12, 4, 10), randn(2, 4 * 6, 4, 10))
    (node,) = program.model_proto.graph.node
    found = {attribute.name: list(attribute.ints) or attribute.i for attribute in node.attribute}
    assert found == {
        "kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 2, 1, 2], "dilations": [1, 3],
        "group": 2, "offset_group": 4,
    }  # fmt: skip


def test_half_precision_is_computed_in_float32(export, randn, has_deform_conv):
    if not has_deform_conv:
        pytest.skip("this PyTorch makes translations for opset 18 alone, which has no DeformConv")
    convolution = Convolution(randn, 4, 1, (1, 1), False, dtype=torch.bfloat16)
    inputs = randn(1, 4, 5, 5, dtype=torch.bfloat16), randn(1, 2, 5, 5, dtype=torch.bfloat16)
    types = node_types(export(convolution, *inputs))
    assert types[-2:] == ["DeformConv", "Cast"]
    assert types.count("Cast") == 3  # the weight's is done while exporting


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "offset_groups", "masked", "bias", "opset_version"),
    [
        *((2, 4, True, True, opset_version) for opset_version in (18, 19, 20, 25)),
        (1, 1, False, False, 20),
        (4, 1, True, False, 18),
        (4, 1, True, False, 20),
        (1, 2, False, True, 18),
    ],
)
def test_runs(assert_runs_alike, randn, groups, offset_groups, masked, bias, opset_version):
    numbers = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}
    convolution = Convolution(randn, 8, groups, (3, 2), bias, **numbers)
    cases = []
    for n, h, w in ((2, 7, 9), (3, 12, 5), (1, 31, 40)):
        size = (h - 1) // 2 + 1, w + 1
        offset = 3 * randn(n, 12 * offset_groups, *size)
        offset[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 1e30])
        mask = [randn(n, 6 * offset_groups, *size)] if masked else []
        cases.append((randn(n, 8, h, w), offset, *mask))
    shapes = [MAPS] * len(cases[0])
    assert_runs_alike(convolution, *cases, dynamic_shapes=shapes, opset_version=opset_version)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "opset_version"), [(torch.float32, 18), (torch.float32, 20), (torch.float16, 20)])
def test_modules_run(assert_runs_alike, randn, dtype, opset_version):
    class Modules(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = predicting(omniops.DeformConv2dPack(4, 6, 3, padding=1, offset_groups=2), randn)
            self.second = predicting(omniops.ModulatedDeformConv2dPack(4, 6, 3, stride=2, groups=2), randn)
            self.third = predicting(omniops.ModulatedDeformConv2d(4, 4, 3, padding=1), randn)
            self.fourth = omniops.DeformConv2d(4, 6, (2, 3), padding="same")

        def forward(self, x, offset):
            return self.first(x), self.second(x), self.third(x), self.fourth(x, offset)

    cases = [(randn(n, 4, h, w, dtype=dtype), randn(n, 12, h, w, dtype=dtype)) for n, h, w in ((2, 7, 9), (1, 12, 5))]
    # float16's own convolutions predict the offsets, which are rounded to 1/500 of a pixel and more.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    options = {"dynamic_shapes": (MAPS, MAPS), "opset_version": opset_version}
    assert_runs_alike(Modules().to(dtype), *cases, tolerance=tolerance, **options)


@pytest.mark.slow
@pytest.mark.parametrize("opset_version", [18, 20])
def test_float16_runs(assert_runs_alike, randn, opset_version):
    convolution = Convolution(randn, 8, 2, (3, 3), True, dtype=torch.float16, padding=1)
    inputs = (randn(2, channels, 9, 8, dtype=torch.float16) for channels in (8, 36, 18))
    assert_runs_alike(convolution, tuple(inputs), tolerance=2e-3, opset_version=opset_version)


@pytest.mark.slow
def test_older_opsets_are_converted(assert_runs_alike, randn):
    pack = predicting(omniops.DeformConv2dPack(4, 6, 3, padding=1), randn)
    program = assert_runs_alike(pack, (randn(1, 4, 5, 6),), opset_version=16)
    assert program.model.opset_imports == {"": 16}


def test_opsets_that_onnxscript_cannot_convert_to(export, randn):
    pack = predicting(omniops.DeformConv2dPack(4, 6, 3, padding=1), randn)
    types = node_types(export(pack, randn(1, 4, 5, 6), opset_version=99))
    assert "DeformConv" not in types  # PyTorch leaves it at opset 18, which has none


def test_dynamic_channels(export, randn):
    class Convolution(nn.Module):
        def forward(self, x, offset, weight):
            return omniops.deform_conv2d(x, offset, weight)

    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        export(
            Convolution(), randn(1, 4, 5, 5), randn(1, 2, 5, 5), randn(3, 4, 1, 1),
            dynamic_shapes=({1: DYNAMIC}, None, {1: DYNAMIC}),
        )  # fmt: skip
    causes, error = [], raised.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any("input must have a fixed size of axis 1 in ONNX, got the dynamic" in cause for cause in causes)
