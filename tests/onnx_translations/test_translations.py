"""The table itself, and exports without it."""

import sys

import pytest
import torch
from torch import nn

import omniops


def test_table_is_of_every_operator_but_the_backward_ones():
    pytest.importorskip("onnxscript", reason="onnxscript makes the graphs: pip install 'omniops[export]'")
    table = omniops.onnx.translations()
    names = {operator.name() for operator in table}
    assert names == {
        "omniops::carafe",
        "omniops::connected_components",
        "omniops::deform_conv2d",
        "omniops::multi_scale_deform_attn",
    }
    assert omniops.onnx.translations() is not table


def test_without_onnxscript(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install 'omniops\[export\]'"):
        omniops.onnx.translations()


class Operators(nn.Module):
    """Each operator with a decomposition, one after the other."""

    def __init__(self):
        super().__init__()
        self.convolution = omniops.ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        self.up = omniops.CARAFEPack(4, 2, up_kernel=3, compressed_channels=4)
        self.down = omniops.CARAFEDownsamplePack(4, 2, kernel_size=3, compressed_channels=4)
        self.attention = omniops.MultiScaleDeformableAttention(4, 2, 1, 2, batch_first=True)
        nn.init.normal_(self.convolution.conv_offset.weight)
        nn.init.normal_(self.attention.sampling_offsets.weight)

    def forward(self, x):
        x = self.down(self.up(self.convolution(x)))
        n, _, h, w = x.shape
        rows = x.flatten(2).transpose(1, 2)
        references = rows.new_full((n, h * w, 1, 2), 0.4)
        return self.attention(rows, reference_points=references, spatial_shapes=[(h, w)])


@pytest.mark.slow
def test_decomposed_programs_run(run, randn):
    """Without the table, after omniops.decompositions()."""
    import onnx

    model, dynamic = Operators().eval(), torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (randn(2, 4, 6, 5),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    program = program.run_decompositions(omniops.decompositions())
    exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18)
    onnx.checker.check_model(exported.model_proto, full_check=True)
    assert {node.domain for node in exported.model.graph.all_nodes()} == {""}
    call = run(exported)
    for x in (randn(2, 4, 6, 5), randn(1, 4, 9, 12), randn(3, 4, 5, 16)):
        with torch.no_grad():
            want = model(x)
        torch.testing.assert_close(call(x)[0], want, rtol=0, atol=1e-4 * want.abs().max().item())
