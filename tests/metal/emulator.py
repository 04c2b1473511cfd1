"""Runs Metal kernels on CPU tensors, as ``torch.mps.compile_shader`` does on an Apple GPU, and checks what they do.

``compile_shader(source)`` compiles the Metal text with clang and returns a library with one callable per kernel; see
README.md for what is checked. ``poisoned()`` marks what ``torch.empty`` returns as written by nobody.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from metalsim import parser, toolchain
from metalsim.arguments import Dispatch, Inline
from metalsim.instrument import instrument
from metalsim.library import Kernel, Library, parameters
from metalsim.parser import CompileError
from metalsim.preprocess import preprocess
from torch import Tensor

__all__ = ["CompileError", "KernelError", "assert_written", "compile_shader", "poisoned"]

HERE = Path(__file__).parent / "metalsim"
_launch_lock = threading.Lock()
# Every launch has an order of threads of its own; the sequence is the same in every run.
_seeds = itertools.count(int(os.environ.get("METAL_EMULATOR_SEED", "0")))


class KernelError(RuntimeError):
    """What a kernel did wrong, with its line, its thread and the argument."""


def compile_shader(source: str) -> Library:
    """Compile Metal source, as ``torch.mps.compile_shader``. Raises CompileError."""
    kernels, path = _compile(source)
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
        )
        with _launch_lock:
            message = _runtime().emulator_launch(ctypes.byref(launch))
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
    written = _written(tensor)
    alive.append(written)
    begin = tensor.storage_offset() * size
    return _Buffer(
        data=storage.data_ptr(),
        storage=storage.nbytes(),
        begin=begin,
        end=begin + extent * size,
        touch=None if touch is None else touch.ctypes.data,
        written=None if written is None else written.ctypes.data,
        element=size,
    )


# What nobody has written yet. A tensor from torch.empty inside ``poisoned()`` is filled with a pattern that no result
# has (a NaN with a payload, for floats). An element counts as written once a kernel has written it, or once it no
# longer holds the pattern, since PyTorch's own operators write too.

_PATTERNS = {1: 0xA5, 2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}


class _Unwritten:
    def __init__(self, tensor: Tensor) -> None:
        self.size = tensor.element_size()
        self.bits(tensor)[...] = _PATTERNS[self.size]
        self.written = np.zeros(self.bits(tensor).size, np.uint8)

    def bits(self, tensor: Tensor) -> np.ndarray:
        storage = tensor.untyped_storage()
        data = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        return np.frombuffer(data, f"u{self.size}", storage.nbytes() // self.size)

    def update(self, tensor: Tensor) -> np.ndarray:
        self.written |= self.bits(tensor) != _PATTERNS[self.size]
        return self.written


_registry: dict[int, _Unwritten] = {}


def _poison(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu" and tensor.numel() and tensor.layout == torch.strided:
        pointer = tensor.untyped_storage().data_ptr()
        _registry[pointer] = _Unwritten(tensor)
    return tensor


def _written(tensor: Tensor) -> np.ndarray | None:
    """Which elements of the tensor's storage have been written, or None if nothing is known of it."""
    unwritten = _registry.get(tensor.untyped_storage().data_ptr())
    return None if unwritten is None or unwritten.size != tensor.element_size() else unwritten.update(tensor)


@contextmanager
def poisoned() -> Iterator[None]:
    """While this is open, ``torch.empty`` and its kind return tensors that nobody has written, and kernels that read
    them fail. Memory of the tensors is not reused until it closes."""
    kept: list[Tensor] = []

    def patched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = _poison(function(*args, **kwargs))
            kept.append(tensor)
            return tensor

        return empty

    with ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, patched(getattr(owner, name))))
        try:
            yield
        finally:
            for tensor in kept:
                _registry.pop(tensor.untyped_storage().data_ptr(), None)


def assert_written(tensor: Tensor) -> None:
    """Fail if an element of a tensor made inside ``poisoned()`` has been written by nobody. Call it inside too."""
    written = _written(tensor)
    if written is None:
        raise AssertionError("the tensor was not made inside poisoned()")
    view = torch.from_numpy(written).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    if not bool(view.all()):
        missing = (view == 0).nonzero()
        raise AssertionError(f"nothing wrote {len(missing)} of {tensor.numel()} elements, first {missing[0].tolist()}")


# Compiling.

_CLANG = (*toolchain.ZIG, "clang")
_FLAGS = (
    "-std=c++14",
    "-nostdinc",
    "-nostdinc++",
    "-fsigned-char",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    "-ftrivial-auto-var-init=pattern",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-gline-tables-only",
    "-fsanitize=array-bounds,signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-Wimplicit-float-conversion",
    "-Wimplicit-int-float-conversion",
    "-Wno-duplicate-decl-specifier",
    "-Wno-c++17-extensions",
    "-Wno-unknown-attributes",
    "-Wno-user-defined-literals",
)


def _compile(source: str) -> tuple[list[parser.Kernel], Path]:
    shader = parser.parse(preprocess(source))
    if not shader.kernels:
        raise CompileError("the source has no kernel")
    text = _translation_unit(shader)
    include = HERE / "include"
    inputs = [
        text,
        *_FLAGS,
        toolchain.target(),
        toolchain.clang_version(),
        include / "emulator",
        *include.glob("*.h"),
        HERE / "instrument.py",
    ]
    return shader.kernels, toolchain.cached("kernels.so", inputs, lambda path: _build(text, path))


def _build(text: str, path: Path) -> None:
    source, plain, checked = path.with_suffix(".cpp"), path.with_suffix(".ll"), path.with_suffix(".checked.ll")
    source.write_text(text)
    machine = ("-target", toolchain.target())
    emit = ("-O1", "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-I", str(HERE / "include" / "emulator"))
    done = toolchain.run((*_CLANG, *machine, *_FLAGS, *emit, str(source), "-o", str(plain)))
    for line in done.stderr.splitlines():
        if "implicit conversion" in line and ("to 'bfloat'" in line or "(aka '__bf16')" in line.split(" to ")[-1]):
            raise CompileError(f"Metal has no implicit conversion to bfloat: {line}")
    checked.write_text(instrument(plain.read_text()))
    # Unoptimised: a kernel runs for a short time here and compiles for a long one.
    made = path.with_suffix(".o")
    toolchain.run((*_CLANG, *machine, "-O0", "-fPIC", "-w", "-c", str(checked), "-o", str(made)))
    toolchain.link([made], path)


def _translation_unit(shader: parser.Shader) -> str:
    def declare(variable: parser.ThreadgroupVariable) -> str:
        shape = f"{variable.type} {variable.dimensions}"
        return (
            f"threadgroup {variable.type} (&{variable.name}){variable.dimensions} = "
            f'metal::emulator::threadgroup_variable<{variable.site}, {shape}>("{variable.name}", __builtin_LINE());'
        )

    parts = ["#include <metal_stdlib>\n", shader.render(declare), "\n"]
    for i, kernel in enumerate(shader.kernels):
        function = f"emulator_function_{i}"
        parts.append(f"using {function} = metal::emulator::Kernel<decltype(&{kernel.function})>;\n")
        rows = [f"{function}::BufferAt<{kernel.parameters.index(p)}>::parameter" for p in kernel.buffers]
        parts.append(
            f'extern "C" const metal::host::Parameter emulator_parameters_{i}[] = {{{", ".join(rows) or "{}"}}};\n'
        )
        arguments = [
            f"{function}::BufferAt<{n}>::from(buffers[{p.buffer}])"
            if p.buffer is not None
            else f"{function}::builtin<{n}>(position->{p.builtin})"
            for n, p in enumerate(kernel.parameters)
        ]
        parts.append(
            f'extern "C" void emulator_kernel_{i}(const metal::emulator::Position* position, const ulong* buffers) '
            f"{{ {kernel.function}({', '.join(arguments)}); }}\n"
        )
    return "".join(parts)


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
