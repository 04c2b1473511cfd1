"""CARAFE in ONNX, up and down."""

import pytest
import torch
from torch import nn

import omniops

DYNAMIC = torch.export.Dim.DYNAMIC
MAPS = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
"""Batch, height and width of any size."""


def test_nodes(export, randn):
    program = export(omniops.CARAFE(5, 1, 2), randn(1, 4, 5, 6), randn(1, 25, 10, 12))
    types = [node.op_type for node in program.model_proto.graph.node]
    assert types.count("MatMul") == 1
    assert set(types) == {"Concat", "Gather", "MatMul", "Pad", "Reshape", "Slice", "Transpose"}


def test_half_precision_is_computed_in_float32(export, randn):
    inputs = randn(1, 4, 5, 6, dtype=torch.float16), randn(1, 1, 10, 12, dtype=torch.float16)
    types = [node.op_type for node in export(omniops.CARAFE(1, 1, 2), *inputs).model_proto.graph.node]
    assert types.count("Cast") == 3


class Both(nn.Module):
    """Up and down by given masks, whose sizes follow from that of the features."""

    def __init__(self, kernel_size, group_size, factor):
        super().__init__()
        self.arguments = kernel_size, group_size, factor

    def forward(self, features, up_masks):
        factor = self.arguments[2]
        # Of the masks the corner that is as large as the result of the downsampling.
        down_masks = up_masks[:, :, : (features.shape[2] - 1) // factor + 1, : (features.shape[3] - 1) // factor + 1]
        return (
            omniops.carafe(features, up_masks, *self.arguments),
            omniops.carafe_downsample(features, down_masks, *self.arguments),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_size", "group_size", "factor", "dtype", "tolerance"),
    [
        (5, 1, 2, torch.float32, 1e-4),
        (3, 2, 3, torch.float32, 1e-4),
        (1, 2, 2, torch.float32, 1e-4),
        (3, 1, 1, torch.float32, 1e-4),
        (3, 2, 2, torch.float16, 2e-3),
        (3, 2, 2, torch.float64, 1e-10),
    ],
)
def test_runs(assert_runs_alike, randn, kernel_size, group_size, factor, dtype, tolerance):
    def inputs(n, h, w):
        masks = randn(n, group_size * kernel_size**2, h * factor, w * factor).softmax(1)
        return randn(n, 4, h, w, dtype=dtype), masks.to(dtype)

    h, w = torch.export.Dim("h", min=1, max=64), torch.export.Dim("w", min=1, max=64)
    shapes = {0: DYNAMIC, 2: h, 3: w}, {0: DYNAMIC, 2: factor * h, 3: factor * w}
    cases = inputs(2, 5, 8), inputs(1, 12, 7), inputs(3, 1, 2)
    assert_runs_alike(Both(kernel_size, group_size, factor), *cases, tolerance=tolerance, dynamic_shapes=shapes)


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = omniops.CARAFEPack(6, 2, up_group=2, compressed_channels=4)
        self.down = omniops.CARAFEDownsamplePack(6, 2, compressed_channels=4)

    def forward(self, x):
        return self.up(x), self.down(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "opset_version"),
    [(torch.float32, 1e-4, 18), (torch.float32, 1e-4, 25), (torch.float16, 2e-3, 20)],
)
def test_packs_run(assert_runs_alike, randn, dtype, tolerance, opset_version):
    cases = [(randn(*shape, dtype=dtype),) for shape in ((2, 6, 5, 8), (1, 6, 12, 7), (3, 6, 2, 2))]
    options = {"dynamic_shapes": (MAPS,), "opset_version": opset_version}
    assert_runs_alike(Packs().to(dtype), *cases, tolerance=tolerance, **options)


@pytest.mark.slow
@pytest.mark.parametrize("neck", [omniops.nn.FPNCarafe, omniops.nn.PAFPNCarafe])
def test_pyramids_run(assert_runs_alike, randn, neck):
    def inputs(n, h, w):
        return ([randn(n, c, h * s, w * s) for c, s in ((4, 4), (6, 2), (8, 1))],)

    n, h, w = (torch.export.Dim(name, min=1, max=64) for name in "nhw")
    shapes = ([{0: n, 2: s * h, 3: s * w} for s in (4, 2, 1)],)
    pyramid = neck([4, 6, 8], 8, num_outs=4, upsample_cfg={"compressed_channels": 4})
    assert_runs_alike(pyramid, inputs(2, 3, 2), inputs(1, 4, 5), dynamic_shapes=shapes)
