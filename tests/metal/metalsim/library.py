"""A library of kernels as ``torch.mps.compile_shader`` returns one; the emulator and the CUDA shim run the launches."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from torch import Tensor

from metalsim.arguments import BufferType, Dispatch, Inline, bind, dispatch


class Library:
    """The kernels of one source, as attributes by their host names."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self._kernels = {kernel.name: kernel for kernel in kernels}

    def __getattr__(self, name: str) -> Kernel:
        kernels = self.__dict__.get("_kernels", {})
        if name not in kernels:
            raise AttributeError(f"no kernel {name!r}; the source has {', '.join(kernels)}")
        return kernels[name]

    def __dir__(self) -> list[str]:
        return list(self._kernels)


class _Parameter(ctypes.Structure):
    _fields_ = (
        ("element", ctypes.c_char),
        ("writable", ctypes.c_bool),
        ("reference", ctypes.c_bool),
        ("size", ctypes.c_uint32),
    )


class Kernel:
    """One kernel; calling it runs every thread of the grid."""

    def __init__(self, name: str, max_threads: int | None, parameters: Sequence[BufferType]) -> None:
        self.name = name
        self.max_threads = max_threads
        self.parameters = parameters

    def __call__(
        self,
        *args: object,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | Mapping[int, str] | None = None,
    ) -> None:
        """Launch the kernel. TypeError or ValueError for wrong arguments, RuntimeError for what goes wrong then."""
        grid = dispatch(self.name, args, threads, group_size, self.max_threads)
        self.run(grid, bind(self.name, args, arg_casts, self.parameters))

    def run(self, grid: Dispatch, values: Sequence[Tensor | Inline]) -> None:
        """Launch the kernel with checked arguments."""
        raise NotImplementedError


def parameters(library: ctypes.CDLL, symbol: str, buffers: Sequence[tuple[str, bool]]) -> list[BufferType]:
    """The buffer parameters that a compiled library lists under ``symbol``, given (name, whether constant) of each."""
    listed = (_Parameter * max(len(buffers), 1)).in_dll(library, symbol)
    return [
        BufferType(name, c.element.decode(), constant, c.writable, c.reference, c.size)
        for (name, constant), c in zip(buffers, listed, strict=False)
    ]
