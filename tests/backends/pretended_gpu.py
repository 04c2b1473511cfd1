"""Kernels that Triton compiles for a GPU which a stand-in for its driver pretends: test_launch.py runs it."""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from omniops.backends.cuda._launch import Launch


@triton.jit
def scale(x, out, length, step, first, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (offsets < length) & (offsets % step == 0)
    tl.store(out + offsets, tl.load(x + offsets, mask=inside, other=0) * FACTOR + first, mask=inside)


def launch_of(length, first=0):
    return Launch(scale, (-(-length // 16),), length, 1, first, FACTOR=3, BLOCK=16, num_warps=1)


class Driver:
    """As much of a driver as Triton asks for while it compiles and launches; launches are recorded."""

    def __init__(self):
        self.launched = []
        self.loaded = 0
        self.stream = 7
        driver = self

        class Launcher:
            def __init__(self, src, metadata):
                self.signature = list(src.signature.values())

            def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *args):
                if enter is not None:
                    enter(launch_metadata)
                if leave is not None:
                    leave(launch_metadata)
                addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
                driver.launched.append(((x, y, z), stream, function, packed_metadata, tuple(addresses)))

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: {"max_shared_mem": 2**17, "multiprocessor_count": 1},
        )

    def load_binary(self, name, kernel, shared, device, *others):
        self.loaded += 1
        module, function, registers, spills, threads = object(), 1000 + self.loaded, 32, 0, 1024
        # Triton 3.3 asks for four.
        return (module, function, registers, spills, threads)[: 4 if triton.__version__ < "3.4" else 5]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def hand_over_the_same(driver):
    """To the launcher: addresses of tensors, then numbers, those that Triton makes constants among them."""
    memory = torch.zeros(64)
    x, out = memory[:32], memory[32:]
    launch = launch_of(32, first=16)
    launch(7, x, out)
    assert driver.launched[-1][4] == (x.data_ptr(), out.data_ptr(), 32, 1, 16, 3, 16)
    for _ in range(2):
        launch(7, x, out)
        assert driver.launched[-1] == driver.launched[0]
    launch(8, out, x)
    grid, stream, function, _, args = driver.launched[-1]
    assert (grid, stream, function) == ((2, 1, 1), 8, driver.launched[0][2])
    assert args == (out.data_ptr(), x.data_ptr(), 32, 1, 16, 3, 16)
    assert driver.loaded == 1


def have_a_kernel_for_each_kind_of_tensors(driver):
    """Triton compiles one for aligned tensors, one for others, one for another dtype."""
    memory = torch.zeros(65)
    functions = []
    for x in (memory[:32], memory[1:33], torch.zeros(32, dtype=torch.float16)):
        launch = launch_of(32, first=16)
        for _ in range(2):
            launch(7, x, x)
        functions.append({launch[2] for launch in driver.launched[-2:]})
    assert [len(launch) for launch in functions] == [1, 1, 1]
    assert len(set.union(*functions)) == 3


def call_the_hooks_of_profilers(driver):
    """A kept launch looks for them each time."""
    launch = launch_of(32, first=16)
    x = torch.zeros(32)
    launch(7, x, x)
    owner = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel
    called = []
    before = owner.launch_enter_hook
    owner.launch_enter_hook = lambda metadata: called.append((metadata.get()["name"], metadata.get()["stream"]))
    launch(9, x, x)
    owner.launch_enter_hook = before
    assert called == [("scale", 9)]
    launch(7, x, x)
    assert len(called) == 1
    for hook in (getattr(owner, f"launch_{end}_hook", None) for end in ("enter", "exit")):
        if hasattr(hook, "add"):  # a chain of hooks, from Triton 3.4 on
            hook.add(count := lambda metadata: called.append(metadata.get()["name"]))
            launch(9, x, x)
            hook.remove(count)
    assert called[1:] == (["scale"] * 2 if hasattr(triton, "knobs") else [])


if __name__ == "__main__":
    pretended = Driver()
    triton.runtime.driver.set_active(pretended)
    hand_over_the_same(pretended)
    have_a_kernel_for_each_kind_of_tensors(pretended)
    call_the_hooks_of_profilers(pretended)
