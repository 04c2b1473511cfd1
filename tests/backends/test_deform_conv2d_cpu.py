"""What is particular to deform_conv2d's C++ kernels.

Run as a program, this file holds them against the reference for the instruction set it finds.
"""

import tracemalloc
from functools import partial
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from backend_cases import TOLERANCES
from cpu_kernels import (
    INSTRUCTION_SETS,
    NEEDS_CPU_KERNELS,
    NEEDS_FORK,
    assert_same_in_a_forked_child,
    assert_same_in_python_threads,
    assert_same_with_any_number_of_threads,
    run_with,
)
from deform_conv2d_cases import UNEVEN, Case, assert_right, in_chunks, kernels, problem
from torch.utils._python_dispatch import TorchDispatchMode

import omniops.ops.deform_conv2d  # noqa: F401  registers the operator
from omniops.backends.columns import Geometry

pytestmark = NEEDS_CPU_KERNELS


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
        kernels("cpu").x86_has_bfloat16 = partial(bool, multiplies_bfloat16)
        for case in EVERY_WIDTH:
            assert_right(kernels("cpu"), "cpu", case, problem(case, dtype))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiplies_bfloat16", [False, True])
def test_half_precision_goes_into_the_kernels_as_it_is(dtype, multiplies_bfloat16, monkeypatch):
    module, dtypes = kernels("cpu"), set()

    def spied(function):
        def call(dtype, columns_dtype, *rest):
            dtypes.add((str(dtype).split(".")[-1], str(columns_dtype).split(".")[-1]))
            return function(dtype, columns_dtype, *rest)

        return call

    monkeypatch.setattr(module._C, "DeformConv2d", spied(module._C.DeformConv2d))
    monkeypatch.setattr(module, "x86_has_bfloat16", lambda: multiplies_bfloat16)
    for case in EVERY_WIDTH:
        assert_right(in_chunks(module, 20_000), "cpu", case, problem(case, dtype))
    name = str(dtype).removeprefix("torch.")
    assert dtypes == {(name, name if dtype == torch.bfloat16 and multiplies_bfloat16 else "float32")}


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


@pytest.mark.parametrize(("dtype", "copied"), [(torch.bfloat16, True), (torch.float32, False)])
def test_products_of_bfloat16_write_no_transposed_view(dtype, copied, monkeypatch):
    """PyTorch takes seconds for what takes it a millisecond otherwise."""
    module, case = kernels("cpu"), Case(1, 8, 5, 6, 4)
    monkeypatch.setattr(module, "x86_has_bfloat16", lambda: True)
    x = problem(case, dtype)
    with Products() as products:
        module.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    assert products.contiguous == [copied]
    with Products() as products:
        module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, [True] * 5)
    assert products.contiguous == [True] * 2


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_each_instruction_set_agrees_with_the_oracle(instruction_set):
    run_with(instruction_set, __file__)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(case, dtype, set_num_threads):
    x = problem(case, dtype)
    assert_same_with_any_number_of_threads(lambda: columns_and_gradients(case, x), set_num_threads)


def test_the_number_of_threads_is_that_of_torch(monkeypatch, set_num_threads):
    asked = []
    for name in ("deform_conv2d_sample", "deform_conv2d_gradients"):
        monkeypatch.setattr(kernels("cpu")._C, name, lambda *args: asked.append(args[-1]))
    x = problem(UNEVEN, torch.float32)
    for threads in (1, 3):
        set_num_threads(threads)
        columns_and_gradients(UNEVEN, x)
    assert asked == [1, 1, 3, 3]


def test_many_python_threads_at_once(set_num_threads):
    set_num_threads(2)
    work = [(case, problem(case, torch.float32, seed)) for case in LARGER for seed in range(3)]
    assert_same_in_python_threads(lambda item: columns_and_gradients(*item), work)


@NEEDS_FORK
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_computes_too(set_num_threads):
    set_num_threads(2)
    module = kernels("cpu")
    case = LARGER[0]
    x = problem(case, torch.float32)
    geometry = Geometry(case.kernel_size, *case.numbers, 1, 1)
    image = x.input.permute(0, 2, 3, 1).contiguous()
    call = module._call(geometry, image.shape, x.offset.shape, torch.float32, torch.float32)
    columns_shape = (1, 2 * 37 * 41, 9, 64)

    def compute():
        # NumPy makes the child's tensors, for PyTorch's own thread pool need not survive a fork.
        columns = torch.from_numpy(np.empty(columns_shape, np.float32))
        gradients = [torch.from_numpy(np.zeros(like.shape, np.float32)) for like in (image, x.offset, x.mask)]
        module._sample(image, x.offset, x.mask, call, 0, columns)
        module._gradients(columns, image, x.offset, x.mask, call, 0, *gradients)
        return columns, *gradients

    assert_same_in_a_forked_child(
        compute, partial(module._sample, image, x.offset, x.mask, call, 0, torch.empty(columns_shape))
    )


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


if __name__ == "__main__":
    check_every_kernel()
    print(import_module("omniops._C").instruction_set())
