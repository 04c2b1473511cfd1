"""deform_conv2d's kernels on every backend of this machine, against the reference in float64 fed the rounded inputs.

The Metal kernels are here on a Mac; elsewhere tests/metal runs them in the emulator. The Triton kernels run on the GPU
where there is one, else in Triton's interpreter. What is particular to the C++ kernels comes last; run as a program,
this file holds them against the reference for the instruction set it finds.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from math import floor
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import omniops.ops.deform_conv2d  # noqa: F401  registers the operator
from omniops.backends import cpu, prepared
from omniops.backends.columns import Columns, Geometry, chunks
from omniops.backends.reference import deform_conv2d as reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TENSORS = ("input", "offset", "weight", "bias", "mask", "grad")
GRADIENTS = ("by_input", "by_offset", "by_weight", "by_bias", "by_mask")


def backend_devices():
    yield pytest.param("reference", "cpu", id="reference")
    missing = pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ module is not built")
    yield pytest.param("cpu", "cpu", id="cpu", marks=missing)
    if find_spec("omniops.backends.cuda.deform_conv2d") is not None:
        missing = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
        on_gpu = torch.cuda.is_available()
        device, name = ("cuda", "cuda") if on_gpu else ("cpu", "cuda-interpreted")
        yield pytest.param("cuda", device, id=name, marks=missing)
    if torch.backends.mps.is_available():
        yield pytest.param("mps", "mps", id="mps")


BACKENDS = pytest.mark.parametrize(("backend", "device"), list(backend_devices()))


def interpreted(backend, device):
    """Whether Triton's interpreter runs the kernels, which takes a second for what a GPU does in no time."""
    return backend == "cuda" and device == "cpu"


def kernels(backend):
    return import_module(f"omniops.backends.{backend}.deform_conv2d")


def dtypes(backend):
    return import_module(f"omniops.backends.{backend}").DTYPES


class Case(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    c_out: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True

    @property
    def out_size(self):
        spans = (d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        sizes = zip((self.h, self.w), self.padding, spans, self.stride, strict=True)
        return tuple((size + 2 * padding - span) // stride + 1 for size, padding, span, stride in sizes)

    @property
    def numbers(self):
        return self.stride, self.padding, self.dilation


def problem(case, dtype, seed=0, offsets=None):
    """The tensors of a case. Offsets are odd sixteenths: exact in every dtype, and no sample is at a whole place, where
    the last digit of a position would decide on its derivative."""
    generator = torch.Generator().manual_seed(seed)
    taps, size = case.kernel_size[0] * case.kernel_size[1], case.out_size

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if offsets is None:
        moves = torch.randint(-40, 40, (case.n, case.offset_groups * taps * 2, *size), generator=generator)
        offsets = (2 * moves + 1) / 16
    return SimpleNamespace(
        input=normal(case.n, case.c, case.h, case.w),
        offset=offsets.to(dtype),
        weight=normal(case.c_out, case.c // case.groups, *case.kernel_size),
        bias=normal(case.c_out),
        mask=normal(case.n, case.offset_groups * taps, *size) if case.masked else None,
        grad=normal(case.n, case.c_out, *size),
    )


def each(function, tensors):
    """The tensors, each put through the function."""
    given_ = vars(tensors)
    return SimpleNamespace(**{name: None if value is None else function(value) for name, value in given_.items()})


def results(module, case, x):
    """What both operators of a backend return."""
    wanted = [True, True, True, True, x.mask is not None]
    gradients = module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, wanted)
    return {
        "out": module.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers),
        **dict(zip(GRADIENTS, gradients, strict=True)),
    }


def assert_right(module, device, case, tensors, layout=lambda tensor: tensor):
    """Returns the results. Errors are relative to the scale of the result, which leaves out what is not finite: that
    must be the same."""
    dtype = tensors.input.dtype
    expected = results(reference, case, each(torch.Tensor.double, tensors))
    found = results(module, case, each(lambda tensor: layout(tensor.to(device)), tensors))
    for name, wanted in expected.items():
        result = found[name]
        assert result.dtype == dtype, name
        assert result.shape == wanted.shape, name
        wanted = wanted.cpu()
        result, finite = result.cpu().double(), wanted.isfinite()
        torch.testing.assert_close(result[~finite], wanted[~finite], equal_nan=True)
        result, wanted = result[finite], wanted[finite]
        if wanted.numel() > 0:
            scale = max(wanted.abs().max().item(), 1e-30)
            error = (result - wanted).abs().max().item() / scale
            assert error <= TOLERANCES[dtype], f"{name}: {error:.2e} of the result's scale"
    return found


def sliced(tensor):
    """The same values, every other element of a larger tensor along the last axis, off by one in memory."""
    larger = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
    larger[..., 1::2] = tensor
    return larger[..., 1::2]


def shifted(tensor):
    """The same values, contiguous from the second element of a larger storage on, so that no vector is aligned."""
    larger = tensor.new_full((tensor.numel() + 1,), float("nan"))
    larger[1:] = tensor.flatten()
    return larger[1:].view(tensor.shape)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def shifted_channels_last(tensor):
    return shifted(tensor.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() == 4 else tensor


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": channels_last,
    "shifted": shifted,
    "shifted_channels_last": shifted_channels_last,
    "sliced": sliced,
    "transposed": transposed,
}

# Groups and offset groups of which neither divides the other; a stride, padding and dilation of its own for each axis.
UNEVEN = Case(2, 12, 6, 7, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, offset_groups=3)


# The same for channels in runs of 16, as the fused kernel of CUDA takes them: a run begins in each offset group, not in
# each weight group.
FUSED = Case(2, 96, 3, 3, 20, (2, 3), groups=2, offset_groups=3)


def uneven(backend, device):
    return UNEVEN._replace(h=3, w=4) if interpreted(backend, device) else UNEVEN


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
    x = each(lambda tensor: tensor.to(device), tensors)
    out = kernels(backend).deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    torch.testing.assert_close(out.cpu().double(), formula(case, tensors), rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_a_convolution(backend, device, groups):
    case = Case(2, 8, 7, 6, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=groups, masked=False)
    x = each(lambda tensor: tensor.to(device), problem(case, torch.float32))
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
        Case(1, 3, 2, 3, 2, (3, 3), padding=(7, 7)),  # more padding than map
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
    x = each(lambda tensor: tensor.to(device), problem(case, torch.float16))
    x.weight, x.bias = sliced(x.weight), torch.stack([x.bias, x.bias * torch.nan], 1)[:, 0]
    assert x.weight.stride(1) > 1
    assert x.bias.stride(0) > 1
    assert_right(kernels(backend), device, case, x)


@BACKENDS
def test_expanded_inputs(backend, device):
    case = Case(2, 4, 5, 6, 4)
    tensors = problem(case, torch.float32)
    expanded = each(lambda tensor: tensor[:1].expand(tensor.shape), tensors)
    expanded.bias = tensors.bias
    assert_right(kernels(backend), device, case, expanded)


@BACKENDS
def test_whole_places_and_the_border(backend, device):
    # Each sample is at a whole pixel or on the border of what has an influence: -1 or less, the last pixel, the size.
    case = Case(1, 4, 4, 5, 4, (3, 3), padding=(1, 1), offset_groups=2)
    moves = torch.randint(-6, 7, (1, 36, 4, 5), generator=torch.Generator().manual_seed(0)).double()
    assert_right(kernels(backend), device, case, problem(case, torch.float32, offsets=moves))


@BACKENDS
@pytest.mark.parametrize(
    ("place", "value", "by_y"),
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
def test_a_sample_and_its_derivative(backend, device, place, value, by_y):
    # A map of two rows, 3 and 7, and one tap; its first position is at `place`.
    input = torch.tensor([3.0, 7.0], device=device).view(1, 1, 2, 1)
    offset = torch.zeros(1, 2, 2, 1, device=device)
    offset[0, 0, 0, 0] = place
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
        for axis in ("yx".index(each) for each in axes):
            tensors.offset[0, 2 * (tap % taps) + axis, 1:3, 2] = value
            tensors.offset[1, 2 * ((tap + 5) % taps) + axis, 0, :] = value
    found = assert_right(kernels(backend), device, case, tensors)
    assert found["by_input"].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("case", [Case(1, 8, 5, 6, 4, groups=2), FUSED], ids=str)
def test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(backend, device, case):
    tensors = problem(case, torch.float32)
    tensors.input[0, 3, 2, 2], tensors.input[0, -2, -1, -1] = float("nan"), float("inf")
    expected = results(reference, case, each(torch.Tensor.double, tensors))
    found = results(kernels(backend), case, each(lambda tensor: tensor.to(device), tensors))
    for name in expected:
        assert torch.equal(found[name].isfinite().cpu(), expected[name].isfinite()), name
    assert expected["out"].isfinite().any()
    assert not expected["out"].isfinite().all()


def in_chunks(module, most_bytes):
    """The operators of a backend with columns of so many bytes; they fail where memory for more is taken."""
    found = [value for value in vars(module).values() if isinstance(value, Columns)]
    if not found:
        pytest.skip(f"{module.__name__} has no columns")

    def bounded(kernel, columns_at):
        def call(*args):
            columns = args[columns_at]
            assert columns.shape[1] == 1 or columns.untyped_storage().nbytes() <= most_bytes
            kernel(*args)

        return call

    columns = replace(
        found[0],
        most_bytes=most_bytes,
        sample=bounded(found[0].sample, 5),
        gradients=bounded(found[0].gradients, 0),
    )
    return SimpleNamespace(deform_conv2d=prepared(columns.forward), deform_conv2d_backward=prepared(columns.backward))


def in_cuda_chunks(patch, positions):
    """Limits chunks to the bytes of so many positions; the operators fail where columns and plan take more.

    Returns a list that gets the number of positions of each chunk.
    """
    kernels("cuda")
    launches, counts = import_module("omniops.backends.cuda._deform_launches"), []
    most_of, prepare_of = launches.Problem.most, launches.Problem.prepare
    # Where these kernels have the plan and the columns among their tensors.
    workspaces = {"prepare": (6, 7), "sample": (5,), "gradients": (0, 9)}

    def most(problem, size):
        patch.setattr(launches, "MOST_BYTES", positions * size)
        return most_of(problem, size)

    def prepare(problem, first, count, **more):
        counts.append(count)
        return prepare_of(problem, first, count, **more)

    class Watched(launches.Launch):
        def __call__(self, stream, *tensors):
            places = workspaces.get(self._kernel.__name__, ())
            # Each is rounded up to 512 bytes.
            taken = {tensors[i].data_ptr(): tensors[i].nbytes - 511 for i in places}
            assert counts[-1] == 1 or sum(taken.values()) <= launches.MOST_BYTES
            super().__call__(stream, *tensors)

    patch.setattr(launches.Problem, "most", most)
    patch.setattr(launches.Problem, "prepare", prepare)
    patch.setattr(launches, "Launch", Watched)
    return counts


@BACKENDS
@pytest.mark.parametrize("images", [0, 0.7, 1.5])
@pytest.mark.parametrize("c_out", [6, 260])
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


@given(images=st.integers(1, 9), positions=st.integers(1, 40), most=st.integers(1, 400))
def test_chunks(images, positions, most):
    found = list(chunks(images, positions, most))
    assert [p for first, count in found for p in range(first, first + count)] == list(range(images * positions))
    assert found[0][1] == max(count for _, count in found) <= most
    for first, count in found:
        assert (first % positions == 0 and count % positions == 0) or first % positions + count <= positions
    # No more than it takes.
    fewest = -(-images // (most // positions)) if most >= positions else images * -(-positions // most)
    assert len(found) <= fewest


@BACKENDS
def test_the_results_have_the_memory_formats_of_their_arguments(backend, device):
    case = uneven(backend, device)
    x = each(lambda tensor: tensor.to(device), problem(case, torch.float32))
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
    x = each(lambda tensor: tensor.to(device), problem(case, torch.float32))
    x = each(
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
    x = each(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(case, torch.float32))
    before = each(torch.clone, x)
    found = results(kernels(backend), case, x)
    for name in TENSORS:
        assert torch.equal(getattr(x, name), getattr(before, name))
        for result in found.values():
            assert result.data_ptr() != getattr(x, name).data_ptr()


@BACKENDS
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_each_choice_of_gradients(backend, device, layout, masked):
    case = uneven(backend, device)._replace(masked=masked)
    x = each(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(case, torch.float32))
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


@pytest.fixture
def deterministic():
    """PyTorch's deterministic algorithms, which are afterwards as they were."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want its environment variable set before
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@BACKENDS
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_prepared_serves_other_tensors_and_holds_none(backend, device, layout, deterministic):
    module, case = kernels(backend), uneven(backend, device)
    if interpreted(backend, device) and layout != "contiguous":
        pytest.skip("Triton's interpreter is slow")

    def arguments(seed):
        x = each(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(case, torch.float32, seed))
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
    x = each(lambda tensor: tensor.to(device), problem(case, torch.float32))
    first, second = (results(kernels(backend), case, x) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_backward_of_the_reference_is_autograds_of_its_forward():
    x = problem(UNEVEN, torch.float64)
    needed = [getattr(x, name).requires_grad_() for name in ("input", "offset", "weight", "bias", "mask")]
    out = reference.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *UNEVEN.numbers)
    found = results(reference, UNEVEN, each(torch.Tensor.detach, x))
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
    x = each(LAYOUTS[layout], problem(case, torch.float64))
    names = [name for name in TENSORS if name != "grad" and getattr(x, name) is not None]

    def function(*tensors):
        given_ = {"mask": None, **dict(zip(names, tensors, strict=True))}
        arguments = (given_[name] for name in ("input", "offset", "weight", "bias", "mask"))
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
    x = each(torch.clone, x)
    inputs = {name: value.requires_grad_() for name, value in vars(x).items() if name != "grad" and value is not None}
    out = torchvision.ops.deform_conv2d(x.input, x.offset, x.weight, x.bias, *case.numbers, x.mask)
    gradients = torch.autograd.grad(out, inputs.values(), x.grad)
    return {"out": out.detach(), **{f"by_{name}": each for name, each in zip(inputs, gradients, strict=True)}}


@BACKENDS
@pytest.mark.parametrize("case", [UNEVEN, UNEVEN._replace(masked=False), Case(2, 8, 5, 6, 4)], ids=str)
def test_torchvision_agrees(backend, device, case):
    tensors = problem(case, torch.float64 if torch.float64 in dtypes(backend) else torch.float32)
    expected = torchvisions(case, tensors)
    found = results(kernels(backend), case, each(lambda tensor: tensor.to(device), tensors))
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
        for name, result in results(kernels(backend), UNEVEN, each(lambda x: x.to(device), tensors)).items()
    }
    assert not found["by_offset"][far].any()
    for by_offset in (found["by_offset"], expected["by_offset"]):
        by_offset[far] = 0
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


# --- the C++ kernels ---

needs_cpu = pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ module is not built")

# Enough for several threads, positions that fill no block, and runs of 64, 16, 4 and 1 channels.
LARGER = [
    Case(2, 64, 37, 41, 16),
    Case(1, 64, 37, 41, 16, groups=2, offset_groups=4),
    Case(1, 48, 37, 41, 16, groups=16, offset_groups=12),
    Case(1, 9, 61, 71, 6, groups=3, offset_groups=9),
]


# With runs of 70, 35, 7, 16, 3, 2 and 1 channels: every width of vector, and what is left of one.
EVERY_WIDTH = [
    UNEVEN,
    *(Case(2, c, 5, 7, 4, groups=g, offset_groups=d) for c, g, d in ((70, 2, 1), (70, 1, 2), (63, 1, 9))),
    *(LARGER[i]._replace(h=6, w=9) for i in (1, 2)),
]


def check_every_kernel():
    for dtype, multiplies_bfloat16 in product(TOLERANCES, (False, True)):
        kernels("cpu")._multiplies_bfloat16 = partial(bool, multiplies_bfloat16)
        for case in EVERY_WIDTH:
            assert_right(kernels("cpu"), "cpu", case, problem(case, dtype))


@needs_cpu
def test_what_is_prepared_for_many_chunks_takes_little_memory():
    """A thousand kinds of calls are kept. (The tensors are of one number each, as none is read.)"""
    module, numbers = kernels("cpu"), ([1, 1], [1, 1], [1, 1])
    x, offset, mask = (torch.zeros(1).expand(8, channels, 100, 152) for channels in (512, 18, 9))
    weight = torch.zeros(1).expand(512, 512, 3, 3)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = (
            module.deform_conv2d.prepare(x, offset, weight, None, mask, *numbers),
            module.deform_conv2d_backward.prepare(x, x, offset, weight, mask, *numbers, [True] * 5),
        )
        assert tracemalloc.get_traced_memory()[0] - before < 16 * 1024 * len(kept)
    finally:
        tracemalloc.stop()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiplies_bfloat16", [False, True])
def test_half_precision_goes_into_the_kernels_as_it_is(dtype, multiplies_bfloat16, monkeypatch):
    module, seen = kernels("cpu"), set()

    def spied(function):
        def call(dtype, columns_dtype, *rest):
            seen.add((str(dtype).split(".")[-1], str(columns_dtype).split(".")[-1]))
            return function(dtype, columns_dtype, *rest)

        return call

    monkeypatch.setattr(module._C, "DeformConv2d", spied(module._C.DeformConv2d))
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: multiplies_bfloat16)
    for case in EVERY_WIDTH:
        assert_right(in_chunks(module, 20_000), "cpu", case, problem(case, dtype))
    name = str(dtype).removeprefix("torch.")
    assert seen == {(name, name if dtype == torch.bfloat16 and multiplies_bfloat16 else "float32")}


class Products(TorchDispatchMode):
    """Keeps whether what matrix products write is contiguous."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.contiguous.append(result.is_contiguous())
        return result


@needs_cpu
@pytest.mark.parametrize(("dtype", "copied"), [(torch.bfloat16, True), (torch.float32, False)])
def test_products_of_bfloat16_write_no_transposed_view(dtype, copied, monkeypatch):
    """PyTorch takes seconds for what takes it a millisecond otherwise."""
    module, case = kernels("cpu"), Case(1, 8, 5, 6, 4)
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: True)
    x = problem(case, dtype)
    with Products() as seen:
        module.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    assert seen.contiguous == [copied]
    with Products() as seen:
        module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, [True] * 5)
    assert seen.contiguous == [True] * 2


@pytest.fixture
def set_num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@needs_cpu
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_each_instruction_set_agrees_with_the_oracle(instruction_set):
    available = import_module("omniops._C").instruction_set()
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(available):
        pytest.skip(f"this processor or build has no {instruction_set}")
    environment = {**os.environ, "OMNIOPS_CPU_CAPABILITY": instruction_set}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [instruction_set]


def columns_and_gradients(case, x):
    """What the two C++ kernels compute, without PyTorch's products."""
    module = kernels("cpu")
    geometry = Geometry(case.kernel_size, *case.numbers, case.groups, case.offset_groups)
    image = x.input.permute(0, 2, 3, 1).contiguous()
    taps, positions = geometry.taps, case.n * case.out_size[0] * case.out_size[1]
    columns = image.new_full((case.groups, positions, taps, case.c // case.groups), float("nan"))
    call = module._call(geometry, image.shape, x.offset.shape, image.dtype, columns.dtype)
    module._sample(image, x.offset, x.mask, call, 0, columns)
    by_image, by_offset, by_mask = torch.zeros_like(image), torch.empty_like(x.offset), torch.empty_like(x.mask)
    module._gradients(columns, image, x.offset, x.mask, call, 0, by_image, by_offset, by_mask)
    return columns, by_image, by_offset, by_mask


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(case, dtype, set_num_threads):
    x = problem(case, dtype)
    found = []
    for threads in (1, 2, 3, 16):
        set_num_threads(threads)
        found.append(columns_and_gradients(case, x))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@needs_cpu
def test_the_number_of_threads_is_that_of_torch(monkeypatch, set_num_threads):
    asked = []
    for name in ("deform_conv2d_sample", "deform_conv2d_gradients"):
        monkeypatch.setattr(kernels("cpu")._C, name, lambda *args: asked.append(args[-1]))
    x = problem(UNEVEN, torch.float32)
    for threads in (1, 3):
        set_num_threads(threads)
        columns_and_gradients(UNEVEN, x)
    assert asked == [1, 1, 3, 3]


@needs_cpu
def test_many_python_threads_at_once(set_num_threads):
    set_num_threads(2)
    work = [(case, problem(case, torch.float32, seed)) for case in LARGER for seed in range(3)]
    expected = [columns_and_gradients(*item) for item in work]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: columns_and_gradients(*item), work))
    for results_, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, results_, wanted))


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_computes_too(set_num_threads):
    set_num_threads(2)
    module = kernels("cpu")
    case = LARGER[0]
    x = problem(case, torch.float32)
    geometry = Geometry(case.kernel_size, *case.numbers, 1, 1)
    image = x.input.permute(0, 2, 3, 1).contiguous()
    # NumPy makes and compares the child's tensors, for PyTorch's own thread pool need not survive a fork.
    columns = [torch.from_numpy(np.empty((1, 2 * 37 * 41, 9, 64), np.float32)) for _ in range(2)]
    gradients = [
        [torch.from_numpy(np.zeros(like.shape, np.float32)) for like in (image, x.offset, x.mask)] for _ in range(2)
    ]

    call = module._call(geometry, image.shape, x.offset.shape, torch.float32, torch.float32)

    def compute(which):
        module._sample(image, x.offset, x.mask, call, 0, columns[which])
        module._gradients(columns[which], image, x.offset, x.mask, call, 0, *gradients[which])

    compute(0)
    busy = threading.Event()
    spare = torch.empty_like(columns[0])
    sample = partial(module._sample, image, x.offset, x.mask, call, 0, spare)
    other = threading.Thread(target=lambda: [sample() for _ in range(2000) if not busy.is_set()])
    other.start()  # so that the fork falls into a call
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that hangs ends as a failure
            compute(1)
            pairs = zip((columns[0], *gradients[0]), (columns[1], *gradients[1]), strict=True)
            os._exit(0 if all(np.array_equal(one.numpy(), two.numpy()) for one, two in pairs) else 1)
    finally:
        busy.set()
        other.join()
    assert os.waitpid(child, 0)[1] == 0


@needs_cpu
def test_maps_of_too_many_rows_are_refused():
    module = kernels("cpu")
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1, 1)
    image = torch.zeros(1).expand(1, 2**30, 1, 1)
    offset, columns = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1)
    call = module._call(geometry, image.shape, offset.shape, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"input must have fewer than 2\*\*30 rows and columns"):
        module._sample(image, offset, None, call, 0, columns)
    with pytest.raises(ValueError, match=r"input must have fewer than 2\*\*30 rows and columns"):
        module._gradients(columns, image, offset, None, call, 0, image, offset, None)


@needs_cpu
def test_a_map_beyond_two_to_the_31():
    height, width, stride = 46341, 46342, 4096
    try:
        # Zeros that take address space, but memory only where they are written.
        image, by_image = (torch.from_numpy(np.zeros((1, height, width, 1), np.float32)) for _ in range(2))
    except MemoryError:
        pytest.skip("the system does not give out memory that it may not have")
    assert image.numel() > 2**31
    rows, columns = -(-height // stride), -(-width // stride)
    values = torch.arange(1.0, 1 + rows * columns).view(rows, columns)
    image[0, ::stride, ::stride, 0] = values
    geometry = Geometry((1, 1), (stride, stride), (0, 0), (1, 1), 1, 1)
    # Each position samples the one before it, from its last to its first row.
    offset = torch.zeros(1, 2, rows, columns)
    offset[0, 0, 1:] = -stride
    offset[0, 0, 0] = (rows - 1) * stride
    samples = torch.empty(1, rows * columns, 1, 1)
    call = kernels("cpu")._call(geometry, image.shape, offset.shape, torch.float32, torch.float32)
    kernels("cpu")._sample(image, offset, None, call, 0, samples)
    assert torch.equal(samples.view(rows, columns), values.roll(1, 0))
    kernels("cpu")._gradients(samples, image, offset, None, call, 0, by_image, torch.empty_like(offset), None)
    assert torch.equal(by_image[0, ::stride, ::stride, 0], values)


# --- the Triton kernels ---

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FUSED_CASES = [
    FUSED,
    Case(2, 128, 2, 3, 40, (1, 2), (1, 1), (0, 1), (1, 2), offset_groups=2, masked=False),  # blocks within a run
    Case(1, 64, 3, 2, 12, (2, 1), (2, 1), (1, 0), groups=4, offset_groups=2),
]


def is_fused(x, case):
    problem = kernels("cuda").Problem(x.input, x.offset, x.weight, x.mask, *case.numbers)
    return import_module("omniops.backends.cuda._deform_forward").is_fused(problem, has_tf32=True)


def assert_fused_is_right(case, dtype, tolerance=None):
    module, tensors = kernels("cuda"), problem(case, dtype)
    x = each(lambda tensor: tensor.to(TRITON_DEVICE), tensors)
    assert is_fused(x, case)
    out = module.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    tensors = each(torch.Tensor.double, tensors)
    expected = reference.deform_conv2d(
        tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask, *case.numbers
    )
    error = (out.cpu() - expected).abs().max() / expected.abs().max()
    assert error <= (tolerance or TOLERANCES[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_the_fused_forward(case, dtype):
    assert_fused_is_right(case, dtype)


@needs_triton
@pytest.mark.parametrize(("n", "positions", "counts"), [(2, 7, [6] * 4), (3, 30, [24, 12])])
def test_the_fused_forward_in_chunks(n, positions, counts, monkeypatch):
    """Of parts of an image, and of images."""
    found = in_cuda_chunks(monkeypatch, positions)
    assert_fused_is_right(FUSED._replace(n=n), torch.float32)
    assert found == counts


@pytest.fixture
def matmul():
    """PyTorch's switches of float32 products, which are afterwards as they were."""
    switches = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    precision = torch.get_float32_matmul_precision()
    before = [getattr(switch, "fp32_precision", None) for switch in switches]
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision(precision)
    for switch, value in zip(switches, before, strict=True):
        if value is not None:
            switch.fp32_precision = value


@needs_triton
def test_pytorchs_switches_of_tf32_are_honoured(matmul, monkeypatch):
    module = kernels("cuda")
    for allowed in (True, False, True):
        matmul.allow_tf32 = allowed
        assert module.is_tf32() == allowed
    for precision, allowed in (("highest", False), ("high", True), ("highest", False), ("medium", True)):
        torch.set_float32_matmul_precision(precision)
        assert module.is_tf32() == allowed
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9
        for precision in ("ieee", "tf32", "none"):
            matmul.fp32_precision = precision
            assert module.is_tf32() == (precision == "tf32")
    for allowed in (True, False):  # before torch 2.9
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert module.is_tf32() == allowed


@pytest.fixture
def precisions(monkeypatch):
    """Whether products are of float32 and not of TF32: for each launch of a kernel that has them, as they come."""
    found = []
    for name in ("_deform_launches", "_float32_products"):
        module = import_module(f"omniops.backends.cuda.{name}")

        class Watched(module.Launch):
            def __call__(self, stream, *tensors):
                if "PRECISE" in self._constants:
                    found.append(self._constants["PRECISE"])
                super().__call__(stream, *tensors)

        monkeypatch.setattr(module, "Launch", Watched)
    return found


@needs_triton
def test_the_switch_of_tf32_is_asked_at_each_call(matmul, precisions):
    module, case = kernels("cuda"), FUSED
    x = each(lambda tensor: tensor.to(TRITON_DEVICE), problem(case, torch.float32))
    numbers = *case.numbers, [True] * 5
    forward = module.deform_conv2d.prepare(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    backward = module.deform_conv2d_backward.prepare(x.grad, x.input, x.offset, x.weight, x.mask, *numbers)
    expected = results(reference, case, each(torch.Tensor.double, x))
    for allowed, tolerance in ((False, 1e-5), (True, 2e-3), (False, 1e-5)):
        matmul.allow_tf32 = allowed
        precisions.clear()
        out = forward(x.input, x.offset, x.weight, x.bias, x.mask)
        assert precisions == [not allowed]
        gradients = backward(x.grad, x.input, x.offset, x.weight, x.mask)
        assert set(precisions) <= {not allowed}
        for result, wanted in zip((out, *gradients), expected.values(), strict=True):
            assert (result - wanted).abs().max() <= tolerance * wanted.abs().max()


@needs_triton
def test_without_tensor_cores_products_are_pytorchs(precisions, monkeypatch):
    module, case = kernels("cuda"), FUSED._replace(c_out=32)
    monkeypatch.setattr(module, "has_tf32", lambda tensor: False)
    assert_right(module, TRITON_DEVICE, case, problem(case, torch.float32))
    assert not precisions


@needs_triton
def test_the_fused_forward_in_tf32(matmul, precisions):
    matmul.allow_tf32 = True
    assert_fused_is_right(FUSED, torch.float32, tolerance=2e-3)
    assert precisions == [False]


@needs_triton
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize(
    ("case", "positions"),
    [
        (UNEVEN._replace(h=3, w=4), None),
        (UNEVEN._replace(h=3, w=4), 4),
        (Case(2, 64, 2, 3, 4, (1, 2), padding=(0, 1), groups=2, offset_groups=2), 5),
        (Case(2, 300, 2, 2, 2, (1, 1), padding=(0, 0)), None),
    ],
    ids=str,
)
def test_deterministic_gradients(case, positions, deterministic, monkeypatch):
    module, tensors = kernels("cuda"), problem(case, torch.float32)
    if positions is not None:
        in_cuda_chunks(monkeypatch, positions)
    first, second = (assert_right(module, TRITON_DEVICE, case, tensors) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@needs_triton
def test_deterministic_algorithms_are_asked_for_at_each_call(deterministic, monkeypatch):
    module, case = kernels("cuda"), UNEVEN._replace(h=3, w=4)
    gathers, gather = [], module.Problem.sorted
    monkeypatch.setattr(module.Problem, "sorted", lambda *args: gathers.append(1) or gather(*args))
    x = each(lambda tensor: tensor.to(TRITON_DEVICE), problem(case, torch.float32))
    arguments = x.grad, x.input, x.offset, x.weight, x.mask
    run = module.deform_conv2d_backward.prepare(*arguments, *case.numbers, [True] * 5)
    gathered = run(*arguments)
    assert len(gathers) == 1
    torch.use_deterministic_algorithms(False)
    added = run(*arguments)
    assert len(gathers) == 1
    for one, other in zip(added, gathered, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.fixture
def bounds(monkeypatch):
    """Has Triton's interpreter fail where a kernel reads or writes beside its tensors; it gets their kernels' names."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is what looks at addresses")
    from triton.runtime.interpreter import InterpreterBuilder

    from omniops.backends.cuda._launch import Launch

    names, memory = set(), []
    call = Launch.__call__

    def span(tensor):
        """From the first element to behind the last."""
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return 1 + reach if tensor.numel() > 0 else 0

    def launch(self, stream, *tensors):
        names.add(self._kernel.__name__)
        memory[:] = [(each.data_ptr(), each.data_ptr() + span(each) * each.itemsize) for each in tensors]
        call(self, stream, *tensors)

    def watched(access):
        def checked(builder, pointers, *rest):
            mask = rest[1] if access.__name__ == "create_masked_store" else rest[0]
            addresses = pointers.data[mask.data.astype(bool)]
            inside = np.zeros(addresses.shape, bool)
            for first, end in memory:
                inside |= (addresses >= first) & (addresses < end)
            assert inside.all(), names
            return access(builder, pointers, *rest)

        return checked

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name)))
    monkeypatch.setattr(Launch, "__call__", launch)
    return names


@needs_triton
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize(
    "case",
    [
        # Maps of one pixel, of which a block of positions has many; one case for each forward.
        Case(3, 6, 1, 1, 2, offset_groups=2),
        Case(3, 32, 1, 1, 2, (1, 2)),
        Case(3, 32, 1, 1, 2, (2, 1), groups=2, offset_groups=16),
        Case(3, 64, 1, 1, 80, (1, 2), masked=False),
    ],
    ids=str,
)
def test_no_kernel_reads_beside_its_tensors(case, bounds, deterministic):
    module, tensors = kernels("cuda"), problem(case, torch.float32)
    x = each(lambda tensor: tensor.to(TRITON_DEVICE), tensors)
    module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, [True] + [False] * 4)
    torch.use_deterministic_algorithms(False)
    assert_right(module, TRITON_DEVICE, case, tensors)
    assert {"prepare", "gradients", "gather", "finish"} <= bounds


@needs_triton
@pytest.mark.parametrize("case", [Case(1, 16, 1, 1, 2), Case(1, 16, 1, 1, 2, offset_groups=2)], ids=str)
def test_offsets_far_apart_in_memory(case, bounds):
    """Strides whose double is beyond 32 bits."""
    case = case._replace(kernel_size=(1, 1), padding=(0, 0), masked=False)
    x, far = problem(case, torch.float16), 2**30
    try:
        # Zeros that take address space, but memory only where they are written.
        memory = torch.from_numpy(np.zeros((2 * case.offset_groups - 1) * far + 1, np.float16))
    except MemoryError:
        pytest.skip("the system does not give out memory that it may not have")
    offset = memory.as_strided(x.offset.shape, (far, far, 1, 1))
    x.offset = offset.copy_(x.offset)
    out = kernels("cuda").deform_conv2d(x.input, x.offset, x.weight, x.bias, None, *case.numbers)
    x = each(torch.Tensor.double, x)
    expected = reference.deform_conv2d(x.input, x.offset, x.weight, x.bias, None, *case.numbers)
    assert (out - expected).abs().max() <= 2e-3 * expected.abs().max()


@needs_triton
def test_a_lone_gradient_of_the_bias_launches_nothing(monkeypatch):
    case = UNEVEN._replace(h=3, w=4)
    x = each(lambda tensor: tensor.to(TRITON_DEVICE), problem(case, torch.float32))
    module = kernels("cuda")
    launch = import_module("omniops.backends.cuda._launch").Launch
    monkeypatch.setattr(launch, "__call__", lambda *_: pytest.fail("a kernel was launched"))
    wanted = [False, False, False, True, False]
    gradients = module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, wanted)
    assert [gradient.numel() for gradient in gradients] == [0, 0, 0, case.c_out, 0]
    torch.testing.assert_close(gradients[3], x.grad.sum((0, 2, 3)))


def on_meta(case):
    """The tensors of a case, without memory."""
    taps, size = case.kernel_size[0] * case.kernel_size[1], case.out_size
    shapes = {
        "input": (case.n, case.c, case.h, case.w),
        "offset": (case.n, case.offset_groups * taps * 2, *size),
        "weight": (case.c_out, case.c // case.groups, *case.kernel_size),
        "bias": (case.c_out,),
        "mask": (case.n, case.offset_groups * taps, *size),
        "grad": (case.n, case.c_out, *size),
    }
    return SimpleNamespace(
        **{name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    )


POINT = Case(1, 1, 1, 1, 1, (1, 1), padding=(0, 0))


@needs_triton
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            POINT._replace(h=2**16 - 2, w=2**15 - 2, stride=(2**16, 1)),
            r"input must have \(H \+ 2\) \* \(W \+ 2\) below 2",
        ),
        (POINT._replace(c=2**20, w=2**11 - 2), r"input must have C \* \(W \+ 2\) below 2\*\*31 on CUDA"),
        (POINT._replace(n=2**16, h=2**15 - 2, stride=(2**15, 1)), r"input must have N \* \(H \+ 2\) below 2\*\*31 on"),
        (
            POINT._replace(n=2, padding=(2**14, 2**14)),
            r"offset must have N \* H_out \* W_out below 2\*\*31 - 4096 on CUDA",
        ),
        (POINT._replace(c=2**22 - 63), r"input must have C below 2\*\*22 - 63 on CUDA"),
        (
            POINT._replace(c=2**20, kernel_size=(64, 32), padding=(32, 16)),
            r"weight must have C \* kh \* kw below 2\*\*31 on CUDA, got C = 1048576 and a kernel of \(64, 32\)",
        ),
        (
            POINT._replace(kernel_size=(256, 256), padding=(128, 128)),
            r"weight must have at most 65535 taps on CUDA, got a kernel of \(256, 256\)",
        ),
        (POINT._replace(c=2**16, offset_groups=2**16), "at most 65535 groups on CUDA, got 65536 offset groups and 1"),
        (POINT._replace(c=2**16, c_out=2**16, groups=2**16), "got 1 offset groups and 65536 weight groups"),
    ],
    ids=str,
)
def test_sizes_that_the_triton_kernels_cannot_index_are_refused_by_name(case, message):
    module, x = kernels("cuda"), on_meta(case)
    with pytest.raises(ValueError, match=message):
        module.deform_conv2d.prepare(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    numbers = *case.numbers, [True] * 5
    with pytest.raises(ValueError, match=message):
        module.deform_conv2d_backward.prepare(x.grad, x.input, x.offset, x.weight, x.mask, *numbers)


@needs_triton
def test_weights_beyond_32_bits_are_not_for_the_fused_kernel():
    case = POINT._replace(c=2**21, kernel_size=(4, 4), padding=(2, 2), groups=2)
    for per_group, fused in ((127, True), (128, False)):
        case = case._replace(c_out=2 * per_group)
        assert is_fused(on_meta(case), case) == fused


if __name__ == "__main__":
    check_every_kernel()
    print(import_module("omniops._C").instruction_set())
