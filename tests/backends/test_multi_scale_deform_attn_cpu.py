"""What is particular to multi_scale_deform_attn's C++ kernels; test_multi_scale_deform_attn.py holds them against the
reference. Run as a program, this file does so for the instruction set that it finds.
"""

from importlib import import_module
from itertools import product
from types import SimpleNamespace

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
from multi_scale_attention import (
    DISCRETE,
    UNEVEN,
    Case,
    amid_nan,
    assert_right,
    backward,
    forward,
    kernels,
    problem,
    results,
)

from omniops.backends.reference import multi_scale_deform_attn as reference

pytestmark = NEEDS_CPU_KERNELS

# Enough for several threads, with levels shared out and not. The second fills no block of points and no vector, its
# largest level is not the first, one has no pixels and one no points.
LARGER = [
    Case(2, 190, 8, 32, ((20, 30), (10, 15), (5, 8), (3, 4)), (4, 4, 4, 4)),
    Case(1, 1500, 3, 21, ((5, 8), (0, 4), (20, 30), (3, 3)), (5, 2, 3, 0)),
    Case(1, 9000, 1, 8, ((20, 30),), (5,)),
]


def check_every_kernel():
    # Every width of vector, and what is left of one.
    for dtype, channels, discrete in product(TOLERANCES, (1, 2, 7, 31, 32, 70, 131), (False, True)):
        case = UNEVEN._replace(channels=channels, discrete=discrete)
        assert_right(kernels("cpu"), "cpu", case, problem(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_channels(dtype):
    for channels in range(1, 71):
        case = Case(1, 2, 2, channels, ((3, 2),), (3,))
        assert_right(kernels("cpu"), "cpu", case, problem(case, dtype), amid_nan)


@pytest.fixture
def new_tensors_are_nan():
    torch.use_deterministic_algorithms(True)  # PyTorch fills what is empty then
    assert torch.empty_strided((3,), (1,)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_each_instruction_set_agrees_with_the_oracle(instruction_set):
    run_with(instruction_set, __file__)


@DISCRETE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.usefixtures("new_tensors_are_nan")
def test_the_number_of_threads_does_not_change_a_bit(case, dtype, discrete, set_num_threads):
    case = case._replace(discrete=discrete)
    x = problem(case, dtype)
    found = assert_same_with_any_number_of_threads(lambda: results(kernels("cpu"), case, x).values(), set_num_threads)
    right = assert_right(kernels("cpu"), "cpu", case, x)
    assert all(map(torch.equal, found, right.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_each_choice_of_gradients_of_many_samples(case, dtype, set_num_threads):
    """So many that the pixels of a head are copied, beside the sums of the gradient of value or not."""
    x = problem(case, dtype)
    every = backward(kernels("cpu"), case, x)
    for threads, mask in product((1, 5), product((False, True), repeat=3)):
        set_num_threads(threads)
        for result, wanted, is_wanted in zip(backward(kernels("cpu"), case, x, mask), every, mask, strict=True):
            assert torch.equal(result, wanted if is_wanted else wanted.new_empty(0, dtype=dtype))


def test_the_number_of_threads_is_that_of_torch(monkeypatch, set_num_threads):
    asked = []
    for name in ("multi_scale_deform_attn", "multi_scale_deform_attn_backward"):
        monkeypatch.setattr(kernels("cpu")._C, name, lambda *args: asked.append(args[-1]))
    x = problem(UNEVEN, torch.float32)
    for threads in (1, 3):
        set_num_threads(threads)
        results(kernels("cpu"), UNEVEN, x)
    assert asked == [1, 1, 3, 3]


def test_many_python_threads_at_once(set_num_threads):
    set_num_threads(2)
    work = [(case, problem(case, torch.float32, seed=seed)) for case in LARGER for seed in range(3)]
    assert_same_in_python_threads(lambda item: results(kernels("cpu"), *item).values(), work)


@NEEDS_FORK
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_computes_too(set_num_threads):
    set_num_threads(2)
    module, case = kernels("cpu"), LARGER[0]
    x = problem(case, torch.float32)
    assert_same_in_a_forked_child(lambda: results(module, case, x).values(), lambda: forward(module, case, x))


def test_a_sample_lies_where_pytorchs_two_operators_find_it():
    """Beside a pixel, where a fused multiplication and addition would find some samples on its other side."""
    width = 100
    pixels = torch.arange(0.5, width) / width
    beside = [pixels.view(torch.int32).add(steps).view(torch.float32) for steps in range(-6, 7)]
    across = torch.cat(
        [*beside, *((pixels + 0.5 / width).view(torch.int32).add(s).view(torch.float32) for s in (-1, 1))]
    )
    fused = (across.double() * width - 0.5).float()  # exact before it is rounded
    assert ((across * width - 0.5).floor() != fused.floor()).sum() > 2
    case = Case(1, len(across), 1, 4, ((1, width),), (1,))
    x = problem(case, torch.float32)
    x.locations = torch.stack([across, torch.full_like(across, 0.5)], -1).view(x.locations.shape)
    found, expected = backward(kernels("cpu"), case, x)[1], backward(reference, case, x)[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(2**30, 1), (1, 2**30)])
def test_levels_of_too_many_rows_are_refused(shape):
    module = import_module("omniops._C")
    call = module.MultiScaleDeformAttn(module.Dtype.float32, 1, 1, 1, 1, list(shape), [1], False)
    for kernel, tensors in ((module.multi_scale_deform_attn, 4), (module.multi_scale_deform_attn_backward, 7)):
        with pytest.raises(ValueError, match=r"a level of value must have fewer than 2\*\*30 rows and columns"):
            kernel(call, *(64,) * tensors, 1)  # addresses that nothing is read from


@DISCRETE
def test_a_map_beyond_two_to_the_31(discrete):
    height, width, stride = 46341, 46342, 4096
    try:
        # Zeros that take address space, but memory only where they are written.
        value = torch.from_numpy(np.zeros((1, height * width + 6, 1, 1), np.float16))
    except MemoryError:
        pytest.skip("the system does not give out memory that it may not have")
    assert value.numel() > 2**31
    rows, columns = -(-height // stride), -(-width // stride)
    values = torch.arange(1.0, 1 + rows * columns)
    value[0, :-6].view(height, width)[::stride, ::stride] = values.view(rows, columns).half()
    value[0, -6:, 0, 0] = torch.arange(1.0, 7.0)  # the next level
    case = Case(1, rows * columns, 1, 1, ((height, width), (2, 3)), (1, 1), discrete)
    across, down = (torch.arange(0, side, stride) for side in (width, height))
    pixels = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], -1).view(-1, 2)
    sizes = torch.tensor([width, height])
    locations = torch.full((1, rows * columns, 1, 2, 2), 0.99)
    # float32 has a few digits behind the point, which the middle of a pixel bears in one method and not in the other.
    locations[0, :, 0, 0] = (pixels + (0.25 if discrete else 0.5)) / sizes
    weights = torch.tensor([1.0, 0.0]).expand(1, rows * columns, 1, 2)
    x = SimpleNamespace(value=value, locations=locations, weights=weights)
    out = forward(kernels("cpu"), case, x).flatten().float()
    torch.testing.assert_close(out, values, rtol=0.05, atol=0)
    x.weights = 1 - weights
    out = forward(kernels("cpu"), case, x).flatten()
    assert out.eq(6 if discrete else out[0]).all()
    assert out[0] > 1


if __name__ == "__main__":
    check_every_kernel()
    print(import_module("omniops._C").instruction_set())
