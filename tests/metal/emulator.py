"""Runs Metal kernels on CPU tensors, as ``torch.mps.compile_shader`` does on an Apple GPU, and checks what they do.

``compile_shader(source)`` compiles the Metal text with clang and returns a library with one callable per kernel; see
README.md for what is checked. Tests run launch code by ``launched(function, ...)``, which finds results that nothing
wrote; ``step_budget(n)`` and ``launches()`` are about the work of one thread.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metalsim import parser, toolchain
from metalsim.arguments import Dispatch, Inline
from metalsim.compiler import compile_library
from metalsim.language import CompileError
from metalsim.library import Kernel, Library, parameters
from metalsim.unwritten import assert_written, launched, poisoned, written
from torch import Tensor

__all__ = [
    "CompileError",
    "KernelError",
    "Launch",
    "assert_written",
    "compile_shader",
    "launched",
    "launches",
    "newest_values",
    "poisoned",
    "step_budget",
]

HERE = Path(__file__).parent / "metalsim"
_launch_lock = threading.Lock()
# Every launch has an order of threads of its own, and every test the same sequence of them (conftest.py).
FIRST_SEED = int(os.environ.get("METAL_EMULATOR_SEED", "0"))
_seeds = itertools.count(FIRST_SEED)
_most_steps = 2**22
_newest_only = False
_records: list[list[Launch]] = []


class KernelError(RuntimeError):
    """What a kernel did wrong, with its line, its thread and the argument."""


@dataclass(frozen=True)
class Launch:
    """A kernel that ran, and the position in the grid of the thread that took the most steps."""

    kernel: str
    worst_thread: tuple[int, int, int]
    worst_steps: int
    """Basic blocks that it entered, loops in the first place. Those of Metal's own functions do not count."""


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches while this is open, those that failed too."""
    record: list[Launch] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


@contextmanager
def step_budget(steps: int) -> Iterator[None]:
    """While this is open, a thread that takes more steps, as ``Launch`` counts them, is a KernelError."""
    global _most_steps
    before, _most_steps = _most_steps, steps
    try:
        yield
    finally:
        _most_steps = before


@contextmanager
def newest_values() -> Iterator[None]:
    """While this is open, atomics are as no GPU promises: a load never gives an older value, and a weak
    compare-exchange fails only where the values differ."""
    global _newest_only
    before, _newest_only = _newest_only, True
    try:
        yield
    finally:
        _newest_only = before


def compile_shader(source: str, fast_math: bool = False) -> Library:
    """Compile Metal source, as ``torch.mps.compile_shader``. Raises CompileError.

    With ``fast_math`` as PyTorch does where PYTORCH_MPS_FAST_MATH is set: the compiler may assume that there is neither
    NaN nor infinity, and functions are less exact. What kernels read and write has to be right even so, results not.
    """
    kernels, path = compile_library(source, fast_math)
    _runtime()  # what the kernels call
    library = ctypes.CDLL(str(path))
    return Library([_EmulatedKernel(library, i, kernel) for i, kernel in enumerate(kernels)])


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("storage", ctypes.c_uint64),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("touch", ctypes.c_void_p),
        ("written", ctypes.c_void_p),
        ("element", ctypes.c_uint32),
        ("same_as", ctypes.c_int32),
        ("space", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("names", ctypes.POINTER(ctypes.c_char_p)),
        ("buffer_count", ctypes.c_uint32),
        ("threads", ctypes.c_uint32 * 3),
        ("group_size", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("most_steps", ctypes.c_uint64),
        ("newest_only", ctypes.c_uint32),
        ("worst_thread", ctypes.c_uint32 * 3),
        ("worst_steps", ctypes.c_uint64),
    )


class _EmulatedKernel(Kernel):
    def __init__(self, library: ctypes.CDLL, index: int, kernel: parser.Kernel) -> None:
        buffers = [(parameter.name, parameter.constant) for parameter in kernel.buffers]
        listed = parameters(library, f"emulator_parameters_{index}", buffers)
        super().__init__(kernel.host_name, kernel.max_threads, listed)
        self._function = ctypes.cast(getattr(library, f"emulator_kernel_{index}"), ctypes.c_void_p)

    def run(self, grid: Dispatch, values: Sequence[Tensor | Inline]) -> None:
        """Run every thread of the grid. KernelError for what one does wrong."""
        buffers = (_Buffer * max(len(values), 1))()
        names = (ctypes.c_char_p * max(len(values), 1))()
        alive: list[Any] = []
        for i, (value, parameter) in enumerate(zip(values, self.parameters, strict=True)):
            names[i] = str(parameter).encode()
            buffers[i] = _inline_buffer(value, alive) if isinstance(value, Inline) else _tensor_buffer(value, alive)
            buffers[i].space = 2 if parameter.constant else 1
            buffers[i].writable = parameter.writable
            same = (j for j in range(i) if buffers[j].data == buffers[i].data and not isinstance(value, Inline))
            buffers[i].same_as = next(same, i)
            first = buffers[buffers[i].same_as]
            if first.element != buffers[i].element:
                raise ValueError(f"kernel {self.name}: two arguments share storage but not the size of elements")
        launch = _Launch(
            self.name.encode(),
            self._function,
            buffers,
            names,
            len(values),
            (ctypes.c_uint32 * 3)(*grid.threads),
            (ctypes.c_uint32 * 3)(*grid.group_size),
            next(_seeds),
            _most_steps,
            _newest_only,
        )
        with _launch_lock:
            message = _runtime().emulator_launch(ctypes.byref(launch))
        x, y, z = launch.worst_thread
        for record in _records:
            record.append(Launch(self.name, (x, y, z), launch.worst_steps))
        if message:
            raise KernelError(message.decode())


def _inline_buffer(value: Inline, alive: list[Any]) -> _Buffer:
    data = ctypes.create_string_buffer(value.data, len(value.data))
    alive.append(data)
    return _Buffer(data=ctypes.addressof(data), storage=len(value.data), begin=0, end=len(value.data), element=1)


def _tensor_buffer(tensor: Tensor, alive: list[Any]) -> _Buffer:
    if tensor.device.type != "cpu":
        raise TypeError(f"the emulator runs on CPU tensors, got one on {tensor.device}")
    storage = tensor.untyped_storage()
    size = tensor.element_size()
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    extent = extent if tensor.numel() else 0
    touch = None
    if extent != tensor.numel():  # not dense: mark the elements of the view
        touch = np.zeros(extent, np.uint8)
        torch.from_numpy(touch).as_strided(tensor.shape, tensor.stride()).fill_(1)
        alive.append(touch)
    known = written(tensor)
    alive.append(known)
    begin = tensor.storage_offset() * size
    return _Buffer(
        data=storage.data_ptr(),
        storage=storage.nbytes(),
        begin=begin,
        end=begin + extent * size,
        touch=None if touch is None else touch.ctypes.data,
        written=None if known is None else known.ctypes.data,
        element=size,
    )


@cache
def _runtime() -> ctypes.CDLL:
    library = _runtime_library()
    library.emulator_launch.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = (ctypes.POINTER(_Launch),)
    return library


def _runtime_library() -> ctypes.CDLL:
    folder = HERE / "runtime"
    flags = ("-std=c++17", "-O2", "-g0", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-fPIC", "-c")

    def build(path: Path) -> None:
        objects = []
        for source in sorted(folder.glob("*.cpp")):
            objects.append(path.parent / f"{source.stem}.o")
            compiler = (*toolchain.ZIG, "c++", "-target", toolchain.target())
            toolchain.run((*compiler, *flags, str(source), "-o", str(objects[-1])))
        toolchain.link(objects, path)

    path = toolchain.cached("runtime.so", [folder, *flags, toolchain.target(), toolchain.clang_version()], build)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
