"""mmcv's multi-scale deformable attention after omniops.enable: our operator, wherever mmcv calls it."""

import importlib
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from dropin.mmcv_inputs import assert_near, bilinear, random_tensor
from operator_calls import OperatorCalls
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import omniops
from omniops.dropin import mmcv_ext

MODULE = "mmcv.ops.multi_scale_deform_attn"
OPERATOR = "multi_scale_deform_attn"
BACKWARD = "multi_scale_deform_attn_backward"
SHAPES, STARTS = torch.tensor([[6, 4], [3, 2]]), torch.tensor([0, 24])
PIXELS = 30


def problem(channels=4, dtype=torch.float64, queries=2, heads=2, points=2):
    """value, locations, weights, as mmcv's own test has them: a weight's sum over levels and points is 1."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    value = random(1, PIXELS, heads, channels) * 0.01
    locations = random(1, queries, heads, 2, points, 2)
    weights = random(1, queries, heads, 2, points) + 1e-5
    weights /= weights.sum((-1, -2), keepdim=True)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, locations, weights)]


def with_gradients(function, tensors):
    value, locations, weights = tensors
    result = function(value, locations, weights)
    grad = torch.rand(result.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [result, *torch.autograd.grad(result, tensors, grad.to(result.dtype))]


def close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert_close(one.double(), other.double(), rtol=0, atol=tolerance * float(other.detach().abs().max()))


# The real mmcv-lite

WAYS = ("composition", "function", "extension")


def ways(mmcv):
    """mmcv's two functions, and what its autograd function computes by the extension, which is all that forks use."""
    module = importlib.import_module(MODULE)
    function = module.MultiScaleDeformableAttnFunction
    fork = type("Fork", (function,), {})
    return {
        "composition": lambda v, p, w: module.multi_scale_deformable_attn_pytorch(v, SHAPES, p, w),
        "function": lambda v, p, w: function.apply(v, SHAPES, STARTS, p, w, 2),
        "extension": lambda v, p, w: fork.apply(v, SHAPES, STARTS, p, w, 2),
    }


def mmcvs_own(mmcv):
    composition = importlib.import_module(MODULE).multi_scale_deformable_attn_pytorch.__wrapped__
    return lambda v, p, w: composition(v, SHAPES, p, w)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_results_and_gradients_are_mmcvs(mmcv, way, dtype, tolerance):
    tensors = problem(channels=32, dtype=dtype, queries=9, heads=3, points=4)
    with OperatorCalls() as calls:
        found = with_gradients(ways(mmcv)[way], tensors)
    assert calls.names == [OPERATOR, BACKWARD]
    with OperatorCalls() as calls:
        wanted = with_gradients(mmcvs_own(mmcv), tensors)
    assert calls.names == []
    close(found, wanted, tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [4, 30, 32, 64, 71])
def test_gradients_are_numerical_ones(mmcv, way, channels):
    assert gradcheck(ways(mmcv)[way], problem(channels), fast_mode=True)


@pytest.mark.parametrize("way", ["composition", "function"])
def test_second_gradients(mmcv, way):
    assert gradgradcheck(ways(mmcv)[way], problem(3), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["composition", "function"])
def test_float32_positions_beside_half_precision_stay_so(mmcv, way, dtype):
    """mmcv would round those to half precision: a pixel and more on a map this wide."""
    width = 3000
    module = importlib.import_module(MODULE)
    x = torch.arange(width, dtype=torch.float64)
    value = (x / 20).sin().to(dtype)[None, :, None, None]
    locations = torch.stack([torch.linspace(0.1, 0.9, 101), torch.full((101,), 0.5)], -1).view(1, 101, 1, 1, 1, 2)
    weights, shapes = torch.ones(1, 101, 1, 1, 1), torch.tensor([[1, width]])
    if way == "composition":
        found = module.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    else:
        found = module.MultiScaleDeformableAttnFunction.apply(value, shapes, torch.tensor([0]), locations, weights, 64)
    assert found.dtype == dtype
    position = locations[..., 0].double().flatten() * width - 0.5
    left = position.floor().long()
    row = value.double().flatten()
    expected = row[left] + (row[left + 1] - row[left]) * (position - left)
    close([found.flatten()], [expected], 2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_leaves_what_is_given_alone(mmcv, way):
    """As mmcv's functions do: its module casts value, locations and weights by its Linears."""
    tensors = problem(dtype=torch.float32)
    expected = with_gradients(ways(mmcv)[way], tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(ways(mmcv)[way], tensors)
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_a_location_a_pixel_outside_is_0(mmcv, way):
    tensors = problem()
    with torch.no_grad():
        tensors[1][0, 0, 0, 0, 0] = torch.tensor([(-1 + 0.5) / 4, 0.5])
        tensors[1][0, 1, 1, 1, 1] = torch.tensor([(2 + 0.5) / 2, 0.5])
    _, _, by_locations, by_weights = with_gradients(ways(mmcv)[way], tensors)
    for index in ((0, 0, 0, 0, 0), (0, 1, 1, 1, 1)):
        assert not by_locations[index].any()
        assert by_weights[index] == 0
    assert by_locations[0, 0, 1].all()


def test_mmcvs_module_reads_the_sizes_once(mmcv, monkeypatch):
    """Its layers are given one tensor of a GPU; what asks for its values besides is mmcv's own assertion."""
    layers = [mmcv.MultiScaleDeformableAttention(32, 4, 2, 2, batch_first=True) for _ in range(3)]
    shapes, reads, theirs = SHAPES.clone(), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or theirs(tensor))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    query, value = torch.randn(2, 5, 32), torch.randn(2, PIXELS, 32)
    with OperatorCalls() as calls:
        for layer in layers:
            query = layer(query, value=value, reference_points=torch.rand(2, 5, 2, 2), spatial_shapes=shapes)
        query.sum().backward()
    assert calls.names == [OPERATOR] * 3 + [BACKWARD] * 3
    assert [shapes_read is shapes for shapes_read in reads] == [True]


def test_mmcvs_functions_are_its_own_again(mmcv, monkeypatch):
    module = importlib.import_module(MODULE)
    user = type(sys)("imported_it_by_name")
    monkeypatch.setitem(sys.modules, user.__name__, user)
    held = user.multi_scale_deformable_attn_pytorch = module.multi_scale_deformable_attn_pytorch
    tensors = problem()
    omniops.disable("mmcv")
    function = module.MultiScaleDeformableAttnFunction
    assert module.multi_scale_deformable_attn_pytorch is held.__wrapped__
    assert "apply" not in vars(function)
    own = module.multi_scale_deformable_attn_pytorch
    with OperatorCalls() as calls:
        assert held(tensors[0], SHAPES, *tensors[1:]).equal(own(tensors[0], SHAPES, *tensors[1:]))
    assert calls.names == []
    user.multi_scale_deformable_attn_pytorch = own  # as one has it that imported it before
    omniops.enable("mmcv")
    with OperatorCalls() as calls:
        user.multi_scale_deformable_attn_pytorch(tensors[0], SHAPES, *tensors[1:])
    assert calls.names == [OPERATOR]
    omniops.disable("mmcv")
    assert user.multi_scale_deformable_attn_pytorch is own
    omniops.enable("mmcv")


# Packages that look like mmcv

PYTHON = """
import torch
from torch.autograd import Function
from mmcv import _ext as ext_module

class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return ext_module.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=im2col_step)

    @staticmethod
    def backward(ctx, grad_output):
        value, _, _, locations, weights = ctx.saved_tensors
        grads = [torch.zeros_like(each) for each in (value, locations, weights)]
        ext_module.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, *grads, im2col_step=64)
        return grads[0], None, None, grads[1], grads[2], None

def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return "composed"
"""
COMPILED = """
calls = []

def ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step):
    calls.append("theirs")
    return value.flatten(2)[:, :locations.shape[1]]

def ms_deform_attn_backward(*arguments, im2col_step):
    calls.append("theirs backwards")
"""
PATH = MODULE.replace(".", "/") + ".py"


@pytest.mark.parametrize("imported_before", [False, True])
def test_lite(project, imported_before):
    project({PATH: PYTHON, "mmcv/_ext.py": "raise ImportError"})
    omniops.enable("mmcv")
    module = importlib.import_module(MODULE)
    if imported_before:
        omniops.disable()
        assert module.multi_scale_deformable_attn_pytorch(*[None] * 4) == "composed"
        omniops.enable("mmcv")
    tensors = problem()
    value, locations, weights = tensors
    found = [
        with_gradients(lambda v, p, w: module.multi_scale_deformable_attn_pytorch(v, SHAPES, p, w), tensors),
        with_gradients(
            lambda v, p, w: module.MultiScaleDeformableAttnFunction.apply(v, SHAPES, STARTS, p, w, 64), tensors
        ),
    ]
    gradients = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    grad = torch.rand(found[0][0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mmcv_ext.ms_deform_attn_backward(value, SHAPES, STARTS, locations, weights, grad, *gradients, im2col_step=64)
    result = mmcv_ext.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, im2col_step=64)
    for actual in found:
        close(actual, [result, *gradients], 1e-12)
    omniops.disable()
    assert module.multi_scale_deformable_attn_pytorch(*[None] * 4) == "composed"


@pytest.mark.parametrize("devices", [None, ("cpu",)])
def test_a_compiled_mmcv_goes_on_to_serve_but_for_devices_that_are_named(project, devices):
    project({PATH: PYTHON, "mmcv/_ext.py": COMPILED})
    omniops.enable("mmcv", devices=devices)
    module = importlib.import_module(MODULE)
    tensors = problem()
    with OperatorCalls() as calls:
        with_gradients(
            lambda v, p, w: module.MultiScaleDeformableAttnFunction.apply(v, SHAPES, STARTS, p, w, 64), tensors
        )
    theirs = module.ext_module.calls
    if devices is None:
        assert (theirs, calls.names) == (["theirs", "theirs backwards"], [])
    else:
        assert (theirs, calls.names) == ([], [OPERATOR, BACKWARD])
        function = module.MultiScaleDeformableAttnFunction
        # Which that of mmcv has not.
        assert gradgradcheck(lambda v, p, w: function.apply(v, SHAPES, STARTS, p, w, 64), tensors, fast_mode=True)
    with OperatorCalls() as calls:  # which mmcv has compiled for CUDA alone
        module.multi_scale_deformable_attn_pytorch(tensors[0], SHAPES, *tensors[1:])
    assert calls.names == [OPERATOR]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_mmcvs_function_is_compiled_to_what_it_is(project, requires_grad):
    """With a graph break, as the sizes are read; so are functions that projects derive from it, of any arguments."""
    project({PATH: PYTHON, "mmcv/_ext.py": "raise ImportError"})
    omniops.enable("mmcv")
    function = importlib.import_module(MODULE).MultiScaleDeformableAttnFunction
    fork = type("Fork", (function,), {})
    other = type("Other", (function,), {"forward": staticmethod(lambda ctx, value, *_: value * 2)})
    value, locations, weights = (tensor.detach().requires_grad_(requires_grad) for tensor in problem())
    arguments = value, SHAPES, STARTS, locations, weights, 64
    attended = omniops.multi_scale_deform_attn(value, SHAPES, locations, weights)
    cases = (
        (function, arguments, attended),
        (fork, arguments, attended),
        (other, arguments, value * 2),
        (other, arguments[:1], value * 2),
    )
    for cls, inputs, expected in cases:
        torch._dynamo.reset()
        compiled = torch.compile(lambda *tensors, cls=cls: cls.apply(*tensors) + 1, backend="eager")
        assert_close(cls.apply(*inputs), expected)
        assert_close(compiled(*inputs), expected + 1)


def test_multi_scale_deformable_attention():
    shapes = torch.tensor([[4, 5], [2, 3]])
    value, weights = random_tensor(2, 26, 3, 4).requires_grad_(), random_tensor(2, 7, 3, 2, 2, seed=1).requires_grad_()
    locations = (random_tensor(2, 7, 3, 2, 2, 2, seed=2) * 0.4 + 0.5).requires_grad_()
    rows = []
    for n, q, m in itertools.product(range(2), range(7), range(3)):
        row = value.new_zeros(4)
        for level, (first, (h, w)) in enumerate(zip((0, 20), shapes.tolist(), strict=True)):
            # a border of zeros, so that samples fade out to a pixel beyond the map
            padded = F.pad(value[n, first : first + h * w, m].T.view(4, h, w), (2, 2, 2, 2))
            for point in range(2):
                x, y = locations[n, q, m, level, point] * torch.tensor([w, h]) - 0.5
                row = row + weights[n, q, m, level, point] * bilinear(padded, y + 2, x + 2)
        rows.append(row)
    expected = torch.stack(rows).view(2, 7, 12)
    grad = random_tensor(2, 7, 12, seed=3)
    wanted = torch.autograd.grad(expected, (value, locations, weights), grad)

    arguments = (value, shapes, torch.tensor([0, 20]), locations, weights)
    assert_near(mmcv_ext.ms_deform_attn_forward(*arguments, im2col_step=64), expected)
    grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
    mmcv_ext.ms_deform_attn_backward(*arguments, grad, *grads, im2col_step=64)
    for actual, one in zip(grads, wanted, strict=True):
        assert_near(actual, one)


@pytest.mark.parametrize("position", [-1.0, -1.25, 4.0, 6.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_location_a_pixel_or_more_off_the_map_has_no_gradient(axis, position):
    value, weights = torch.ones(1, 16, 1, 2), torch.ones(1, 1, 1, 1, 2)
    locations = torch.full((1, 1, 1, 1, 2, 2), 0.3)
    locations[..., 0, axis] = (position + 0.5) / 4
    shapes, first = torch.tensor([[4, 4]]), torch.tensor([0])
    grads = [torch.full_like(tensor, torch.nan) for tensor in (value, locations, weights)]
    value[:, ::3] = 3
    grad = torch.ones(1, 1, 2)
    mmcv_ext.ms_deform_attn_backward(value, shapes, first, locations, weights, grad, *grads, im2col_step=64)
    assert grads[1][..., 0, :].tolist() == [[[[[0, 0]]]]]
    assert (grads[1][..., 1, :] != 0).all()
    assert grads[2].flatten()[0] == 0
    assert grads[2].flatten()[1] > 0


def test_the_extension_names_what_is_wrong():
    value, locations, weights = (tensor.detach() for tensor in problem())
    tensors = {"value": value, "sampling_locations": locations, "attention_weights": weights.flatten(3)}
    numbers = {"value_spatial_shapes": SHAPES, "value_level_start_index": STARTS, "im2col_step": 64}
    gradients = {f"grad_{name}": torch.empty(1) for name in ("output", "value", "sampling_loc", "attn_weight")}
    for function, others in (
        (mmcv_ext.ms_deform_attn_forward, {}),
        (mmcv_ext.ms_deform_attn_backward, gradients),
    ):
        with pytest.raises(ValueError, match=r"^attention_weights must have shape \(N, Q, M, L, P\)"):
            function(**tensors, **numbers, **others)
