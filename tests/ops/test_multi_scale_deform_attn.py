"""The operator as PyTorch sees it: schema, fake kernel, autograd, autocast, compile, export, empty inputs, errors."""

import itertools

import numpy as np
import pytest
import torch
from differentiable import DEVICES

import omniops
from omniops.cli.cases.multi_scale_deform_attn import grid_sample_composition
from omniops.ops import multi_scale_deform_attn as ops

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
IN_FLOAT64 = pytest.mark.parametrize("device", [device for device in DEVICES if device != "mps"])
OPERATORS = ("multi_scale_deform_attn", "multi_scale_deform_attn_backward")
SIZES = ((4, 5), (3, 2))
FLAT = [4, 5, 3, 2]


def problem(device="cpu", dtype=torch.float32, n=2, q=3, m=2, d=4, points=2, requires_grad=False):
    """value, sampling_locations, attention_weights, grad. No sample lies on a pixel, nor half between two."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, 26, m, d), (n, q, m, 2, points), (n, q, m * d)
    value, weights, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    positions = torch.randint(-8, 56, (*shapes[1], 2), generator=generator)
    tensors = value, (positions + 0.5) / 48, weights, grad
    return [x.to(device, dtype).requires_grad_(requires_grad) for x in tensors]


def call(value, locations, weights, **options):
    return omniops.multi_scale_deform_attn(value, SIZES, locations, weights, **options)


def operator_of(tensors, grad, discrete=False, flat=False):
    """Both operators with all their arguments; ``flat`` makes one axis of levels and points."""
    value, locations, weights = tensors
    points = [weights.shape[4]] * 2
    if flat:
        locations, weights = (x.detach().flatten(3, 4).requires_grad_() for x in (locations, weights))
    others = FLAT, locations, weights
    return {
        "multi_scale_deform_attn": (value, *others, points, discrete),
        "multi_scale_deform_attn_backward": (grad, value, *others, points, discrete, [True] * 3),
    }


@IN_FLOAT64
def test_it_is_the_composition_of_grid_sample(device):
    *tensors, grad = problem(device, torch.float64, requires_grad=True)
    result = call(*tensors)
    value, *points = tensors
    expected = grid_sample_composition(value, SIZES, *points)
    torch.testing.assert_close(result, expected)
    found = torch.autograd.grad(result, tensors, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, grad))


@ON_DEVICES
def test_levels_may_have_different_points(device):
    """The results of each level by itself, summed."""
    value, _, _, _ = problem(device)
    generator = torch.Generator().manual_seed(1)
    locations = torch.rand((2, 3, 2, 4, 2), generator=generator).to(device)
    weights = torch.rand((2, 3, 2, 4), generator=generator).to(device)
    found = omniops.multi_scale_deform_attn(value, SIZES, locations, weights, [3, 1])
    levels = value.split([20, 6], 1)
    results = [
        omniops.multi_scale_deform_attn(v, [size], x[:, :, :, None], w[:, :, :, None])
        for v, size, x, w in zip(levels, SIZES, locations.split([3, 1], 3), weights.split([3, 1], 3), strict=True)
    ]
    torch.testing.assert_close(found, sum(results))


@ON_DEVICES
def test_the_method_discrete_takes_rt_detrv2s_pixel(device):
    """(x * W + 0.5, y * H + 0.5) rounded towards zero, and the nearest pixel of the map for what lies outside."""
    value, locations, weights, _ = problem(device, requires_grad=True)
    result = call(value, locations, weights, method="discrete")
    expected = torch.zeros(2, 3, 2, 4)
    pixels, positions, factors = (x.detach().cpu() for x in (value, locations, weights))
    for n, q, m, level, p in itertools.product(range(2), range(3), range(2), range(2), range(2)):
        height, width = SIZES[level]
        x, y = (float(coordinate) for coordinate in positions[n, q, m, level, p])
        column, row = (
            min(max(int(coordinate * size + 0.5), 0), size - 1) for coordinate, size in ((x, width), (y, height))
        )
        expected[n, q, m] += factors[n, q, m, level, p] * pixels[n, 20 * level + row * width + column, m]
    torch.testing.assert_close(result.detach().cpu(), expected.flatten(2))
    result.sum().backward()
    assert not locations.grad.any()
    assert value.grad.any()
    assert weights.grad.any()
    result = call(value, locations, weights, method="discrete")
    (by_locations,) = torch.autograd.grad(result, locations, torch.full_like(result, torch.inf))
    assert not by_locations.any()


@pytest.mark.slow
@ON_DEVICES
@pytest.mark.parametrize(("discrete", "flat"), [(False, True), (True, False)])
def test_opcheck(device, discrete, flat):
    *tensors, grad = problem(device, points=1, requires_grad=True)
    for name, arguments in operator_of(tensors, grad, discrete, flat).items():
        torch.library.opcheck(getattr(torch.ops.omniops, name).default, arguments)


@ON_DEVICES
def test_opcheck_where_sizes_are_one_and_of_each_subset_of_gradients(device):
    """But for the traces of the derivative, which take long."""
    for n, q, m, d in itertools.product((1, 2), repeat=4):
        *tensors, grad = problem(device, n=n, q=q, m=m, d=d, requires_grad=True)
        tensors[0] = tensors[0].detach().mT.contiguous().mT.requires_grad_()
        arguments = operator_of(tensors, grad)
        for wanted in itertools.product((False, True), repeat=3):
            arguments["multi_scale_deform_attn_backward"] = (
                *arguments["multi_scale_deform_attn_backward"][:-1],
                list(wanted),
            )
            for name in OPERATORS:
                torch.library.opcheck(
                    getattr(torch.ops.omniops, name).default,
                    arguments[name],
                    test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
                )


@IN_FLOAT64
def test_gradients_of_first_and_second_order(device):
    *tensors, grad = problem(device, torch.float64, n=1, q=2, d=2, points=1, requires_grad=True)
    for name, arguments in operator_of(tensors, grad).items():
        differentiable = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]

        def function(*values, name=name, arguments=arguments, differentiable=differentiable):
            replaced = list(arguments)
            for i, value in zip(differentiable, values, strict=True):
                replaced[i] = value
            return getattr(torch.ops.omniops, name)(*replaced)

        inputs = [arguments[i] for i in differentiable]
        tolerance = 0 if device == "cpu" else 1e-10
        assert torch.autograd.gradcheck(function, inputs, nondet_tol=tolerance)
        assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=tolerance)


def test_gradients_where_the_tensors_depend_on_one_another():
    value, locations, _, _ = problem(dtype=torch.float64, n=1, q=2, points=1)

    def function(x):
        weights = x.prod(-1)
        return call(value * weights.sum(), x, weights).sum(2)

    assert torch.autograd.gradcheck(function, locations.requires_grad_())
    assert torch.autograd.gradgradcheck(function, locations)


def test_gradients_of_third_order():
    value, locations, weights, _ = problem(dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(call(value, locations, weights).pow(2).sum(), locations, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), weights, create_graph=True)
    (third,) = torch.autograd.grad(second.pow(2).sum(), value)
    assert third.isfinite().all()
    assert third.abs().max() > 0


def test_second_gradients_of_each_tensor_alone():
    """Those of the result's gradient, of value, of locations and of weights are what they are beside the others."""
    operator = torch.ops.omniops.multi_scale_deform_attn_backward

    def second(differentiated):
        *tensors, grad = (x.requires_grad_(i in differentiated) for i, x in enumerate(problem(dtype=torch.float64)))
        inputs = [*tensors, grad]
        results = operator(*operator_of(tensors, grad)["multi_scale_deform_attn_backward"])
        total = sum(x.pow(2).sum() for x in results if x.requires_grad)
        return torch.autograd.grad(total, [inputs[i] for i in differentiated])

    together = second(range(4))
    for i, expected in enumerate(together):
        (alone,) = second([i])
        torch.testing.assert_close(alone, expected)


def test_only_what_is_asked_for_is_differentiated(monkeypatch):
    called = []
    operator = ops._multi_scale_deform_attn_backward

    def recorded(*args):
        called.append(tuple(args[-1]))
        return operator(*args)

    monkeypatch.setattr(ops, "_multi_scale_deform_attn_backward", recorded)
    for i in range(3):
        *tensors, _ = problem()
        call(*(x.requires_grad_(j == i) for j, x in enumerate(tensors))).sum().backward()
        assert called.pop() == tuple(j == i for j in range(3))
        assert [x.grad is not None for x in tensors] == [j == i for j in range(3)]


@pytest.mark.slow
@ON_DEVICES
def test_compile_without_a_graph_break(device):
    def function(value, locations, weights):
        return call(value * 2, locations, weights.sin()).sin()

    compiled = torch.compile(function, fullgraph=True)
    for queries in (3, 7):  # the second shape recompiles with dynamic sizes
        *tensors, grad = problem(device, q=queries, requires_grad=True)
        result, expected = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(result, tensors, grad),
            torch.autograd.grad(expected, tensors, grad),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.slow
def test_compile_and_export_with_maps_of_dynamic_size():
    """The sizes of the levels are those of maps, as in a model."""

    class Model(torch.nn.Module):
        def forward(self, fine, coarse, locations, weights):
            maps = fine, coarse
            value = torch.cat([x.flatten(2).mT.unflatten(2, (2, 4)) for x in maps], 1)
            sizes = [(x.shape[2], x.shape[3]) for x in maps]
            return omniops.multi_scale_deform_attn(value, sizes, locations, weights)

    def maps(height, width):
        _, locations, weights, _ = problem()
        fine, coarse = torch.randn(2, 8, height, width), torch.randn(2, 8, height - 1, width + 1)
        return fine, coarse, locations, weights

    compiled = torch.compile(Model(), fullgraph=True, dynamic=True)
    for size in ((5, 6), (8, 3)):
        inputs = maps(*size)
        torch.testing.assert_close(compiled(*inputs), Model()(*inputs), rtol=1e-5, atol=1e-5)
    auto = torch.export.Dim.AUTO
    dynamic = {"fine": {2: auto, 3: auto}, "coarse": {2: auto, 3: auto}, "locations": None, "weights": None}
    program = torch.export.export(Model(), maps(5, 6), dynamic_shapes=dynamic)
    assert any(node.target is torch.ops.omniops.multi_scale_deform_attn.default for node in program.graph.nodes)
    for size in ((5, 6), (9, 4)):
        inputs = maps(*size)
        torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_tensor_of_sizes_on_a_gpu_is_read_once_until_it_changes(device, dtype, monkeypatch):
    value, locations, weights, _ = problem(device)
    expected = call(value, locations, weights)
    transposed = omniops.multi_scale_deform_attn(value, [(5, 4), (2, 3)], locations, weights)
    sizes = torch.tensor(SIZES, dtype=dtype, device=device)
    read = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(x.device.type) or real(x))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)  # as of a GPU, where there is none
    for _ in range(3):
        assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), expected)
    assert read == [device]
    sizes.copy_(torch.tensor([(5, 4), (2, 3)]))
    assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), transposed)
    assert len(read) == 2
    omniops.multi_scale_deform_attn(value, sizes.clone(), locations, weights)
    assert len(read) == 3
    with torch.inference_mode():  # whose tensors have no version
        sizes = torch.tensor(SIZES, device=device)
        assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), expected)
        sizes.copy_(torch.tensor([(5, 4), (2, 3)]))
        assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), transposed)


def test_a_tensor_of_sizes_may_share_its_memory_with_numpy():
    value, locations, weights, _ = problem()
    memory = np.array(SIZES)
    sizes = torch.from_numpy(memory)
    expected = call(value, locations, weights)
    assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), expected)
    memory[:] = [(5, 4), (2, 3)]  # as many pixels, and the tensor's version is the same
    transposed = omniops.multi_scale_deform_attn(value, [(5, 4), (2, 3)], locations, weights)
    assert not torch.equal(transposed, expected)
    assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), transposed)


def test_sizes_are_pairs_of_any_kind():
    value, locations, weights, _ = problem()
    expected = call(value, locations, weights)
    kinds = list(SIZES), [list(pair) for pair in SIZES], np.array(SIZES), [torch.Size(pair) for pair in SIZES]
    for sizes in (*kinds, torch.tensor(SIZES)):
        assert torch.equal(omniops.multi_scale_deform_attn(value, sizes, locations, weights), expected)


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_value_and_leaves_locations_in_float32(device, dtype):
    value, locations, weights, _ = problem(device, requires_grad=True)
    with torch.autocast(device, dtype):
        result = call(value, locations, weights)
    assert result.dtype == dtype
    assert torch.equal(result, call(value.to(dtype), locations, weights))
    result.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (value, locations, weights))
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast(device, dtype):
        mixed = call(value.to(other), locations.to(other), weights.to(dtype))
    assert mixed.dtype == dtype
    _, _, *points = ops._cast(dtype, value, FLAT, locations.to(dtype), weights.to(other))
    assert [x.dtype for x in points] == [dtype, torch.float32]


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_within_autocast_is_the_same_bits_as_outside(device, dtype):
    """Of first and second order: derivatives have the dtypes of their forward, wherever they are taken."""
    *tensors, grad = problem(device, requires_grad=True)

    def derivatives(enabled):
        result = call(*tensors)
        with torch.autocast(device, dtype, enabled=enabled):
            first = torch.autograd.grad(result, tensors, grad, create_graph=True)
            return *first, *torch.autograd.grad(first, [grad, *tensors], [torch.ones_like(x) for x in first])

    outside, within = derivatives(False), derivatives(True)
    assert all(x.dtype == torch.float32 for x in within)
    tolerance = 0 if device == "cpu" else 1e-4
    torch.testing.assert_close(within, outside, rtol=tolerance, atol=tolerance)


@IN_FLOAT64
def test_autocast_leaves_float64_as_it_is(device):
    *tensors, _ = problem(device, torch.float64)
    with torch.autocast(device, torch.bfloat16):
        result = call(*tensors)
    assert result.dtype == torch.float64
    assert torch.equal(result, call(*tensors))


def test_every_device_is_served_and_has_autocast():
    for name in OPERATORS:
        for key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{name}", key)
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"omniops::{name}", "XPU")
        tags = getattr(torch.ops.omniops, name).default.tags
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order} <= set(tags)


@ON_DEVICES
@pytest.mark.parametrize("empty", ["n", "q", "m", "d", "points"])
def test_empty_inputs_give_empty_results_and_gradients(device, empty):
    *tensors, grad = problem(device, **{empty: 0}, requires_grad=True)
    result = call(*tensors)
    assert result.shape == grad.shape
    assert not result.any()
    result.sum().backward()
    for x in tensors:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


@ON_DEVICES
def test_levels_without_pixels_give_nothing(device):
    _, locations, weights, _ = problem(device)
    value = torch.zeros(2, 0, 2, 4, device=device, requires_grad=True)
    result = omniops.multi_scale_deform_attn(value, [(0, 5), (3, 0)], locations, weights)
    assert result.shape == (2, 3, 8)
    assert not result.any()


V, X, A = torch.zeros(1, 26, 2, 4), torch.zeros(1, 3, 2, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2)
X_FLAT, A_FLAT = X.flatten(3, 4), A.flatten(3, 4)
OF_LEVELS = {"sampling_locations": X_FLAT, "attention_weights": A_FLAT}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value": [1]}, TypeError, "value must be a torch.Tensor, got list"),
        ({"sampling_locations": None}, TypeError, "sampling_locations must be a torch.Tensor, got NoneType"),
        ({"attention_weights": 1.0}, TypeError, "attention_weights must be a torch.Tensor, got float"),
        ({"value": V[0]}, ValueError, "value must have shape (N, S, M, D), got (26, 2, 4)"),
        (
            {"value": V[:, 1:]},
            ValueError,
            "value must have the 26 pixels of spatial_shapes [(4, 5), (3, 2)], got shape",
        ),
        ({"value": V.long()}, TypeError, "value must be float64, float32, float16 or bfloat16, got int64"),
        ({"spatial_shapes": 3}, TypeError, "spatial_shapes must be a tensor (L, 2) of integers or pairs of height and"),
        ({"spatial_shapes": [(4, 5, 6)]}, TypeError, "pairs of height and width, got [(4, 5, 6)]"),
        ({"spatial_shapes": [(4, 5.0)]}, TypeError, "spatial_shapes must hold ints, got float"),
        (
            {"spatial_shapes": [(2**70, 5), (3, 2)]},
            ValueError,
            "spatial_shapes must be at least 0 and below 2**63, got",
        ),
        ({"spatial_shapes": torch.tensor(SIZES, device="meta")}, ValueError, "got a meta tensor: give a list of pairs"),
        (
            {"spatial_shapes": torch.tensor(SIZES).to_sparse()},
            TypeError,
            "spatial_shapes must be a dense tensor, got a",
        ),
        ({"spatial_shapes": [(4, -5), (3, 2)]}, ValueError, "spatial_shapes must be at least 0, got -5"),
        ({"spatial_shapes": [], **OF_LEVELS, "points_per_level": []}, ValueError, "of at least one level, got []"),
        ({"spatial_shapes": torch.tensor([4, 5])}, ValueError, "spatial_shapes must have shape (L, 2), got (2,)"),
        ({"spatial_shapes": torch.tensor(SIZES) * 1.0}, TypeError, "spatial_shapes must be of integers, got float32"),
        (
            {"spatial_shapes": [(26, 1)]},
            ValueError,
            "attention_weights must have shape (N, Q, M, L, P) with the 1 levels of spatial_shapes, or "
            "points_per_level be given, got (1, 3, 2, 2, 2)",
        ),
        (
            {"attention_weights": A_FLAT},
            ValueError,
            "with the 2 levels of spatial_shapes, or points_per_level be given",
        ),
        (
            {"sampling_locations": X[:, :2]},
            ValueError,
            "sampling_locations must have shape (N, Q, M, L, P, 2) = (1, 3, 2, 2, 2, 2), as attention_weights has, got",
        ),
        (
            {"value": V.repeat(2, 1, 1, 1)},
            ValueError,
            "attention_weights must have shape (N, Q, M, L, P) = (2, 3, 2, 2, 2), got",
        ),
        (
            {**OF_LEVELS, "points_per_level": [4]},
            ValueError,
            "a number for each of the 2 levels of spatial_shapes, got [4]",
        ),
        (
            {**OF_LEVELS, "points_per_level": 4},
            TypeError,
            "points_per_level must be numbers, one for each level, got 4",
        ),
        ({**OF_LEVELS, "points_per_level": [2, 2.0]}, TypeError, "points_per_level must hold ints, got float"),
        (
            {**OF_LEVELS, "points_per_level": [2, -(2**70)]},
            ValueError,
            "points_per_level must be at least 0 and below 2**63, got -1180591620717411303424",
        ),
        ({**OF_LEVELS, "points_per_level": [5, -1]}, ValueError, "points_per_level must be at least 0, got -1"),
        ({**OF_LEVELS, "points_per_level": [2, 3]}, ValueError, "(N, Q, M, K) = (1, 3, 2, 5), got (1, 3, 2, 4)"),
        (
            {"points_per_level": [2, 2]},
            ValueError,
            "attention_weights must have shape (N, Q, M, K), got (1, 3, 2, 2, 2)",
        ),
        (
            {**OF_LEVELS, "sampling_locations": X_FLAT[..., :1], "points_per_level": [2, 2]},
            ValueError,
            "sampling_locations must have shape (N, Q, M, K, 2) = (1, 3, 2, 4, 2), got (1, 3, 2, 4, 1)",
        ),
        ({"method": "nearest"}, ValueError, "method must be 'default' or 'discrete', got 'nearest'"),
        ({"value": V.to("meta")}, ValueError, "sampling_locations must be on the device of value, meta, got cpu"),
        ({"attention_weights": A.to("meta")}, ValueError, "move it there with attention_weights.to(value.device)"),
        ({"sampling_locations": X.half()}, TypeError, "sampling_locations must have the dtype of value, float32, got"),
        ({"attention_weights": A.double()}, TypeError, "attention_weights must have the dtype of value, float32, got"),
        (
            {"value": V.half(), "attention_weights": A.bfloat16()},
            TypeError,
            "the dtype of value, float16, got bfloat16",
        ),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    kwargs = {"value": V, "spatial_shapes": SIZES, "sampling_locations": X, "attention_weights": A, **arguments}
    with pytest.raises(error) as caught:
        omniops.multi_scale_deform_attn(**kwargs)
    assert message in str(caught.value)
