"""deform_conv2d's kernels on every backend of this machine, against the reference in float64 fed the rounded inputs.

The Metal kernels are here on a Mac; elsewhere tests/metal runs them in the emulator. The Triton kernels run on the GPU
where there is one, else in Triton's interpreter. What is particular to one backend is in the files named after it.
"""

import gc
import weakref
from itertools import product
from math import floor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backend_cases import BACKENDS, TOLERANCES, backend_devices, backends_with, dtypes, interpreted, map_tensors, sliced
from deform_conv2d_cases import (
    FUSED,
    GRADIENTS,
    LAYOUTS,
    UNEVEN,
    Case,
    assert_right,
    channels_last,
    in_chunks,
    in_cuda_chunks,
    kernels,
    problem,
    results,
    uneven,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import omniops.ops.deform_conv2d  # noqa: F401  registers the operator
from omniops.backends import prepared
from omniops.backends.columns import chunks
from omniops.backends.reference import deform_conv2d as reference

TENSORS = ("input", "offset", "weight", "bias", "mask", "grad")


def formula(case, x):
    """deform_conv2d, one number after another."""
    out = torch.zeros(x.grad.shape, dtype=torch.float64)
    taps = list(product(*map(range, case.kernel_size)))
    per_group, per_offset_group = case.c // case.groups, case.c // case.offset_groups
    for n, o, i, j in product(*map(range, out.shape)):
        out[n, o, i, j] = x.bias[o]
        for channel, (t, (u, v)) in product(range(per_group), enumerate(taps)):
            c = o // (case.c_out // case.groups) * per_group + channel
            d = c // per_offset_group
            y = i * case.stride[0] - case.padding[0] + u * case.dilation[0]
            y = float(y + x.offset[n, (d * len(taps) + t) * 2, i, j])
            x_ = j * case.stride[1] - case.padding[1] + v * case.dilation[1]
            x_ = float(x_ + x.offset[n, (d * len(taps) + t) * 2 + 1, i, j])
            sample = 0.0
            for row, column in product((floor(y), floor(y) + 1), (floor(x_), floor(x_) + 1)):
                if 0 <= row < case.h and 0 <= column < case.w:
                    share = (1 - abs(y - row)) * (1 - abs(x_ - column))
                    sample += share * float(x.input[n, c, row, column])
            factor = 1.0 if x.mask is None else float(x.mask[n, d * len(taps) + t, i, j])
            out[n, o, i, j] += float(x.weight[o, channel, u, v]) * factor * sample
    return out


@BACKENDS
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernels_are_the_formula(backend, device, masked):
    case = Case(2, 6, 4, 5, 4, (2, 3), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3, masked=masked)
    tensors = problem(case, torch.float32)
    x = map_tensors(lambda tensor: tensor.to(device), tensors)
    out = kernels(backend).deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    torch.testing.assert_close(out.cpu().double(), formula(case, tensors), rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_a_convolution(backend, device, groups):
    case = Case(2, 8, 7, 6, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=groups, masked=False)
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    out = kernels(backend).deform_conv2d(x.input, x.offset * 0, x.weight, x.bias, None, *case.numbers)
    expected = F.conv2d(x.input, x.weight, x.bias, *case.numbers, groups)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_common_case(backend, device, dtype, layout):
    if dtype not in dtypes(backend):
        pytest.skip(f"the {backend} kernels have no {dtype}")
    if interpreted(backend, device) and dtype != torch.float32 and layout != "contiguous":
        pytest.skip("Triton's interpreter, which is slow, takes this layout in float32 only")
    case = uneven(backend, device)
    assert_right(kernels(backend), device, case, problem(case, dtype), LAYOUTS[layout])


def examples(backend):
    """As many as take some ten seconds: Triton compiles most of them anew, or interprets them."""
    return {"reference": 20, "cpu": 150, "mps": 100, "cuda": 40 if torch.cuda.is_available() else 4}[backend]


@BACKENDS
def test_any_case(backend, device):
    @hypothesis_settings(max_examples=examples(backend))
    @given(data=st.data())
    def is_right(data):
        any_case(backend, device, data)

    is_right()


def any_case(backend, device, data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups, offset_groups = pair(1, 4)
    least = np.lcm(groups, offset_groups).item()
    kernel_size, dilation, padding = pair(1, 4), pair(1, 3), pair(0, 3)
    smallest = (max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel_size, dilation, padding, strict=True))
    h, w = (least_size + more for least_size, more in zip(smallest, pair(0, 6), strict=True))
    case = Case(
        data.draw(st.integers(1, 3)),
        least * data.draw(st.integers(1, max(1, 40 // least))),
        h,
        w,
        groups * data.draw(st.integers(1, 4)),
        kernel_size,
        pair(1, 3),
        padding,
        dilation,
        groups,
        offset_groups,
        data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(dtypes(backend)))
    tensors = problem(case, dtype, data.draw(st.integers(0, 99)))
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    module = kernels(backend)
    if data.draw(st.booleans()) and backend == "cpu":
        module = in_chunks(module, data.draw(st.integers(1, 20_000)))
    assert_right(module, device, case, tensors, layout)


@BACKENDS
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1, 1, (1, 1), padding=(0, 0)),
        Case(1, 300, 2, 3, 1, (1, 1), padding=(0, 0)),  # channels for several blocks, and a rest
        Case(1, 37, 3, 3, 2, masked=False),
        Case(3, 8, 1, 1, 8, groups=8, offset_groups=2),  # maps of one pixel, several in a block of positions
        Case(2, 4, 7, 1, 4, (5, 1), (3, 1), (2, 0), offset_groups=4),  # one channel a group
        Case(1, 16, 5, 6, 4, (1, 1), padding=(0, 0), groups=4, offset_groups=4),
        Case(1, 24, 5, 4, 6, (1, 3), (1, 2), (0, 2), groups=3, offset_groups=2, masked=False),
        Case(1, 8, 3, 3, 4, (5, 5), padding=(2, 2), groups=2),  # a kernel larger than the map
        Case(1, 3, 2, 3, 2, (3, 3), padding=(4, 4)),  # more padding than map
        Case(1, 4, 8, 8, 4, (2, 2), (9, 9), (0, 0), (7, 7)),  # one position, taps far apart
    ],
    ids=str,
)
def test_odd_cases(backend, device, case):
    assert_right(kernels(backend), device, case, problem(case, torch.float32))


@BACKENDS
def test_weights_and_bias_that_are_views_with_gaps(backend, device):
    # Of a kernel of one tap, as reordering its weights by taps copies nothing.
    case = Case(1, 16, 2, 3, 4, (1, 1), padding=(0, 0))
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float16))
    x.weight, x.bias = sliced(x.weight), torch.stack([x.bias, x.bias * torch.nan], 1)[:, 0]
    assert x.weight.stride(1) > 1
    assert x.bias.stride(0) > 1
    assert_right(kernels(backend), device, case, x)


@BACKENDS
def test_expanded_inputs(backend, device):
    case = Case(2, 4, 5, 6, 4)
    tensors = problem(case, torch.float32)
    expanded = map_tensors(lambda tensor: tensor[:1].expand(tensor.shape), tensors)
    expanded.bias = tensors.bias
    assert_right(kernels(backend), device, case, expanded)


@BACKENDS
def test_samples_on_pixels_and_on_the_border(backend, device):
    # Each sample is at a whole pixel or on the border of what has an influence: -1 or less, the last pixel, the size.
    case = Case(1, 4, 4, 5, 4, (3, 3), padding=(1, 1), offset_groups=2)
    moves = torch.randint(-6, 7, (1, 36, 4, 5), generator=torch.Generator().manual_seed(0)).double()
    assert_right(kernels(backend), device, case, problem(case, torch.float32, offsets=moves))


@BACKENDS
@pytest.mark.parametrize(
    ("y", "value", "by_y"),
    [
        (-1.0, 0.0, 3.0),  # on the border: no weight, yet the map begins to its right
        (np.nextafter(np.float32(-1), np.float32(-2)).item(), 0.0, 0.0),
        (-0.5, 1.5, 3.0),
        (0.0, 3.0, 4.0),
        (1.0, 7.0, -7.0),  # the last row: below it are zeros
        (1.5, 3.5, -7.0),
        (2.0, 0.0, 0.0),
        (float("inf"), 0.0, 0.0),
        (float("-inf"), 0.0, 0.0),
        (1e30, 0.0, 0.0),
        (-1e30, 0.0, 0.0),
    ],
)
def test_a_sample_and_its_derivative(backend, device, y, value, by_y):
    # A map of two rows, 3 and 7, and one tap; its first position is at `y`.
    input = torch.tensor([3.0, 7.0], device=device).view(1, 1, 2, 1)
    offset = torch.zeros(1, 2, 2, 1, device=device)
    offset[0, 0, 0, 0] = y
    one = torch.ones(1, 1, 1, 1, device=device)
    numbers = (1, 1), (0, 0), (1, 1)
    out = kernels(backend).deform_conv2d(input, offset, one, None, None, *numbers)
    assert out.flatten().tolist() == [value, 7.0]
    grad = torch.tensor([1.0, 0.0], device=device).view(1, 1, 2, 1)
    wanted = [False, True, False, False, False]
    gradients = kernels(backend).deform_conv2d_backward(grad, input, offset, one, None, *numbers, wanted)
    assert gradients[1][0, 0, 0, 0].item() == by_y


def far_offsets():
    """A backend, its device, and pairs of a value and the axes that it is for: each by itself, which the interpreter is
    spared, and all."""
    values = float("nan"), float("inf"), float("-inf"), 6e4, -6e4, 1e30
    pairs = list(product(values, ["y", "x", "yx"]))
    for of in backend_devices():
        if not interpreted(*of.values):
            for pair in pairs:
                yield pytest.param(*of.values, [pair], id=f"{of.id}-{pair[0]}-{pair[1]}", marks=of.marks)
        yield pytest.param(*of.values, pairs, id=f"{of.id}-all", marks=of.marks)


@pytest.mark.parametrize(("backend", "device", "pairs"), list(far_offsets()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [Case(2, 20, 5, 6, 4, offset_groups=2, groups=2), FUSED], ids=str)
def test_offsets_far_outside_or_not_finite(backend, device, pairs, dtype, case):
    if interpreted(backend, device) and case != FUSED:
        case = case._replace(c=4, h=3, w=4)
    tensors = problem(case, dtype)
    taps = tensors.offset.shape[1] // 2
    # Each pair for a tap of its own, of one offset group, at a few positions.
    for tap, (number, axes) in enumerate(pairs, start=4):
        value = torch.tensor(number).to(dtype)  # infinite where it is too large
        for axis in ("yx".index(letter) for letter in axes):
            tensors.offset[0, 2 * (tap % taps) + axis, 1:3, 2] = value
            tensors.offset[1, 2 * ((tap + 5) % taps) + axis, 0, :] = value
    found = assert_right(kernels(backend), device, case, tensors)
    assert found["by_input"].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("case", [Case(1, 8, 5, 6, 4, groups=2), FUSED], ids=str)
def test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(backend, device, case):
    tensors = problem(case, torch.float32)
    tensors.input[0, 3, 2, 2], tensors.input[0, -2, -1, -1] = float("nan"), float("inf")
    expected = results(reference, case, map_tensors(torch.Tensor.double, tensors))
    found = results(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), tensors))
    for name in expected:
        assert torch.equal(found[name].isfinite().cpu(), expected[name].isfinite()), name
    assert expected["out"].isfinite().any()
    assert not expected["out"].isfinite().all()


@pytest.mark.slow
@backends_with("images c_out", (0, 6), (0.7, 260), (1.5, 6), (0, 260), (0.7, 6), (1.5, 260), quick=3)
def test_columns_in_chunks(backend, device, images, c_out, monkeypatch):
    """Of a position, of parts of an image and of an image."""
    case = Case(3, 12, 6, 7, c_out, groups=2, offset_groups=3)
    if interpreted(backend, device):
        case = Case(2, 32, 1, 3, c_out, (1, 3), padding=(0, 1), groups=2)
    module, positions = kernels(backend), max(1, int(images * case.h * case.w))
    if backend == "cuda":
        in_cuda_chunks(monkeypatch, positions)
    else:
        module = in_chunks(module, positions * 9 * case.c * 4)
    assert_right(module, device, case, problem(case, torch.float32))


@given(images=st.integers(1, 9), positions=st.integers(1, 40), max_size=st.integers(1, 400))
def test_chunks(images, positions, max_size):
    found = list(chunks(images, positions, max_size))
    assert [p for first, count in found for p in range(first, first + count)] == list(range(images * positions))
    assert found[0][1] == max(count for _, count in found) <= max_size
    for first, count in found:
        assert (first % positions == 0 and count % positions == 0) or first % positions + count <= positions
    # No more than it takes.
    fewest = -(-images // (max_size // positions)) if max_size >= positions else images * -(-positions // max_size)
    assert len(found) <= fewest


@BACKENDS
def test_the_results_have_the_memory_formats_of_their_arguments(backend, device):
    case = uneven(backend, device)
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    x.input, x.mask, x.weight = channels_last(x.input), channels_last(x.mask), channels_last(x.weight)
    found = results(kernels(backend), case, x)
    last_of = {"out": True, "by_input": True, "by_offset": False, "by_weight": True, "by_mask": True}
    for name, last in last_of.items():
        memory_format = torch.channels_last if last else torch.contiguous_format
        assert found[name].is_contiguous(memory_format=memory_format), name


@BACKENDS
def test_the_results_have_the_strides_of_new_tensors(backend, device):
    """As the fake kernel says, whatever those of the arguments are where a dimension is 1."""
    case = uneven(backend, device)._replace(n=1)
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    x = map_tensors(
        lambda tensor: tensor if tensor.dim() == 1 else tensor.as_strided(tensor.shape, (7, *tensor.stride()[1:])), x
    )
    assert x.mask.is_contiguous()
    assert x.mask.stride(0) == 7
    for name, result in results(kernels(backend), case, x).items():
        assert result.stride() == torch.empty(result.shape).stride(), name


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_arguments_stay_as_they_are(backend, device, layout):
    case = uneven(backend, device)
    x = map_tensors(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(case, torch.float32))
    before = map_tensors(torch.clone, x)
    found = results(kernels(backend), case, x)
    for name in TENSORS:
        assert torch.equal(getattr(x, name), getattr(before, name))
        for result in found.values():
            assert result.data_ptr() != getattr(x, name).data_ptr()


@pytest.mark.slow
@backends_with(
    "layout masked",
    *(("contiguous", True), ("channels_last", False), ("contiguous", False), ("channels_last", True)),
    quick=2,
)
def test_each_choice_of_gradients(backend, device, layout, masked):
    case = uneven(backend, device)._replace(masked=masked)
    x = map_tensors(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(case, torch.float32))
    expected = results(kernels(backend), case, x)
    choices = list(product((False, True), repeat=5)) if not interpreted(backend, device) else np.eye(5, dtype=bool)
    for wanted in choices:
        if x.mask is None and wanted[4]:
            continue
        arguments = x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, [bool(want) for want in wanted]
        found = kernels(backend).deform_conv2d_backward(*arguments)
        assert len({id(gradient) for gradient in found}) == 5
        for name, gradient, want in zip(GRADIENTS, found, wanted, strict=True):
            if not want:
                assert gradient.numel() == 0, name
            elif backend == "cuda":  # by atomics, and the columns from one kernel or another
                scale = expected[name].abs().max()
                assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name
            else:
                assert torch.equal(gradient, expected[name]), name


@pytest.mark.slow
@BACKENDS
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_prepared_serves_other_tensors_and_holds_none(backend, device, layout, deterministic):
    module, case = kernels(backend), uneven(backend, device)
    if interpreted(backend, device) and layout != "contiguous":
        pytest.skip("Triton's interpreter is slow")

    def arguments(seed):
        x = map_tensors(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(case, torch.float32, seed))
        return (
            (module.deform_conv2d, (x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)),
            (
                module.deform_conv2d_backward,
                (x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, [True] * 5),
            ),
        )

    for i in range(2):
        (kernel, first), (_, second) = arguments(0)[i], arguments(1)[i]
        if not isinstance(kernel, prepared):
            pytest.skip(f"the {backend} kernels are not prepared")
        run = kernel.prepare(*first)
        run(*first)
        tensors = [weakref.ref(value) for value in first if isinstance(value, torch.Tensor)]
        found, expected = run(*second), kernel(*second)
        assert all(map(torch.equal, *((x if isinstance(x, tuple) else (x,)) for x in (found, expected))))
        del first
        gc.collect()
        assert not [ref() for ref in tensors if ref() is not None]


@BACKENDS
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
def test_the_same_bits_every_run(backend, device, deterministic):
    case = uneven(backend, device)
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    first, second = (results(kernels(backend), case, x) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_backward_of_the_reference_is_autograds_of_its_forward():
    x = problem(UNEVEN, torch.float64)
    needed = [getattr(x, name).requires_grad_() for name in ("input", "offset", "weight", "bias", "mask")]
    out = reference.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *UNEVEN.numbers)
    found = results(reference, UNEVEN, map_tensors(torch.Tensor.detach, x))
    gradients = torch.autograd.grad(out, needed, x.grad)
    for gradient, name in zip(gradients, GRADIENTS, strict=True):
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 2, 3, 2, (2, 2), padding=(0, 0)),
        Case(1, 4, 3, 2, 2, (2, 1), (2, 1), (1, 0), (1, 2), groups=2, offset_groups=4),
        Case(1, 6, 2, 3, 3, (1, 2), (1, 2), (0, 1), groups=3, offset_groups=2),
        Case(2, 4, 2, 3, 4, (2, 2), (2, 2), (1, 0), groups=4, masked=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_operator_is_differentiable_twice(case, layout):
    x = map_tensors(LAYOUTS[layout], problem(case, torch.float64))
    names = [name for name in TENSORS if name != "grad" and getattr(x, name) is not None]

    def function(*tensors):
        named = {"mask": None, **dict(zip(names, tensors, strict=True))}
        arguments = (named[name] for name in ("input", "offset", "weight", "bias", "mask"))
        return torch.ops.omniops.deform_conv2d(*arguments, *case.numbers)

    inputs = [getattr(x, name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def torchvisions(case, x):
    """What torchvision's operator and autograd make of the tensors, where it works."""
    try:
        torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
        torchvision.extension._assert_has_ops()
    except RuntimeError as error:
        pytest.skip(f"torchvision's extension does not work: {error}")
    x = map_tensors(torch.clone, x)
    inputs = {name: value.requires_grad_() for name, value in vars(x).items() if name != "grad" and value is not None}
    out = torchvision.ops.deform_conv2d(x.input, x.offset, x.weight, x.bias, *case.numbers, x.mask)
    gradients = torch.autograd.grad(out, inputs.values(), x.grad)
    return {
        "out": out.detach(),
        **{f"by_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)},
    }


@BACKENDS
@pytest.mark.parametrize("case", [UNEVEN, UNEVEN._replace(masked=False), Case(2, 8, 5, 6, 4)], ids=str)
def test_torchvision_agrees(backend, device, case):
    tensors = problem(case, torch.float64 if torch.float64 in dtypes(backend) else torch.float32)
    expected = torchvisions(case, tensors)
    found = results(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), tensors))
    for name in found.keys() & expected.keys():
        torch.testing.assert_close(found[name].cpu(), expected[name])


@BACKENDS
def test_torchvision_agrees_at_infinite_offsets(backend, device):
    """But for their own gradient, which is not a number there."""
    tensors = problem(UNEVEN, torch.float64 if torch.float64 in dtypes(backend) else torch.float32)
    far = torch.zeros_like(tensors.offset, dtype=torch.bool)
    for channel, value in enumerate((float("inf"), float("-inf"), 1e30, float("inf")), start=5):
        tensors.offset[0, channel, 1] = value
        far[0, channel // 2 * 2 : channel // 2 * 2 + 2, 1] = True
    expected = torchvisions(UNEVEN, tensors)
    found = {
        name: result.cpu()
        for name, result in results(kernels(backend), UNEVEN, map_tensors(lambda x: x.to(device), tensors)).items()
    }
    assert not found["by_offset"][far].any()
    for by_offset in (found["by_offset"], expected["by_offset"]):
        by_offset[far] = 0
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
