"""What is particular to the C++ kernels: threads, fork, instruction sets, 64-bit indices. tests/backends/test_carafe.py
holds them against the reference; run as a program, this file does so briefly for the instruction set it finds.
"""

import ctypes
import gc
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import pytest
import torch
from backend_cases import TOLERANCES
from cpu_kernels import (
    INSTRUCTION_SETS,
    NEEDS_FORK,
    assert_same_in_a_forked_child,
    assert_same_in_python_threads,
    assert_same_with_any_number_of_threads,
    run_with,
)

from omniops.backends import reference
from omniops.backends.reference import carafe as oracle

_C = pytest.importorskip("omniops._C", reason="omniops was installed without a C++ compiler: there are no CPU kernels")
from omniops.backends.cpu import carafe as cpu  # noqa: E402  the module is there

FORMATS = (torch.contiguous_format, torch.channels_last)
OPERATORS = ("carafe", "carafe_backward_features", "carafe_backward_masks")
TOLERANCES = {**TOLERANCES, torch.float64: 1e-13}
# kernel_size, group_size, scale_factor, stride
SETTINGS = ((5, 1, 2, 1), (3, 2, 2, 1), (5, 2, 1, 2), (7, 1, 3, 1), (3, 1, 3, 2), (1, 1, 1, 1), (3, 2, 1, 4))


def arguments(operator, shape, settings, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    """What the backends' function ``operator`` takes, for features of the given shape."""
    generator = torch.Generator().manual_seed(seed)
    kernel_size, group_size, scale_factor, stride = settings
    n, c, h, w = shape
    height, width = math.ceil(h / stride) * scale_factor, math.ceil(w / stride) * scale_factor

    def normal(*size):
        values = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return values.contiguous(memory_format=memory_format)

    features, grad = normal(*shape), normal(n, c, height, width)
    masks = normal(n, group_size * kernel_size**2, height, width)
    return {
        "carafe": (features, masks, *settings),
        "carafe_backward_features": (grad, masks, h, w, *settings),
        "carafe_backward_masks": (grad, features, *settings),
    }[operator]


def error(operator, args):
    """The greatest difference from the oracle in float64, relative to the result's scale."""
    expected = getattr(oracle, operator)(*(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args))
    result = getattr(cpu, operator)(*args)
    assert result.shape == expected.shape
    assert result.dtype == args[0].dtype
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


def check_every_kernel():
    for dtype, tolerance in TOLERANCES.items():
        for memory_format in FORMATS:
            for settings in SETTINGS:
                # 70 channels: whole blocks, whole vectors and a rest, in each instruction set.
                for shape in ((1, 70, 5, 7), (2, 4, 9, 37)):
                    for operator in OPERATORS:
                        args = arguments(operator, shape, settings, dtype, memory_format)
                        found = error(operator, args)
                        assert found <= tolerance, (operator, dtype, memory_format, settings, shape, found)


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_each_instruction_set_agrees_with_the_oracle(instruction_set):
    run_with(instruction_set, __file__)


def test_every_format_and_dtype_is_served_by_this_backend():
    assert cpu.carafe.__module__ == "omniops.backends.cpu.carafe"
    assert set(cpu.DTYPES) == set(reference.DTYPES)


@pytest.mark.parametrize("operator", OPERATORS)
def test_half_rounds_to_the_nearest_once(operator):
    # With one tap and one channel each result is one product, exact in float32.
    for dtype in (torch.float16, torch.bfloat16):
        for memory_format in FORMATS:
            first, second, *rest = arguments(operator, (1, 1, 16, 40), (1, 1, 1, 1), dtype, memory_format)
            # Small enough that products are subnormal in float16, too.
            first = first * torch.logspace(-8, 0, 40, 10).to(dtype)
            expected = (first.float() * second.float()).to(dtype)
            torch.testing.assert_close(getattr(cpu, operator)(first, second, *rest), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_passes_unchanged(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    features = every.reshape(1, 1, 256, 256)
    for memory_format in FORMATS:
        out = cpu.carafe(
            features.expand(1, 8, 256, 256).contiguous(memory_format=memory_format),
            torch.ones(1, 1, 256, 256, dtype=dtype),
            1,
            1,
            1,
            1,
        )
        for channel in out[0]:
            torch.testing.assert_close(channel, features[0, 0], rtol=0, atol=0, equal_nan=True)


def test_float16_overflows_to_infinity():
    features = torch.full((1, 1, 1, 4), 256.0, dtype=torch.float16)
    masks = torch.tensor([255.75, 255.9, 256.0, -256.0], dtype=torch.float16).reshape(1, 1, 1, 4)
    expected = (features.float() * masks.float()).to(torch.float16)
    assert torch.equal(cpu.carafe(features, masks, 1, 1, 1, 1), expected)
    assert expected.isinf().any()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_number_of_threads_does_not_change_a_bit(operator, memory_format, set_num_threads):
    args = arguments(operator, (2, 96, 40, 60), (5, 2, 2, 1), memory_format=memory_format)
    assert_same_with_any_number_of_threads(lambda: [getattr(cpu, operator)(*args)], set_num_threads)


def test_the_number_of_threads_is_that_of_torch(monkeypatch, set_num_threads):
    asked = []
    monkeypatch.setattr(cpu._C, "carafe", lambda *args: asked.append(args[-1]))
    for threads in (1, 3):
        set_num_threads(threads)
        cpu.carafe(*arguments("carafe", (1, 4, 5, 6), (3, 1, 2, 1)))
    assert asked == [1, 3]


def test_many_python_threads_at_once(set_num_threads):
    set_num_threads(2)
    work = [
        (operator, arguments(operator, (1, 32, 30, 40), (5, 1, 2, 1), memory_format=memory_format, seed=seed))
        for operator in OPERATORS
        for memory_format in FORMATS
        for seed in range(4)
    ]
    assert_same_in_python_threads(lambda item: [getattr(cpu, item[0])(*item[1])], work)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("operator", [*OPERATORS, "carafe_backward"])
def test_what_is_prepared_serves_other_tensors_and_holds_none(operator, memory_format):
    def make_arguments(seed):
        if operator != "carafe_backward":
            return arguments(operator, (2, 6, 5, 7), (3, 2, 2, 1), memory_format=memory_format, seed=seed)
        grad, masks, *sizes = arguments(
            OPERATORS[1], (2, 6, 5, 7), (3, 2, 2, 1), memory_format=memory_format, seed=seed
        )
        return (grad, torch.randn(2, 6, 5, 7).contiguous(memory_format=memory_format), masks, *sizes)

    kernel, first, second = getattr(cpu, operator), make_arguments(0), make_arguments(1)
    run = kernel.prepare(*first)
    run(*first)
    found, expected = run(*second), kernel(*second)
    if operator != "carafe_backward":
        found, expected = (found,), (expected,)
    assert all(map(torch.equal, found, expected))
    tensors = [weakref.ref(value) for value in first if isinstance(value, torch.Tensor)]
    del first
    gc.collect()
    assert [ref() for ref in tensors] == [None] * len(tensors)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_both_gradients_or_one(memory_format):
    settings = (3, 2, 2, 1)
    grad, masks, h, w, *sizes = arguments(OPERATORS[1], (2, 6, 5, 7), settings, memory_format=memory_format)
    grad, features, *_ = arguments(OPERATORS[2], (2, 6, 5, 7), settings, memory_format=memory_format)
    by_features = cpu.carafe_backward_features(grad, masks, h, w, *sizes)
    by_masks = cpu.carafe_backward_masks(grad, features, *sizes)
    for tensors in ((features, masks), (features, None), (None, masks)):
        found = cpu.carafe_backward(grad, *tensors, h, w, *sizes)
        assert torch.equal(found[0], by_features if tensors[1] is not None else grad.new_empty(0))
        assert torch.equal(found[1], by_masks if tensors[0] is not None else grad.new_empty(0))


def longest_wait(call):
    """For how much of a call in another thread this one stood still at most: its longest gap, over the call's time."""
    times = {}

    def timed():
        times["begin"] = perf_counter()
        call()
        times["end"] = perf_counter()

    worker = threading.Thread(target=timed)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(perf_counter())
        sleep(0.001)
    begin, end = times["begin"], times["end"]
    moments = [begin, *(tick for tick in ticks if begin < tick < end), end]
    return max(later - earlier for earlier, later in pairwise(moments)) / (end - begin)


def test_the_interpreter_runs_on_meanwhile(set_num_threads):
    set_num_threads(1)
    for memory_format in FORMATS:
        for operator in OPERATORS:
            args = arguments(operator, (1, 64, 64, 64), (21, 1, 2, 1), memory_format=memory_format)
            # The least of some, as a busy machine may make this thread wait too.
            assert min(longest_wait(partial(getattr(cpu, operator), *args)) for _ in range(5)) < 0.5
    # What a call that keeps the interpreter to itself looks like.
    assert min(longest_wait(partial(ctypes.PyDLL(None).usleep, 100_000)) for _ in range(5)) > 0.9


@NEEDS_FORK
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_computes_too(set_num_threads):
    set_num_threads(2)
    work = [(operator, arguments(operator, (1, 32, 40, 40), (5, 1, 2, 1))) for operator in OPERATORS]
    assert_same_in_a_forked_child(
        lambda: [getattr(cpu, operator)(*args) for operator, args in work], partial(cpu.carafe, *work[0][1])
    )


def test_memory_that_cannot_be_had_is_an_error():
    value = torch.ones(1)
    for operator in OPERATORS:
        for channels_last in (False, True):
            with pytest.raises(MemoryError):
                # Scratch memory for a kernel of this size is more than there are addresses. Nothing is read before.
                getattr(_C, operator)(*(value.data_ptr(),) * 3, _C.Dtype.float32, channels_last, 1, 1, 1, 1,
                                      3_000_001, 1, 1, 1, 4)  # fmt: skip


def test_an_exception_in_another_thread_is_the_callers():
    # Each of four threads has a tile of its own and no memory for it. An exception that left its thread would end the
    # process, hence another one.
    run = subprocess.run([sys.executable, "-c", f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
for operator in {OPERATORS}:
    for channels_last in (False, True):
        try:
            getattr(_C, operator)(64, 64, 64, _C.Dtype.float32, channels_last, 4, 1, 1, 1, 3_000_001, 1, 1, 1, 4)
        except MemoryError:
            print(operator)
"""], capture_output=True, text=True, timeout=60)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [operator for operator in OPERATORS for _ in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is set as Linux has it")
def test_without_further_threads_this_one_does_all_the_work():
    import resource

    def stacks_of_8_mebibytes():
        resource.setrlimit(resource.RLIMIT_STACK, (2**23, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    run = subprocess.run([sys.executable, "-c", f"""
import importlib.util, resource, threading
from pathlib import Path
import numpy as np
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
features, masks = np.random.rand(8, 64, 40, 40), np.random.rand(8, 9, 80, 80)
expected, result = np.empty((8, 64, 80, 80)), np.empty((8, 64, 80, 80))

def call(out, threads):
    addresses = (array.ctypes.data for array in (features, masks, out))
    _C.carafe(*addresses, _C.Dtype.float64, False, *features.shape, 3, 1, 2, 1, threads)

call(expected, 1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, resource.RLIM_INFINITY))  # no room for the stack of a thread
try:
    threading.Thread(target=print).start()
except RuntimeError:
    print("no thread")
call(result, 4)
assert np.array_equal(result, expected)
"""], capture_output=True, text=True, timeout=60, preexec_fn=stacks_of_8_mebibytes)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "no thread"


def enough_memory(gibibytes):
    """Whether the system has that much to spare, as far as it says."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= gibibytes * 2**30
    except (AttributeError, ValueError, OSError):
        return False


def untouched(shape):
    """A float16 tensor of zeros that takes address space, but memory only where it is written."""
    return torch.from_numpy(np.zeros(shape, dtype=np.float16))


@pytest.mark.parametrize("channels_last", [False, True])
def test_features_beyond_two_to_the_31(channels_last):
    height, width, stride = 65536, 32769 + 1024, 4096
    features = untouched((1, height, width, 1) if channels_last else (1, 1, height, width))
    features = features.permute(0, 3, 1, 2) if channels_last else features
    assert features.numel() > 2**31
    features[0, 0, ::stride, ::stride] = torch.arange(1, 16 * 9 + 1).reshape(16, 9)
    masks = torch.full((1, 1, 16, 9), 2.0, dtype=torch.float16)
    out = cpu.carafe(features, masks, 1, 1, 1, stride)
    assert torch.equal(out, 2 * features[:, :, ::stride, ::stride])


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_masks_beyond_two_to_the_31(channels_last):
    k, side, pad = 15, 3090, 7
    masks = untouched((1, side, side, k * k) if channels_last else (1, k * k, side, side))
    masks = masks.permute(0, 3, 1, 2) if channels_last else masks
    assert masks.numel() > 2**31
    # The last tap, which lies below and to the right of its centre, on the last rows that have such a pixel.
    rows = slice(side - pad - 3, side - pad)
    masks[0, -1, rows] = 2
    features = torch.arange(2 * side * side).remainder(101).to(torch.float16).view(1, 2, side, side)
    features = features.contiguous(memory_format=FORMATS[channels_last])  # of two channels, that it be one of them
    shifted = torch.zeros_like(features)
    shifted[:, :, rows, : side - pad] = 2 * features[:, :, side - 3 :, pad:]
    assert torch.equal(cpu.carafe(features, masks, k, 1, 1, 1), shifted)
    shifted.zero_()
    shifted[:, :, side - 3 :, pad:] = 2 * features[:, :, rows, : side - pad]
    assert torch.equal(cpu.carafe_backward_features(features, masks, side, side, k, 1, 1, 1), shifted)


@pytest.mark.slow  # 4 GiB are written
@pytest.mark.skipif(not enough_memory(12), reason="needs 12 GiB of free memory, for a result is written")
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_of_features_beyond_two_to_the_31(channels_last):
    side, stride = 5793, 1024
    grad = torch.arange(1, 64 * 6 * 6 + 1).to(torch.float16).view(1, 64, 6, 6)
    grad = grad.contiguous(memory_format=FORMATS[channels_last])
    masks = torch.full((1, 1, 6, 6), 2.0, dtype=torch.float16)
    out = cpu.carafe_backward_features(grad, masks, side, side, 1, 1, 1, stride)
    assert out.numel() > 2**31
    assert out.is_contiguous(memory_format=FORMATS[channels_last])
    assert torch.equal(out[:, :, ::stride, ::stride], 2 * grad)
    assert out.count_nonzero() == grad.numel()


@pytest.mark.slow
def test_channels_beyond_two_to_the_31():
    channels = 2**16 + 1
    grad, features = untouched((1, channels, 256, 128)), untouched((1, channels, 256, 128))
    assert grad.numel() > 2**31
    grad[0, -1], features[0, -1] = 2, torch.arange(256)[:, None]
    out = cpu.carafe_backward_masks(grad, features, 1, 1, 1, 1)
    assert torch.equal(out[0, 0], 2 * features[0, -1])


def test_the_module_knows_nothing_of_torch():
    sources = Path(__file__).parents[2] / "csrc"
    included = re.findall(r'#include [<"](.+)[>"]', "".join(path.read_text() for path in sorted(sources.iterdir())))
    assert "nanobind/nanobind.h" in included
    assert not [header for header in included if re.match(r"(torch|ATen|c10|caffe2|pybind11)\b", header)]
    module = Path(_C.__file__).read_bytes()
    assert not [name for name in (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10", b"_ZN5torch") if name in module]


if __name__ == "__main__":
    check_every_kernel()
    print(_C.instruction_set())
