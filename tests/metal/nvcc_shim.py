"""Runs the same Metal sources on an NVIDIA GPU: ``compile_shader`` once more, through nvcc.

The launch code that ships then works on CUDA tensors, on PyTorch's current stream. Everything that a launch needs
travels in the kernel's parameters, so launches can be timed and captured in CUDA graphs. The libraries are kept under
build/, and where one is there already, no compiler is needed.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from metalsim import parser, preprocess, toolchain
from metalsim.arguments import Dispatch, Inline
from metalsim.library import Kernel, Library, parameters
from torch import Tensor

HERE = Path(__file__).parent / "metalsim"
ARCHITECTURE = os.environ.get("METAL_CUDA_ARCHITECTURE", "sm_90")
_FLAGS = (
    f"-arch={ARCHITECTURE}",
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-shared",
    "-Xcompiler",
    "-fPIC",
    *(("-DMETAL_STORES_FOR_RACECHECK",) if "METAL_STORES_FOR_RACECHECK" in os.environ else ()),
)
_MAX_INLINE_BYTES = 2048
_MAX_BUFFERS = 31


class _Launch(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_uint32 * 3),
        ("buffers", ctypes.c_uint64 * _MAX_BUFFERS),
        ("padding", ctypes.c_uint64),
        ("bytes", ctypes.c_uint8 * _MAX_INLINE_BYTES),
    )


def compile_shader(source: str, registers: int = 128) -> CudaLibrary:
    """Compile Metal source for the GPU, as ``torch.mps.compile_shader``. Raises CompileError.

    With 128 registers a thread at most, 512 threads find room on a multiprocessor, as they do on an Apple GPU's core.
    """
    return CudaLibrary(ctypes.CDLL(str(_compile(source, registers))))


class CudaLibrary(Library):
    """The kernels of one source, and the version of the nvcc that compiled them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        described = json.loads(ctypes.cast(library.shim_kernels, ctypes.POINTER(ctypes.c_char_p))[0])
        super().__init__([_CudaKernel(library, i, *kernel) for i, kernel in enumerate(described)])
        self.nvcc = ".".join(map(str, (ctypes.c_int * 3).in_dll(library, "shim_nvcc")))


class _CudaKernel(Kernel):
    def __init__(
        self, library: ctypes.CDLL, index: int, name: str, max_threads: int, buffers: list[tuple[str, bool]]
    ) -> None:
        super().__init__(name, max_threads, parameters(library, f"shim_parameters_{index}", buffers))
        self._offsets = _constant_offsets([constant for _, constant in buffers])
        self._launch = getattr(library, f"shim_launch_{index}")
        self._launch.argtypes = (ctypes.POINTER(_Launch), *(ctypes.POINTER(ctypes.c_uint32),) * 2, ctypes.c_void_p)
        self._launch.restype = ctypes.c_char_p

    def run(self, grid: Dispatch, values: Sequence[Tensor | Inline]) -> None:
        """Launch the kernel on PyTorch's current stream. RuntimeError when CUDA refuses the launch."""
        launch = _Launch((ctypes.c_uint32 * 3)(*grid.threads))
        for i, value in enumerate(values):
            if isinstance(value, Inline):
                offset = self._offsets.get(i)
                limit = _MAX_INLINE_BYTES // max(1, len(self._offsets))
                if offset is None or len(value.data) > limit:
                    raise ValueError(
                        f"kernel {self.name}, argument {i}: the shim takes Python values of up to {limit} bytes, "
                        "for constant arguments"
                    )
                ctypes.memmove(ctypes.addressof(launch.bytes) + offset, value.data, len(value.data))
            elif i in self._offsets:
                raise TypeError(f"kernel {self.name}, argument {i}: the shim takes no tensor for a constant argument")
            elif value.device.type != "cuda":
                raise TypeError(f"kernel {self.name}, argument {i}: the shim runs on CUDA tensors, got {value.device}")
            else:
                launch.buffers[i] = value.data_ptr()
        groups = [-(-n // size) for n, size in zip(grid.threads, grid.group_size, strict=True)]
        if max(groups[1:]) > 65535:
            raise ValueError(
                f"kernel {self.name}: CUDA has at most 65535 groups on the second and third axis: {groups}"
            )
        error = self._launch(
            ctypes.byref(launch),
            (ctypes.c_uint32 * 3)(*groups),
            (ctypes.c_uint32 * 3)(*grid.group_size),
            torch.cuda.current_stream().cuda_stream,
        )
        if error:
            raise RuntimeError(f"kernel {self.name}: {error.decode()}")


def _constant_offsets(constants: Sequence[bool]) -> dict[int, int]:
    """Where the constant ones among a kernel's buffers lie in the launch: the compiler knows it, as Metal's does."""
    indices = [i for i, constant in enumerate(constants) if constant]
    return {i: n * (_MAX_INLINE_BYTES // len(indices) // 16 * 16) for n, i in enumerate(indices)}


def _compile(source: str, registers: int) -> Path:
    flags = (*_FLAGS, f"-maxrregcount={registers}")
    inputs = [source, *flags, HERE / "include", *HERE.glob("*.py"), Path(__file__)]
    return toolchain.cached("shim.so", inputs, lambda path: _build(source, path, flags))


def _build(source: str, path: Path, flags: Sequence[str]) -> None:
    plain = path.with_suffix(".cpp")

    def run_preprocessor(text: str) -> str:
        plain.write_text(text)
        command = ("nvcc", "-E", "-x", "c++", "-std=c++14", *preprocess.DEFINITIONS, str(plain))
        return toolchain.run(command).stdout

    shader = parser.parse(preprocess.preprocess(source, run_preprocessor))
    unit = path.with_suffix(".cu")
    unit.write_text(_translation_unit(shader))
    include = str(HERE / "include" / "cuda")
    toolchain.run(("nvcc", *flags, "-I", include, str(unit), "-o", str(path)))


def _translation_unit(shader: parser.Shader) -> str:
    def declare(variable: parser.ThreadgroupVariable) -> str:
        return f"__shared__ {variable.type} {variable.name}{variable.dimensions};"

    spaces = {"device": "", "constant": "const", "threadgroup": "", "thread": ""}
    body = shader.render(declare, function="__device__ ", instantiations=False, words=spaces)
    lines = ["#include <metal_stdlib>\nnamespace metal {\n", body]
    for i, kernel in enumerate(shader.kernels):
        function = kernel.function
        kind = f"shim_function_{i}"
        lines.append(f"using {kind} = metal::host::Kernel<decltype(&{function})>;\n")
        rows = [f"{kind}::BufferAt<{kernel.parameters.index(p)}>::parameter" for p in kernel.buffers]
        lines.append(
            f'extern "C" const metal::host::Parameter shim_parameters_{i}[] = {{{", ".join(rows) or "{}"}}};\n'
        )
        offsets = _constant_offsets([p.constant for p in kernel.buffers])
        addresses = [
            f"launch.bytes + {offsets[b]}" if b in offsets else f"metal::host::device_address(launch, {b})"
            for b in range(len(kernel.buffers))
        ]
        arguments = [
            f"{kind}::BufferAt<{n}>::from({addresses[p.buffer]})"
            if p.buffer is not None
            else f"{kind}::BuiltinAt<{n}>::from(position.{p.builtin})"
            for n, p in enumerate(kernel.parameters)
        ]
        lines.append(
            f'extern "C" __global__ void {kernel.host_name}(const __grid_constant__ metal::host::Launch launch) {{\n'
            "  metal::host::Position position;\n"
            "  if (!position.begin(launch)) return;\n"
            f"  {function}({', '.join(arguments)});\n}}\n"
            f'extern "C" const char* shim_launch_{i}(const metal::host::Launch* launch, const unsigned* groups, '
            "const unsigned* size, cudaStream_t stream) {\n"
            "  const dim3 grid(groups[0], groups[1], groups[2]), block(size[0], size[1], size[2]);\n"
            f"  {kernel.host_name}<<<grid, block, 0, stream>>>"
            "(*launch);\n"
            "  const cudaError_t error = cudaGetLastError();\n"
            "  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);\n}\n"
        )
    described = [[k.host_name, k.max_threads, [[p.name, p.constant] for p in k.buffers]] for k in shader.kernels]
    lines.append(
        'extern "C" const int shim_nvcc[] = {__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__};\n'
    )
    lines.append(f'extern "C" const char* const shim_kernels = R"json({json.dumps(described)})json";\n')
    # The arguments of the kernels' templates too may be names of the source, so its namespace is closed here only.
    lines.append("}  // namespace metal\n")
    return "".join(lines)
