"""The operator as PyTorch sees it: schema, fake kernel, autograd, autocast, compile, export, empty inputs, errors."""

import re

import pytest
import torch

import omniops
from omniops.backends import cpu
from omniops.backends.reference import carafe as reference
from omniops.ops import carafe as ops

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
SCALES = pytest.mark.parametrize(("s", "t"), [(2, 1), (1, 2), (1, 1)])


def problem(device="cpu", dtype=torch.float32, n=2, c=4, h=3, w=6, k=3, g=2, s=2, t=1, requires_grad=False):
    """features, masks, grad."""
    rows, columns = -(-h // t) * s, -(-w // t) * s
    generator = torch.Generator().manual_seed(0)
    shapes = (n, c, h, w), (n, g * k * k, rows, columns), (n, c, rows, columns)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(requires_grad) for shape in shapes]


@ON_DEVICES
@SCALES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(device, s, t, layout):
    features, masks, grad = (
        x.contiguous(memory_format=layout).detach().requires_grad_() for x in problem(device, s=s, t=t)
    )
    sizes = (3, 2, s, t)
    torch.library.opcheck(torch.ops.omniops.carafe.default, (features, masks, *sizes))
    for inputs in ((features, masks), (features, None), (None, masks)):
        torch.library.opcheck(torch.ops.omniops.carafe_backward.default, (grad, *inputs, 3, 6, *sizes))


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "mps"])
@SCALES
def test_gradients_of_first_and_second_order(device, s, t):
    features, masks, grad = problem(device, torch.float64, n=1, w=4, s=s, t=t, requires_grad=True)
    sizes = (3, 2, s, t)
    for operator, inputs in (
        (lambda f, m: torch.ops.omniops.carafe(f, m, *sizes), (features, masks)),
        (lambda g, f, m: torch.ops.omniops.carafe_backward(g, f, m, 3, 4, *sizes), (grad, features, masks)),
        (lambda g, m: torch.ops.omniops.carafe_backward(g, None, m, 3, 4, *sizes)[0], (grad, masks)),
        (lambda g, f: torch.ops.omniops.carafe_backward(g, f, None, 3, 4, *sizes)[1], (grad, features)),
    ):
        assert torch.autograd.gradcheck(operator, inputs)
        assert torch.autograd.gradgradcheck(operator, inputs)


def test_gradients_of_third_order():
    features, masks, _ = problem(dtype=torch.float64, requires_grad=True)
    out = omniops.carafe(features, masks, 3, 2, 2).pow(2).sum()
    (first,) = torch.autograd.grad(out, features, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), masks, create_graph=True)
    (third,) = torch.autograd.grad(second.pow(2).sum(), features)
    assert third.isfinite().all()
    assert third.abs().max() > 0


def test_only_what_is_asked_for_is_differentiated(monkeypatch):
    called = []
    operator = ops._carafe_backward
    monkeypatch.setattr(ops, "_carafe_backward", lambda *args: called.append(args[1:3]) or operator(*args))
    features, masks, _ = problem()
    omniops.carafe(features.requires_grad_(), masks, 3, 2, 2).sum().backward()
    assert called[-1][0] is None
    assert torch.equal(called[-1][1], masks)
    omniops.carafe(features.detach(), masks.requires_grad_(), 3, 2, 2).sum().backward()
    assert torch.equal(called[-1][0], features)
    assert called[-1][1] is None
    assert len(called) == 2


@pytest.mark.parametrize("first", ["features", "masks"])
@pytest.mark.parametrize("second", ["grad", "features", "masks"])
def test_a_second_derivative_of_one_gradient_alone(first, second):
    """Where the other gradient has no cotangent."""
    features, masks, grad = problem(dtype=torch.float64, requires_grad=True)
    inputs = {"features": features, "masks": masks, "grad": grad}
    oracle = reference.carafe(features, masks, 3, 2, 2, 1)
    derivatives = []
    for result in (omniops.carafe(features, masks, 3, 2, 2), oracle):
        (by,) = torch.autograd.grad(result, inputs[first], grad, create_graph=True)
        derivatives.append(torch.autograd.grad(by.pow(2).sum(), inputs[second], allow_unused=True)[0])
    if first == second:
        assert derivatives == [None, None]
    else:
        torch.testing.assert_close(*derivatives)


@pytest.mark.slow
@ON_DEVICES
def test_compile_without_a_graph_break(device):
    def function(f, m):
        return omniops.carafe(f * 2, m.softmax(1), 3, 2, 2).sin()

    compiled = torch.compile(function, fullgraph=True)
    for height in (3, 5):  # the second shape recompiles with dynamic sizes
        f, m, g = problem(device, h=height, requires_grad=True)
        expected = function(f, m)
        expected_grads = torch.autograd.grad(expected, (f, m), g)
        result = compiled(f, m)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(result, (f, m), g), expected_grads, rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_sizes():
    model = omniops.CARAFEPack(4, 2, compressed_channels=4).eval()
    size = torch.export.Dim("size", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(1, 4, 6, 6),), dynamic_shapes={"x": {2: size, 3: size}})
    assert any(node.target is torch.ops.omniops.carafe.default for node in exported.graph.nodes)
    other = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(exported.module()(other), model(other))


def test_downsampling_exports_with_dynamic_sizes_beside_a_strided_convolution():
    """Whose masks it takes: export must see that both round the size up alike."""

    class Down(torch.nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.stride = stride
            self.predictor = torch.nn.Conv2d(4, 9, 3, stride=stride, padding=1)

        def forward(self, x):
            return omniops.carafe_downsample(x, self.predictor(x).softmax(1), 3, 1, self.stride)

    for stride in (2, 3):
        model = Down(stride)
        height, width = (torch.export.Dim(name, min=4, max=64) for name in ("height", "width"))
        dynamic = {"x": {2: height, 3: width}}
        exported = torch.export.export(model, (torch.randn(1, 4, 6, 9),), dynamic_shapes=dynamic)
        for size in ((7, 4), (10, 11), (12, 64)):
            other = torch.randn(1, 4, *size)
            torch.testing.assert_close(exported.module()(other), model(other))


def test_the_tags_are_kept():
    # Inductor must not hand over another memory format than the fake kernel saw. PyTorch takes that for granted of
    # operators without a tag, so nothing else here would notice its loss, but a user can set another default.
    for operator in ("carafe", "carafe_backward"):
        tags = getattr(torch.ops.omniops, operator).default.tags
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order} <= set(tags)


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_within_autocast_is_the_same_bits_as_outside(device, dtype):
    """Of every order: derivatives have the dtypes of their forward, wherever they are taken."""
    features, masks, grad = problem(device, requires_grad=True)

    def derivatives(enabled):
        result = omniops.carafe(features, masks, 3, 2, 2)
        with torch.autocast(device, dtype, enabled=enabled):
            first = torch.autograd.grad(result, (features, masks), grad, create_graph=True)
            # Each backward operator by each of its arguments, the one that is the forward again among them.
            second = [
                torch.autograd.grad(by, (grad, other), torch.ones_like(by), create_graph=True, retain_graph=True)
                for by, other in zip(first, (masks, features), strict=True)
            ]
            third = torch.autograd.grad(second[0][0], masks, torch.ones_like(second[0][0]))
        return [*first, *second[0], *second[1], *third]

    outside, within = derivatives(False), derivatives(True)
    assert all(x.dtype == torch.float32 for x in within)
    for x, y in zip(within, outside, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "mps"])
def test_autocast_leaves_float64_as_it_is(device):
    features, masks, grad = problem(device, torch.float64, requires_grad=True)
    expected = omniops.carafe(features, masks, 3, 2, 2)
    with torch.autocast(device, torch.bfloat16):
        result = omniops.carafe(features, masks, 3, 2, 2)
        gradients = torch.autograd.grad(result, (features, masks), grad)
    assert result.dtype == torch.float64
    assert torch.equal(result, expected)
    for x, y in zip(gradients, torch.autograd.grad(expected, (features, masks), grad), strict=True):
        assert torch.equal(x, y)
    with torch.autocast(device, torch.bfloat16), pytest.raises(TypeError, match="masks must have the dtype of feat"):
        omniops.carafe(features, masks.float(), 3, 2, 2)


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_and_gradients_come_back_in_the_dtype_of_the_inputs(device, dtype):
    features, masks, _ = problem(device, requires_grad=True)
    with torch.autocast(device, dtype):
        result = omniops.carafe(features, masks.detach().to(dtype).requires_grad_(), 3, 2, 2)
    assert result.dtype == dtype
    expected = omniops.carafe(features.to(dtype), masks.to(dtype), 3, 2, 2)
    assert torch.equal(result, expected)
    result.sum().backward()
    assert features.grad.dtype == torch.float32


def test_autocast_is_registered_for_every_device_that_has_it():
    for key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS"):
        for name in ("carafe", "carafe_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{name}", key)


def test_every_device_without_its_own_kernel_is_served_by_the_reference():
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("omniops::carafe", "XPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("omniops::carafe", "MPS")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("omniops::carafe", "CPU") == cpu.AVAILABLE


@ON_DEVICES
@pytest.mark.parametrize("empty", ["n", "c", "h", "w"])
def test_empty_inputs_give_empty_results_and_gradients(device, empty):
    features, masks, _ = problem(device, **{empty: 0}, requires_grad=True)
    result = omniops.carafe(features, masks, 3, 2, 2)
    assert result.numel() == 0
    assert result.shape == (features.shape[0], features.shape[1], *masks.shape[2:])
    result.sum().backward()
    assert features.grad.shape == features.shape
    assert masks.grad.shape == masks.shape
    assert not masks.grad.any()


def test_more_than_two_to_the_31_elements_have_a_shape():
    features = torch.empty(2, 1024, 1024, 1024, device="meta")
    result = omniops.carafe(features, torch.empty(2, 25, 2048, 2048, device="meta"), 5, 1, 2)
    assert result.shape == (2, 1024, 2048, 2048)


def test_downsampling_is_the_strided_convolution_where_the_masks_are_its_weights():
    features, weight = torch.randn(2, 3, 7, 10), torch.randn(9)
    masks = weight[None, :, None, None].expand(2, 9, 4, 5)
    result = omniops.carafe_downsample(features, masks, 3, 1, 2)
    kernel = weight.view(1, 1, 3, 3).expand(3, 1, 3, 3)
    expected = torch.nn.functional.conv2d(features, kernel, stride=2, padding=1, groups=3)
    torch.testing.assert_close(result, expected)


def test_mmcv_names():
    assert omniops.carafe_naive is omniops.carafe
    assert omniops.CARAFENaive is omniops.CARAFE
    assert omniops.nn.CARAFEPack is omniops.CARAFEPack


F, M = torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1], M, 3, 1, 2), TypeError, "features must be a torch.Tensor, got list"),
        ((F, None, 3, 1, 2), TypeError, "masks must be a torch.Tensor, got NoneType"),
        ((F, M, 3.0, 1, 2), TypeError, "kernel_size must be an int, got float"),
        ((F, M, True, 1, 2), TypeError, "kernel_size must be an int, got bool"),
        ((F, M, 3, "1", 2), TypeError, "group_size must be an int, got str"),
        ((F, M, 3, 1, 2.0), TypeError, "scale_factor must be an int, got float"),
        ((F, M, 0, 1, 2), ValueError, "kernel_size must be at least 1, got 0"),
        ((F, M, 4, 1, 2), ValueError, "kernel_size must be odd, got 4"),
        ((F, M, 3, 3, 2), ValueError, "group_size must divide the 4 channels of features, got 3"),
        ((F, M, 3, 1, -1), ValueError, "scale_factor must be at least 1, got -1"),
        ((F[0], M, 3, 1, 2), ValueError, "features must have 4 dimensions (N, C, H, W), got shape (4, 3, 3)"),
        ((F, M[0], 3, 1, 2), ValueError, "masks must have 4 dimensions (N, C, H, W), got shape (9, 6, 6)"),
        ((F.long(), M.long(), 3, 1, 2), TypeError, "features must be float64, float32, float16 or bfloat16, got int64"),
        ((F, M.half(), 3, 1, 2), TypeError, "masks must have the dtype of features, float32, got float16"),
        ((F, M.to("meta"), 3, 1, 2), ValueError, "masks must be on the device of features, cpu, got meta"),
        ((F, M, 5, 1, 2), ValueError, "= (1, 25, 6, 6), got (1, 9, 6, 6)"),
        ((F, M, 3, 1, 3), ValueError, "= (1, 9, 9, 9), got (1, 9, 6, 6)"),
        ((F.expand(2, -1, -1, -1), M, 3, 1, 2), ValueError, "= (2, 9, 6, 6), got (1, 9, 6, 6)"),
        ((F, M, 2**63, 1, 2), ValueError, f"kernel_size must be below 2**63, got {2**63}"),
        ((F, M, 3, 2**64, 2), ValueError, f"group_size must be below 2**63, got {2**64}"),
        (
            (F.to_sparse(), M, 3, 1, 2),
            TypeError,
            "features must be a dense tensor, got a sparse_coo one: convert it with features.to_dense()",
        ),
        (
            (F, M.to_mkldnn(), 3, 1, 2),
            TypeError,
            "masks must be a dense tensor, got a _mkldnn one: convert it with masks.to_dense()",
        ),
        (
            (torch.nested.nested_tensor([F[0]]), M, 3, 1, 2),
            TypeError,
            "features must be a dense tensor, got a nested one: convert it with features.to_padded_tensor(0)",
        ),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error) as caught:
        omniops.carafe(*arguments)
    assert message in str(caught.value)


def test_errors_of_downsampling_and_of_the_gradients():
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        omniops.carafe_downsample(F, M, 3, 1, 0)
    with pytest.raises(ValueError, match=f"stride must be below {re.escape('2**63')}, got {2**63}"):
        omniops.carafe_downsample(F, M, 3, 1, 2**63)
    with pytest.raises(TypeError, match="features must be a dense tensor, got a sparse_coo one"):
        omniops.carafe_downsample(F.to_sparse(), M, 3, 1, 2)
    with pytest.raises(ValueError, match=r"grad must have shape .* = \(1, 4, 6, 6\), got \(1, 4, 3, 3\)"):
        torch.ops.omniops.carafe_backward(F, None, M, 3, 3, 3, 1, 2, 1)
    grad = torch.zeros(1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"features must have shape .* = \(1, 4, 3, 3\), got \(1, 4, 6, 6\)"):
        torch.ops.omniops.carafe_backward(grad, grad, M, 3, 3, 3, 1, 2, 1)
    with pytest.raises(ValueError, match=r"masks must have shape .* = \(1, 9, 6, 6\), got \(1, 4, 6, 6\)"):
        torch.ops.omniops.carafe_backward(grad, F, grad, 3, 3, 3, 1, 2, 1)


def test_errors_give_the_shape_of_masks_in_the_callers_arguments():
    def message(function, *arguments):
        with pytest.raises(ValueError, match="masks must have shape") as caught:
            function(*arguments)
        return str(caught.value)

    assert message(omniops.carafe, F, M, 3, 1, 3) == (
        "masks must have shape (N, group_size * kernel_size**2, H * scale_factor, W * scale_factor) = (1, 9, 9, 9), "
        "got (1, 9, 6, 6)"
    )
    assert message(omniops.carafe_downsample, F, M, 3, 1, 2) == (
        "masks must have shape (N, group_size * kernel_size**2, ceil(H / stride), ceil(W / stride)) = (1, 9, 2, 2), "
        "got (1, 9, 6, 6)"
    )
    assert message(torch.ops.omniops.carafe, F, M, 3, 1, 2, 3) == (
        "masks must have shape (N, group_size * kernel_size**2, ceil(H / stride) * scale_factor, "
        "ceil(W / stride) * scale_factor) = (1, 9, 2, 2), got (1, 9, 6, 6)"
    )


def test_checks_come_before_any_kernel_of_the_raw_operator():
    with pytest.raises(ValueError, match="masks must have shape"):
        torch.ops.omniops.carafe(F, M, 5, 1, 2, 1)
