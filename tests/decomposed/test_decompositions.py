"""The decompositions against the operators, called as they are and in exported programs."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import omniops
from omniops.ops.carafe import _upsampled

OPERATORS = torch.ops.omniops
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_decomposes(operator, *arguments, dtype):
    """The table's function gives what the operator does, in shape, dtype and value."""
    wanted, got = operator(*arguments), omniops.decompositions()[operator](*arguments)
    wanted, got = ((results,) if isinstance(results, torch.Tensor) else results for results in (wanted, got))
    assert len(wanted) == len(got)
    for want, result in zip(wanted, got, strict=True):
        assert result.shape == want.shape
        assert result.dtype == want.dtype
        if want.numel():
            scale = want.abs().max().item()
            torch.testing.assert_close(result, want, rtol=0, atol=TOLERANCES[dtype] * scale)


@DTYPES
@pytest.mark.parametrize(("s", "t"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize(("kernel_size", "group_size"), [(3, 1), (5, 3)])
def test_carafe(dtype, s, t, kernel_size, group_size):
    height, width = _upsampled(5, 8, s, t)
    features, grad = randn(2, 6, 5, 8, dtype=dtype), randn(2, 6, height, width, dtype=dtype, seed=1)
    masks = randn(2, group_size * kernel_size**2, height, width, dtype=dtype, seed=2)
    numbers = kernel_size, group_size, s, t
    assert_decomposes(OPERATORS.carafe.default, features, masks, *numbers, dtype=dtype)
    for tensors in ((grad, features, masks), (grad, None, masks), (grad, features, None)):
        assert_decomposes(OPERATORS.carafe_backward.default, *tensors, 5, 8, *numbers, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("masked", [True, False])
def test_deform_conv2d(dtype, groups, offset_groups, masked):
    numbers, height, width = ([2, 1], [1, 2], [1, 2]), 4, 11
    input, weight = randn(2, 4, 7, 9, dtype=dtype), randn(6, 4 // groups, 3, 2, dtype=dtype, seed=1)
    # Quarters, which float16 has exactly, up to where samples lie outside.
    offset = (randn(2, offset_groups * 12, height, width, seed=2) * 16).round().to(dtype) / 4 + 0.125
    mask = randn(2, offset_groups * 6, height, width, dtype=dtype, seed=3) if masked else None
    bias = randn(6, dtype=dtype, seed=4) if masked else None
    assert_decomposes(OPERATORS.deform_conv2d.default, input, offset, weight, bias, mask, *numbers, dtype=dtype)
    grad = randn(2, 6, height, width, dtype=dtype, seed=5)
    wanted = [True, True, True, True, masked]
    assert_decomposes(
        OPERATORS.deform_conv2d_backward.default, grad, input, offset, weight, mask, *numbers, wanted, dtype=dtype
    )


@DTYPES
@pytest.mark.parametrize("discrete", [False, True])
def test_multi_scale_deform_attn(dtype, discrete):
    sizes, points = [6, 4, 3, 5, 0, 2], [2, 3, 1]
    value, weights = randn(2, 39, 2, 4, dtype=dtype), randn(2, 5, 2, 6, dtype=dtype, seed=1)
    locations = (randn(2, 5, 2, 6, 2, seed=2) * 64).round().to(dtype) / 64 + 0.5
    arguments = value, sizes, locations, weights, points, discrete
    assert_decomposes(OPERATORS.multi_scale_deform_attn.default, *arguments, dtype=dtype)
    grad = randn(2, 5, 8, dtype=dtype, seed=3)
    assert_decomposes(
        OPERATORS.multi_scale_deform_attn_backward.default, grad, *arguments, [True, True, True], dtype=dtype
    )


def test_points_of_levels_as_an_axis():
    value, weights = randn(1, 20, 2, 4), randn(1, 5, 2, 2, 3, seed=1)
    locations = randn(1, 5, 2, 2, 3, 2, seed=2).sigmoid()
    arguments = value, [4, 4, 2, 2], locations, weights, [3, 3], False
    assert_decomposes(OPERATORS.multi_scale_deform_attn.default, *arguments, dtype=torch.float32)


@pytest.mark.parametrize("far", [float("inf"), -float("inf"), 1e30])
def test_what_lies_far_outside_is_zero(far):
    offset = torch.zeros(1, 2, 4, 4)
    offset[0, :, 1:3] = far
    arguments = randn(1, 1, 4, 4), offset, torch.ones(1, 1, 1, 1), None, None, [1, 1], [0, 0], [1, 1]
    assert_decomposes(OPERATORS.deform_conv2d.default, *arguments, dtype=torch.float32)
    locations = torch.full((1, 2, 1, 2, 2), 0.5)
    locations[0, 1] = far
    arguments = randn(1, 16, 1, 2), [4, 4], locations, torch.ones(1, 2, 1, 2), [2], False
    assert_decomposes(OPERATORS.multi_scale_deform_attn.default, *arguments, dtype=torch.float32)


def test_every_operator_is_in_the_table():
    names = {str(operator) for operator in omniops.decompositions()}
    assert {
        f"omniops.{name}.default" for name in dir(OPERATORS) if not name.startswith("_") and name != "name"
    } <= names


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = omniops.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2)
        nn.init.normal_(self.conv.conv_offset.weight, std=0.5)
        self.upsample = omniops.CARAFEPack(6, 2, compressed_channels=2, up_kernel=3)

    def forward(self, x):
        x = self.upsample(self.conv(x))
        locations = x.flatten(1)[:, :40].sigmoid().view(-1, 5, 2, 2, 1, 2)
        value = x.flatten(2)[..., :20].transpose(1, 2).unflatten(2, (2, 3))
        weights = locations[..., 0].softmax(-1)
        return omniops.multi_scale_deform_attn(value, [(4, 4), (2, 2)], locations, weights)


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.slow
def test_a_program_of_any_batch_and_size_keeps_no_operator_of_ours():
    model, dynamic = Upsample().eval(), torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (randn(2, 4, 6, 7),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    assert {"omniops.carafe.default", "omniops.deform_conv2d.default"} < targets(exported)
    program = exported.run_decompositions(omniops.decompositions())
    assert not any("omniops" in target for target in targets(program))
    for shape in ((2, 4, 6, 7), (3, 4, 9, 5), (2, 4, 5, 8), (3, 4, 8, 24)):
        x = randn(*shape, seed=1)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_infinite_pixel_stays_in_its_tiles():
    features, masks = randn(1, 2, 9, 32), randn(1, 25, 18, 64)
    features[0, 1, 4, 20] = torch.inf
    finite = omniops.decompositions()[OPERATORS.carafe.default](features, masks, 5, 1, 2, 1).isfinite()
    expected = torch.ones(1, 2, 18, 64, dtype=torch.bool)
    expected[0, 1, 4:14, 32:48] = False  # five rows of the third tile's eight centres
    assert torch.equal(finite, expected)


def test_gradients_of_any_batch():
    """The backward operators are in the graph that is decomposed."""

    class Gradients(nn.Module):
        def forward(self, grad, input, offset, weight, mask):
            return torch.ops.omniops.deform_conv2d_backward(
                grad, input, offset, weight, mask, [1, 1], [1, 1], [1, 1], [True, True, True, False, True]
            )

    def inputs(n):
        return randn(n, 2, 4, 5), randn(n, 4, 4, 5), randn(n, 18, 4, 5), randn(2, 4, 3, 3), randn(n, 9, 4, 5)

    any_batch = {0: torch.export.Dim.DYNAMIC}
    shapes = (any_batch, any_batch, any_batch, None, any_batch)
    program = torch.export.export(Gradients(), inputs(3), dynamic_shapes=shapes)
    program = program.run_decompositions(omniops.decompositions())
    assert not any("omniops" in target for target in targets(program))
    for n in (3, 2, 5):
        for found, expected in zip(program.module()(*inputs(n)), Gradients()(*inputs(n)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_graph_with_gradients_keeps_no_operator_of_ours():
    model = Upsample().eval()
    parameters = dict(model.named_parameters())

    def gradients(x):
        result = torch.func.functional_call(model, parameters, (x,))
        return torch.autograd.grad(result.square().sum(), list(parameters.values()))

    x = randn(2, 4, 6, 7)
    graph = make_fx(
        gradients, decomposition_table=omniops.decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True
    )(x)
    assert {node.target.namespace for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)} == {
        "aten"
    }
    for got, want in zip(graph(x), gradients(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


class Areas(nn.Module):
    def forward(self, logits):
        return omniops.fill_holes(logits, max_area=2)


def test_connected_components_say_what_to_do():
    program = torch.export.export(Areas(), (randn(1, 4, 4),))
    with pytest.raises(Exception, match=r"connected_components.* has no decomposition.*call it on the result"):
        program.run_decompositions(omniops.decompositions())
    table = omniops.decompositions()
    del table[OPERATORS.connected_components.default]
    x = randn(1, 4, 4, seed=1)
    kept = program.run_decompositions(table)
    assert "omniops.connected_components.default" in targets(kept)
    assert torch.equal(kept.module()(x), omniops.fill_holes(x, 2))
