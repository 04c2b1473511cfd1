"""Multi-scale deformable attention in ONNX."""

import pytest
import torch
from torch import nn

import omniops

DYNAMIC = torch.export.Dim.DYNAMIC
SHAPES = {0: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}
"""Batch and queries of any number."""


class Attention(nn.Module):
    def __init__(self, points_per_level=None, method="default"):
        super().__init__()
        self.options = {"points_per_level": points_per_level, "method": method}

    def forward(self, value, locations, weights):
        return omniops.multi_scale_deform_attn(value, [(4, 5), (2, 3)], locations, weights, **self.options)


def inputs(randn, n, queries, points, dtype=torch.float32):
    """Locations are float32 beside half precision, and some lie outside, infinitely far too."""
    locations = randn(n, queries, 2, *points, 2) * 0.4 + 0.5
    locations[0, 0].flatten()[:3] = torch.tensor([torch.inf, -torch.inf, 1e30])
    locations = locations.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return randn(n, 26, 2, 4, dtype=dtype), locations, randn(n, queries, 2, *points, dtype=dtype).softmax(-1)


@pytest.mark.parametrize(("method", "found"), [("default", "GridSample"), ("discrete", "GatherND")])
def test_nodes(export, randn, method, found):
    program = export(Attention(method=method), *inputs(randn, 1, 3, (2, 3)))
    assert [node.op_type for node in program.model_proto.graph.node].count(found) == 2  # one a level


@pytest.mark.slow
def test_mode_has_the_name_of_its_opset(export, randn):
    """Before opset 20 "linear" was named "bilinear"."""
    modes = set()
    for opset_version in (18, 20):
        program = export(Attention(), *inputs(randn, 1, 3, (2, 3)), opset_version=opset_version)
        for node in program.model_proto.graph.node:
            modes |= {(opset_version, a.s.decode()) for a in node.attribute if a.name == "mode"}
    assert modes == {(18, "bilinear"), (20, "linear")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "points_per_level", "method", "opset_version"),
    [
        ((2, 3), None, "default", 18),
        ((2, 3), None, "default", 25),
        ((2, 3), None, "discrete", 18),
        ((5,), [2, 3], "default", 20),
        ((5,), [2, 3], "discrete", 25),
        ((3,), [0, 3], "default", 20),
    ],
)
def test_runs(assert_runs_alike, randn, points, points_per_level, method, opset_version):
    cases = inputs(randn, 2, 7, points), inputs(randn, 1, 3, points)
    assert_runs_alike(
        Attention(points_per_level, method), *cases, dynamic_shapes=SHAPES, opset_version=opset_version
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.float64, 1e-10)], ids=str)
def test_dtypes_run(assert_runs_alike, randn, method, dtype, tolerance):
    case = inputs(randn, 2, 7, (2, 3), dtype)
    assert_runs_alike(Attention(method=method), case, tolerance=tolerance, dynamic_shapes=SHAPES)


class Module(nn.Module):
    """MultiScaleDeformableAttention of two maps, whose sizes are those of its inputs."""

    def __init__(self, randn):
        super().__init__()
        self.attention = omniops.MultiScaleDeformableAttention(16, 2, 2, 3, batch_first=True)
        with torch.no_grad():
            for layer in (self.attention.sampling_offsets, self.attention.attention_weights):
                layer.weight.copy_(randn(*layer.weight.shape))

    def forward(self, query, large, small, reference_points):
        value = torch.cat([large.flatten(2), small.flatten(2)], 2).transpose(1, 2)
        sizes = [tuple(large.shape[2:]), tuple(small.shape[2:])]
        return self.attention(query, value=value, reference_points=reference_points, spatial_shapes=sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-3)], ids=str)
def test_module_runs(assert_runs_alike, randn, dtype, tolerance):
    def case(n, queries, h, w):
        maps = [randn(n, 16, *size, dtype=dtype) for size in ((h, w), (h // 2, w // 2))]
        return randn(n, queries, 16, dtype=dtype), *maps, randn(n, queries, 2, 2, dtype=dtype).sigmoid()

    image = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    shapes = {0: DYNAMIC, 1: DYNAMIC}, image, image, {0: DYNAMIC, 1: DYNAMIC}
    cases = case(2, 7, 6, 8), case(1, 3, 11, 4)
    assert_runs_alike(Module(randn).to(dtype), *cases, tolerance=tolerance, dynamic_shapes=shapes)
