"""Launches of Triton kernels that cost the host little: the compiled kernel of the first one is kept for the others."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Where Triton has the hooks that are called around launches, which its profiler sets: Triton 3.3 has no knobs.
_HOOKS: Any = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel


class Launch:
    """A kernel with all that a launch of it needs but the tensors, which are the kernel's first parameters.

    It is for tensors of equal dtypes, alignment to 16 bytes and device alone: the first call has Triton find or compile
    the kernel for these, later ones launch what it found. (``kernel[grid](...)`` looks at every argument each time, and
    ``compiled[grid](...)`` prepares for hooks that are seldom set: both take longer than the launch.)
    """

    __slots__ = ("_constants", "_grid", "_kept", "_kernel", "_numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: int, **constants: Any) -> None:
        """``constants`` are the kernel's constexpr parameters, and Triton's options."""
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = numbers
        self._constants = constants
        self._kept: tuple[Any, Any, Any, tuple[Any, ...]] | None = None

    def __call__(self, stream: int, *tensors: Tensor) -> None:
        kept = self._kept
        if kept is None:
            self._first(tensors)
        else:
            compiled, function, metadata, others = kept
            addresses = [tensor.data_ptr() for tensor in tensors]
            if _is_set(_HOOKS.launch_enter_hook) or _is_set(_HOOKS.launch_exit_hook):
                compiled[self._grid](*addresses, *others, stream=stream)
            else:
                compiled.run(*self._grid, stream, function, metadata, None, None, None, *addresses, *others)

    def _first(self, tensors: tuple[Tensor, ...]) -> None:
        names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
        # The compiled kernel knows no defaults.
        others = *self._numbers, *(self._constants[name] for name in names)
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if compiled is not None:  # None from Triton's interpreter
            # In one step, as another thread may be here too.
            self._kept = compiled, compiled.function, compiled.packed_metadata, others


def _is_set(hook: Any) -> bool:
    """Whether there is a hook: from Triton 3.4 on there is always a chain of them, which may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


class on_device:  # noqa: N801  # a context manager
    """The current stream of a tensor's device, which is made the current device where another one is.

    Example:
        >>> with on_device(features) as stream:  # doctest: +SKIP
        ...     launch(stream, features, masks, out)
    """

    __slots__ = ("_guard", "_index")

    def __init__(self, tensor: Tensor) -> None:
        self._index = tensor.get_device()
        self._guard: torch.cuda.device | None = None

    def __enter__(self) -> int:
        if self._index < 0:  # Triton's interpreter
            return 0
        if self._index != torch.cuda.current_device():
            self._guard = torch.cuda.device(self._index)
            self._guard.__enter__()
        stream: int = triton.runtime.driver.active.get_current_stream(self._index)
        return stream

    def __exit__(self, *exception: Any) -> None:
        if self._guard is not None:
            self._guard.__exit__(*exception)
