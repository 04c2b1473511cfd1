"""The operator as PyTorch sees it: schema, fake kernel, autograd, autocast, compile, export, empty inputs, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import omniops
from omniops.backends import cpu
from omniops.ops import deform_conv2d as ops

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
IN_FLOAT64 = pytest.mark.parametrize("device", [device for device in DEVICES if device != "mps"])
OPERATORS = ("deform_conv2d", "deform_conv2d_backward")
# Of every pair two numbers that differ.
KERNEL, NUMBERS = (3, 2), ([2, 1], [2, 1], [1, 2])
GROUPS = 2
TENSORS = ("input", "offset", "weight", "bias", "mask")


def problem(
    device="cpu", dtype=torch.float32, n=2, c=4, h=4, w=5, c_out=6, kernel=KERNEL, offset_groups=2, requires_grad=False
):
    """input, offset, weight, bias, mask, grad. Offsets are odd sixteenths: no sample lies on a pixel, where there
    is no derivative."""
    generator = torch.Generator().manual_seed(0)
    size = [
        (length + 2 * NUMBERS[1][i] - NUMBERS[2][i] * (kernel[i] - 1) - 1) // NUMBERS[0][i] + 1
        for i, length in enumerate((h, w))
    ]
    taps = offset_groups * kernel[0] * kernel[1]
    shapes = (n, c, h, w), (n, 2 * taps, *size), (c_out, c // GROUPS, *kernel), (c_out,), (n, taps, *size)
    tensors = [torch.randn(shape, generator=generator) for shape in (*shapes, (n, c_out, *size))]
    tensors[1] = (2 * torch.randint(-24, 24, shapes[1], generator=generator) + 1) / 16
    return [tensor.to(device, dtype).requires_grad_(requires_grad) for tensor in tensors]


def operator_of(tensors, grad):
    """Both operators with all their arguments."""
    input, offset, weight, bias, mask = tensors
    return {
        "deform_conv2d": (input, offset, weight, bias, mask, *NUMBERS),
        "deform_conv2d_backward": (
            *(grad, input, offset, weight, mask, *NUMBERS),
            [True, True, True, bias is not None, mask is not None],
        ),
    }


def call(input, offset, weight, bias=None, mask=None):
    return omniops.deform_conv2d(input, offset, weight, bias, *map(tuple, NUMBERS), mask=mask)


@pytest.mark.slow
@ON_DEVICES
@pytest.mark.parametrize(
    ("optional", "layout"),
    [(True, torch.contiguous_format), (False, torch.channels_last)],
    ids=["mask and bias", "neither, channels_last"],
)
def test_opcheck(device, optional, layout):
    # One tap, for each is traced with all its derivatives.
    *tensors, grad = (
        (x.contiguous(memory_format=layout) if x.dim() == 4 else x).detach().requires_grad_()
        for x in problem(device, kernel=(1, 1))
    )
    if not optional:
        tensors[3:] = None, None
    for name, arguments in operator_of(tensors, grad).items():
        torch.library.opcheck(getattr(torch.ops.omniops, name).default, arguments)


@ON_DEVICES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_of_each_subset_of_gradients(device, layout):
    """But for the traces of the derivative, which take long."""
    *tensors, grad = (
        (x.contiguous(memory_format=layout) if x.dim() == 4 else x).detach().requires_grad_() for x in problem(device)
    )
    arguments = operator_of(tensors, grad)["deform_conv2d_backward"][:-1]
    for wanted in itertools.product((False, True), repeat=5):
        torch.library.opcheck(
            torch.ops.omniops.deform_conv2d_backward.default,
            (*arguments, list(wanted)),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        results = torch.ops.omniops.deform_conv2d_backward(*arguments, list(wanted))
        assert [x.numel() > 0 for x in results] == list(wanted)


@IN_FLOAT64
@pytest.mark.parametrize("optional", [True, False], ids=["mask and bias", "neither"])
def test_gradients_of_first_and_second_order(device, optional):
    *tensors, grad = problem(device, torch.float64, n=1, c=2, h=2, w=2, c_out=2, kernel=(1, 2), requires_grad=True)
    if not optional:
        tensors[3:] = None, None
    for name, arguments in operator_of(tensors, grad).items():
        differentiable = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]

        def function(*values, name=name, arguments=arguments, differentiable=differentiable):
            replaced = list(arguments)
            for i, value in zip(differentiable, values, strict=True):
                replaced[i] = value
            results = getattr(torch.ops.omniops, name)(*replaced)
            # The gradient of no mask is of no elements, and no output to be checked.
            return [x for x in results if x.numel()] if isinstance(results, tuple) else results

        inputs = [arguments[i] for i in differentiable]
        # The second order is the reference kernels', whose scatters GPUs add in any order.
        tolerance = 0 if device == "cpu" else 1e-10
        assert torch.autograd.gradcheck(function, inputs, nondet_tol=tolerance)
        assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=tolerance)


def test_gradients_of_third_order():
    *tensors, _ = problem(dtype=torch.float64, requires_grad=True)
    input, offset, _, _, mask = tensors
    (first,) = torch.autograd.grad(call(*tensors).pow(2).sum(), offset, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), mask, create_graph=True)
    (third,) = torch.autograd.grad(second.pow(2).sum(), input)
    assert third.isfinite().all()
    assert third.abs().max() > 0


def test_only_what_is_asked_for_is_differentiated(monkeypatch):
    called = []
    operator = ops._deform_conv2d_backward

    def recorded(*args):
        called.append(tuple(args[-1]))
        results = operator(*args)
        assert [x.numel() > 0 for x in results] == list(args[-1])
        return results

    monkeypatch.setattr(ops, "_deform_conv2d_backward", recorded)
    for i in range(len(TENSORS)):
        *tensors, _ = problem()
        call(*(x.requires_grad_(j == i) for j, x in enumerate(tensors))).sum().backward()
        assert called.pop() == tuple(j == i for j in range(5))
        assert [x.grad is not None for x in tensors] == [j == i for j in range(5)]


@pytest.mark.slow
@ON_DEVICES
@pytest.mark.parametrize("optional", [True, False], ids=["mask and bias", "neither"])
def test_compile_without_a_graph_break(device, optional):
    def function(input, offset, weight, bias, mask):
        return call(input * 2, offset, weight.sin(), bias, mask).sin()

    compiled = torch.compile(function, fullgraph=True)
    for height in (4, 7):  # the second shape recompiles with dynamic sizes
        *tensors, grad = problem(device, h=height, requires_grad=True)
        inputs = tensors if optional else [*tensors[:3], None, None]
        leaves = [x for x in inputs if x is not None]
        expected = function(*inputs)
        result = compiled(*inputs)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(result, leaves, grad), torch.autograd.grad(expected, leaves, grad), rtol=1e-4, atol=1e-4
        )


def test_compile_with_sizes_that_are_dynamic_from_the_start():
    function = torch.compile(call, fullgraph=True, dynamic=True)
    for sizes in ({}, {"n": 1, "h": 6}, {"n": 3, "w": 9}):
        *tensors, _ = problem(**sizes)
        torch.testing.assert_close(function(*tensors), call(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_export_with_dynamic_sizes(stride):
    """Beside the convolution that its offsets are from: export must see that both make the same size."""
    model = omniops.ModulatedDeformConv2d(4, 6, 3, stride, 1).eval()
    torch.nn.init.normal_(model.conv_offset.weight, std=0.1)
    height, width = (torch.export.Dim(name, min=4, max=64) for name in ("height", "width"))
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=8), 2: height, 3: width}}
    exported = torch.export.export(model, (torch.randn(2, 4, 6, 9),), dynamic_shapes=dynamic)
    assert any(node.target is torch.ops.omniops.deform_conv2d.default for node in exported.graph.nodes)
    for n, h, w in ((1, 7, 4), (3, 10, 11), (2, 12, 64)):
        other = torch.randn(n, 4, h, w)
        torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-5, atol=1e-5)


def test_the_tags_are_kept():
    # Inductor must not hand over another memory format than the fake kernel saw.
    for operator in OPERATORS:
        tags = getattr(torch.ops.omniops, operator).default.tags
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order} <= set(tags)


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_within_autocast_is_the_same_bits_as_outside(device, dtype):
    """Of first and second order: derivatives have the dtypes of their forward, wherever they are taken."""
    *tensors, grad = problem(device, requires_grad=True)

    def derivatives(enabled):
        result = call(*tensors)
        with torch.autocast(device, dtype, enabled=enabled):
            first = torch.autograd.grad(result, tensors, grad, create_graph=True)
            second = torch.autograd.grad(
                first, [grad, *tensors], [torch.ones_like(x) for x in first], allow_unused=True
            )
        return [*first, *(x for x in second if x is not None)]

    outside, within = derivatives(False), derivatives(True)
    assert len(outside) == 5 + 5  # none of the gradients depends on the bias
    assert all(x.dtype == torch.float32 for x in within)
    # The second order is the reference kernels', whose scatters GPUs add in any order.
    tolerance = 0 if device == "cpu" else 1e-4
    torch.testing.assert_close(within, outside, rtol=tolerance, atol=tolerance)


@IN_FLOAT64
def test_autocast_leaves_float64_as_it_is(device):
    *tensors, grad = problem(device, torch.float64, requires_grad=True)
    expected = call(*tensors)
    with torch.autocast(device, torch.bfloat16):
        result = call(*tensors)
        gradients = torch.autograd.grad(result, tensors, grad)
    assert result.dtype == torch.float64
    assert torch.equal(result, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, grad))
    with torch.autocast(device, torch.bfloat16), pytest.raises(TypeError, match="offset must have the dtype of input"):
        call(tensors[0], tensors[1].float(), *tensors[2:])


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_and_gradients_come_back_in_the_dtype_of_the_inputs(device, dtype):
    *tensors, _ = problem(device, requires_grad=True)
    mixed = [x.detach().to(dtype).requires_grad_() if i % 2 else x for i, x in enumerate(tensors)]
    with torch.autocast(device, dtype):
        result = call(*mixed)
    assert result.dtype == dtype
    assert torch.equal(result, call(*(x.to(dtype) for x in tensors)))
    result.sum().backward()
    assert [x.grad.dtype for x in mixed] == [x.dtype for x in mixed]


def test_every_device_is_served_and_has_autocast():
    for name in OPERATORS:
        for key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{name}", key)
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"omniops::{name}", "XPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{name}", "MPS")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{name}", "CPU") == cpu.AVAILABLE


@ON_DEVICES
@pytest.mark.parametrize("empty", ["n", "c_out"])
def test_empty_inputs_give_empty_results_and_gradients(device, empty):
    *tensors, grad = problem(device, **{empty: 0}, requires_grad=True)
    result = call(*tensors)
    assert result.shape == grad.shape
    assert result.numel() == 0
    result.sum().backward()
    for x in tensors:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


def test_an_empty_batch_may_be_of_an_empty_map():
    """As torch.nn.functional.conv2d takes one, if the padding leaves room for the kernel."""
    input, weight = torch.zeros(0, 2, 0, 3), torch.zeros(3, 2, 1, 1)
    result = omniops.deform_conv2d(input, torch.zeros(0, 2, 2, 5), weight, padding=1)
    assert result.shape == F.conv2d(input, weight, padding=1).shape == (0, 3, 2, 5)


def test_more_than_two_to_the_31_elements_have_a_shape():
    shapes = (2, 1024, 1024, 1024), (2, 18, 1024, 1024), (1024, 1024, 3, 3)
    input, offset, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    result = omniops.deform_conv2d(input, offset, weight, padding=1)
    assert result.shape == input.shape
    result.sum().backward()
    assert [tuple(x.grad.shape) for x in (input, offset, weight)] == list(shapes)


def test_a_number_stands_for_both_directions():
    input, weight = torch.randn(1, 2, 9, 8), torch.randn(3, 2, 3, 3)
    expected = F.conv2d(input, weight, None, 2, 3, 2)
    offset = torch.zeros(1, 18, *expected.shape[2:])
    for pair in (lambda n: n, lambda n: (n, n), lambda n: [n, n]):
        result = omniops.deform_conv2d(input, offset, weight, stride=pair(2), padding=pair(3), dilation=pair(2))
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_arguments_have_torchvisions_names_and_order():
    input, offset, weight, bias, mask, _ = problem()
    stride, padding, dilation = map(tuple, NUMBERS)
    result = omniops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    named = omniops.deform_conv2d(
        input=input, offset=offset, weight=weight, bias=bias, stride=stride, padding=padding, dilation=dilation,
        mask=mask,
    )  # fmt: skip
    assert torch.equal(result, named)


I, O, W, B, M = (torch.zeros(*s) for s in ((1, 4, 5, 5), (1, 18, 3, 3), (6, 4, 3, 3), (6,), (1, 9, 3, 3)))  # noqa: E741


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": [1]}, TypeError, "input must be a torch.Tensor, got list"),
        ({"offset": None}, TypeError, "offset must be a torch.Tensor, got NoneType"),
        ({"weight": 3}, TypeError, "weight must be a torch.Tensor, got int"),
        ({"bias": True}, TypeError, "bias must be a torch.Tensor, got bool"),
        ({"mask": 1.0}, TypeError, "mask must be a torch.Tensor, got float"),
        (
            {"input": I.to_sparse()},
            TypeError,
            "input must be a dense tensor, got a sparse_coo one: convert it with input.to_dense()",
        ),
        ({"input": I[0]}, ValueError, "input must have 4 dimensions (N, C, H, W), got shape (4, 5, 5)"),
        ({"offset": O[0]}, ValueError, "offset must have 4 dimensions (N, C, H, W), got shape (18, 3, 3)"),
        ({"weight": W[0]}, ValueError, "weight must have 4 dimensions (N, C, H, W), got shape (4, 3, 3)"),
        ({"mask": M[0]}, ValueError, "mask must have shape (N, D * kh * kw, H_out, W_out) = (1, 9, 3, 3), got (9, 3,"),
        ({"bias": B[None]}, ValueError, "bias must have shape (C_out,) = (6,), got (1, 6)"),
        ({"bias": B[1:]}, ValueError, "bias must have shape (C_out,) = (6,), got (5,)"),
        (
            {"offset": O[:, 1:]},
            ValueError,
            "offset must have 2 * 9 channels for each offset group, and a number of offset groups that divides the 4 "
            "channels of input, got 17 channels",
        ),
        ({"offset": O[:, :9]}, ValueError, "channels of input, got 9 channels"),
        ({"offset": O[:, :0]}, ValueError, "channels of input, got 0 channels"),
        ({"offset": O.repeat(1, 3, 1, 1)}, ValueError, "channels of input, got 54 channels"),
        ({"offset": O[..., 1:]}, ValueError, "(N, D * kh * kw * 2, H_out, W_out) = (1, 18, 3, 3), got (1, 18, 3, 2)"),
        ({"offset": O.repeat(2, 1, 1, 1)}, ValueError, "= (1, 18, 3, 3), got (2, 18, 3, 3)"),
        ({"mask": M.repeat(1, 2, 1, 1)}, ValueError, "= (1, 9, 3, 3), got (1, 18, 3, 3)"),
        ({"mask": M[:, :, 1:]}, ValueError, "= (1, 9, 3, 3), got (1, 9, 2, 3)"),
        (
            {"weight": W[:, :3]},
            ValueError,
            "weight must have shape (C_out, C / G, kh, kw) with a number of groups G that divides both C_out and the 4 "
            "channels of input, got (6, 3, 3, 3)",
        ),
        ({"weight": W[:5, :2]}, ValueError, "channels of input, got (5, 2, 3, 3)"),
        ({"weight": W[:, :0]}, ValueError, "channels of input, got (6, 0, 3, 3)"),
        ({"weight": W[..., :0]}, ValueError, "weight must have a kernel of at least one tap, got (3, 0)"),
        ({"input": I[:, :0]}, ValueError, "input must have at least one channel and one pixel, got shape (1, 0, 5, 5)"),
        ({"input": I[..., :0]}, ValueError, "input must have at least one channel and one pixel, got shape (1, 4, 5,"),
        (
            {"input": I[:0, :0], "offset": O[:0], "mask": M[:0]},
            ValueError,
            "at least one channel and one pixel, got shape (0",
        ),
        (
            {"input": I[:, :, :2]},
            ValueError,
            "input must have a height of at least 3 for weight's kernel of (3, 3), dilation (1, 1) and padding (0, 0), "
            "got shape (1, 4, 2, 5)",
        ),
        (
            {"dilation": (1, 4), "padding": 1},
            ValueError,
            "input must have a width of at least 7 for weight's kernel of (3, 3), dilation (1, 4) and padding (1, 1), "
            "got shape (1, 4, 5, 5)",
        ),
        ({"weight": W.to("meta")}, ValueError, "weight must be on the device of input, cpu, got meta"),
        ({"mask": M.to("meta")}, ValueError, "move it there with mask.to(input.device)"),
        ({"offset": O.half()}, TypeError, "offset must have the dtype of input, float32, got float16"),
        ({"bias": B.double()}, TypeError, "convert it with bias.to(input.dtype), or run under torch.autocast"),
        ({"input": I.long()}, TypeError, "input must be float64, float32, float16 or bfloat16, got int64"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got (0, 0)"),
        ({"stride": (1, -2)}, ValueError, "stride must be at least 1, got (1, -2)"),
        ({"stride": 1.5}, TypeError, "stride must be an int or two, got 1.5"),
        ({"stride": True}, TypeError, "stride must be an int or two, got True"),
        ({"stride": None}, TypeError, "stride must be an int or two, got None"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be an int or two, got (1, 1, 1)"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got (-1, -1)"),
        (
            {"padding": -(2**70)},
            ValueError,
            "padding must be below 2**31 and not negative, got -1180591620717411303424",
        ),
        (
            {"stride": (1, 2**64)},
            ValueError,
            "stride must be below 2**31 and not negative, got (1, 18446744073709551616)",
        ),
        ({"padding": "full"}, ValueError, "padding must be 'valid', 'same', an int or two, got 'full'"),
        ({"padding": "same", "stride": (1, 2)}, ValueError, "stride must be 1 with padding='same', got (1, 2)"),
        ({"padding": "same", "stride": 0}, ValueError, "stride must be at least 1, got (0, 0)"),
        ({"padding": "same", "dilation": -1}, ValueError, "dilation must be at least 1, got (-1, -1)"),
        ({"padding": "same", "weight": W[0]}, ValueError, "weight must have 4 dimensions (N, C, H, W), got shape (4,"),
        ({"padding": "same"}, ValueError, "offset must have shape (N, D * kh * kw * 2, H_out, W_out) = (1, 18, 5, 5)"),
        ({"padding": (1, 1.0)}, TypeError, "padding must be an int or two, got (1, 1.0)"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got (0, 0)"),
        ({"dilation": (False, 1)}, TypeError, "dilation must be an int or two, got (False, 1)"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error) as caught:
        omniops.deform_conv2d(**{"input": I, "offset": O, "weight": W, "bias": B, "mask": M, **arguments})
    assert message in str(caught.value)


def test_modulated_deform_conv2d_is_the_same_with_the_groups_said():
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(6, 2, 3, 2), torch.randn(6)
    offset, mask = torch.randn(2, 24, 3, 5), torch.rand(2, 12, 3, 5)
    expected = omniops.deform_conv2d(x, offset, weight, bias, (1, 2), (1, 2), (2, 1), mask)
    result = omniops.modulated_deform_conv2d(x, offset, mask, weight, bias, (1, 2), (1, 2), (2, 1), 2, 2)
    assert torch.equal(result, expected)
    same = omniops.modulated_deform_conv2d(x, torch.zeros(2, 24, 5, 6), torch.ones(2, 12, 5, 6), weight, bias,
                                           padding="same", groups=2, deform_groups=2)  # fmt: skip
    around = torch.nn.functional.pad(x, (0, 1, 1, 1))
    plain = torch.nn.functional.conv2d(around, weight, bias, groups=2)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": None}, TypeError, "mask must be a torch.Tensor, got NoneType"),
        ({"groups": 2}, ValueError, "weight must have shape (C_out, C / groups, kh, kw) with groups 2 and the 4 chann"),
        ({"groups": 1.0}, TypeError, "groups must be an int, got float"),
        ({"deform_groups": 2}, ValueError, "offset must have deform_groups * kh * kw * 2 = 36 channels, got 18"),
        ({"deform_groups": 0}, ValueError, "deform_groups must be at least 1, got 0"),
        ({"weight": W[0]}, ValueError, "weight must have 4 dimensions (N, C, H, W), got shape (4, 3, 3)"),
        ({"mask": M[:, 1:]}, ValueError, "mask must have shape (N, D * kh * kw, H_out, W_out) = (1, 9, 3, 3), got"),
    ],
)
def test_errors_of_modulated_deform_conv2d(arguments, error, message):
    with pytest.raises(error) as caught:
        omniops.modulated_deform_conv2d(**{"input": I, "offset": O, "mask": M, "weight": W, "bias": B, **arguments})
    assert message in str(caught.value)


def test_errors_of_the_gradients():
    numbers = [1, 1], [0, 0], [1, 1]
    grad = torch.zeros(1, 6, 3, 2)
    message = r"grad must have shape \(N, C_out, H_out, W_out\) = \(1, 6, 3, 3\), got \(1, 6, 3, 2\)"
    with pytest.raises(ValueError, match=message):
        torch.ops.omniops.deform_conv2d_backward(grad, I, O, W, M, *numbers, [True] * 5)
    with pytest.raises(ValueError, match="stride must be a number or two, got 3"):
        torch.ops.omniops.deform_conv2d_backward(grad, I, O, W, M, [1, 1, 1], *numbers[1:], [True] * 5)
    with pytest.raises(ValueError, match="output_mask must be five bools, got 4"):
        torch.ops.omniops.deform_conv2d_backward(torch.zeros(1, 6, 3, 3), I, O, W, M, *numbers, [True] * 4)
    with pytest.raises(ValueError, match="output_mask must not ask for the gradient of mask, as there is none"):
        torch.ops.omniops.deform_conv2d_backward(torch.zeros(1, 6, 3, 3), I, O, W, None, *numbers, [True] * 5)


def test_checks_come_before_any_kernel_of_the_raw_operator():
    with pytest.raises(ValueError, match="offset must have shape"):
        torch.ops.omniops.deform_conv2d(I, O, W, None, None, [2, 2], [0, 0], [1, 1])
