"""Launches of Triton kernels: the first by Triton, later ones of the kernel that it compiled, to the same effect.

Without a GPU the interpreter runs kernels; pretended_gpu.py has Triton itself compile them.
"""

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from omniops.backends.cuda._launch import Launch, on_device  # noqa: E402

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def scale(x, out, length, step, first, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (offsets < length) & (offsets % step == 0)
    tl.store(out + offsets, tl.load(x + offsets, mask=inside, other=0) * FACTOR + first, mask=inside)


def launch_of(kernel, length, step=1, first=0, factor=3):
    return Launch(kernel, (-(-length // 16),), length, step, first, FACTOR=factor, BLOCK=16, num_warps=1)


def run(launch, x):
    out = torch.zeros_like(x)
    with on_device(x) as stream:
        launch(stream, x, out)
    return out


def test_launches_compute_each_time():
    x = torch.arange(40.0, device=DEVICE)
    launch = launch_of(scale, 40, step=2, first=5)
    for factor in (1, 2, 3):
        expected = torch.where(torch.arange(40, device=DEVICE) % 2 == 0, 3 * factor * x + 5, 0)
        assert torch.equal(run(launch, factor * x), expected)


def test_what_was_forgotten_is_an_error_before_anything_runs():
    out = torch.zeros(16, device=DEVICE)
    launch = Launch(scale, (1,), 16, 1, 0, BLOCK=16)
    for _ in range(2):
        with pytest.raises(KeyError, match="FACTOR"):
            launch(0, torch.ones(16, device=DEVICE), out)
    assert not out.any()


def test_a_launch_holds_no_tensor():
    x = torch.ones(16, device=DEVICE)
    launch = launch_of(scale, 16)
    out = run(launch, x)
    run(launch, x)
    died = weakref.ref(x), weakref.ref(out)
    del x, out
    gc.collect()
    assert [ref() for ref in died] == [None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without a GPU")
def test_later_launches_hand_over_what_tritons_own_do(tmp_path):
    """In a process of its own, as the interpreter changes Triton's language for good where it has run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("pretended_gpu.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120,
                         env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})  # fmt: skip
    assert run.returncode == 0, run.stderr


class Kernel:
    """A stand-in whose compilation takes until all threads are there."""

    arg_names = ("x", "number", "CONSTANT")

    def __init__(self, threads=1):
        self.compiled = 0
        self.launched = []
        self.waiting = threading.Barrier(threads)

    def __getitem__(self, grid):
        def compile_and_launch(x, number, **constants):
            self.waiting.wait(30)
            self.compiled += 1
            self.launched.append((grid, x.data_ptr(), number, constants["CONSTANT"]))
            return self.Compiled(self)

        return compile_and_launch

    class Compiled:
        function, packed_metadata = 1000, None

        def __init__(self, kernel):
            self.kernel = kernel

        def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            self.kernel.launched.append(((x, y, z), *args))


def test_first_launches_of_several_threads():
    kernel = Kernel(threads=4)
    launch = Launch(kernel, (5, 2), 1, CONSTANT=9, num_warps=4)
    x = torch.zeros(3)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [launch(0, x) for _ in range(3)], range(4)))
    assert kernel.compiled == 4
    assert kernel.launched == [((5, 2, 1), x.data_ptr(), 1, 9)] * 12


def test_a_compilation_that_fails_is_tried_again():
    kernel = Kernel()
    launch = Launch(kernel, (1,), 1, CONSTANT=9)
    kernel.waiting.abort()
    for _ in range(2):
        with pytest.raises(threading.BrokenBarrierError):
            launch(0, torch.zeros(3))
    kernel.waiting.reset()
    for _ in range(2):
        launch(0, torch.zeros(3))
    assert (kernel.compiled, len(kernel.launched)) == (1, 2)


@NEEDS_A_GPU
def test_the_stream_is_the_current_one_and_the_device_the_tensors():
    x = torch.ones(16, device="cuda")
    other = torch.cuda.Stream()
    with on_device(x) as stream:
        assert stream == torch.cuda.current_stream().cuda_stream
    with torch.cuda.stream(other), on_device(x) as stream:
        assert stream == other.cuda_stream
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs for the rest")
    with on_device(x.to("cuda:1")) as stream:
        assert torch.cuda.current_device() == 1
        assert stream == torch.cuda.current_stream(1).cuda_stream
    assert torch.cuda.current_device() == 0


@NEEDS_A_GPU
def test_a_device_is_current_again_after_an_error():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(ValueError, match="within"), on_device(torch.ones(1, device="cuda:1")):
        raise ValueError("within")
    assert torch.cuda.current_device() == 0
