"""Declares an operator to PyTorch's dispatcher, which is the only registry: who serves a tensor is for it to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops.backends import BACKENDS, empty

_LIBRARY = torch.library.Library("omniops", "DEF")

# Every device type whose autocast PyTorch dispatches on.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "ipu", "xla", "maia", "privateuseone")


class Result(NamedTuple):
    """What one result of an operator is like: device and memory format are those of ``like``, and the dtype too."""

    shape: Sequence[int]
    like: Tensor
    dtype: torch.dtype | None = None
    """Where it is not that of ``like``."""


def define(schema: str, *, file: str, results: Callable[..., Sequence[Result]]) -> Any:
    """Define ``omniops::<schema>`` with its kernels, fake kernel and autocast, and return the operator.

    Args:
        schema: the operator's schema; arguments have no defaults.
        file: the file of that name in each backend holds the kernel, a function named as the operator is.
        results: called with the operator's arguments before any kernel; raises for wrong ones and says what the
            results will be.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    operator = getattr(torch.ops.omniops, name).default
    for backend in BACKENDS:
        if backend.AVAILABLE:
            _LIBRARY.impl(name, _kernel(backend, file, name, results), backend.DISPATCH_KEY)

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        return _one_or_all(empty(*result) for result in results(*args))

    torch.library.register_fake(f"omniops::{name}", fake, lib=_LIBRARY)
    for device_type in _AUTOCAST_DEVICES:
        key = "AutocastPrivateUse1" if device_type == "privateuseone" else f"Autocast{device_type.upper()}"
        if hasattr(torch._C.DispatchKey, key):
            _LIBRARY.impl(name, _autocast(operator, device_type), key)
    return operator


def _kernel(
    backend: ModuleType, file: str, name: str, results: Callable[..., Sequence[Result]]
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The operator on one backend: checked, empty inputs answered, the kernel's file imported when first called."""
    kernel: Callable[..., Tensor | tuple[Tensor, ...]] | None = None

    def checked(*args: Any) -> Tensor | tuple[Tensor, ...]:
        nonlocal kernel
        described = results(*args)
        if 0 in described[0].shape or any(isinstance(arg, Tensor) and arg.numel() == 0 for arg in args):
            return _one_or_all(empty(*result).zero_() for result in described)
        if kernel is None:
            kernel = getattr(import_module(f"{backend.__name__}.{file}"), name)
        return kernel(*args)

    return checked


def _one_or_all(tensors: Iterable[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """As PyTorch wants what a kernel returns: a tensor alone, or a tuple of several."""
    made = tuple(tensors)
    return made[0] if len(made) == 1 else made


def _autocast(operator: Any, device_type: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Cast floating inputs to the autocast dtype as PyTorch's own operators do: float64 stays as it is."""

    def cast(*args: Any) -> Tensor | tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype(device_type)
        cast_args = (
            arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 else arg
            for arg in args
        )
        with torch.autocast(device_type, enabled=False):
            result: Tensor | tuple[Tensor, ...] = operator(*cast_args)
        return result

    return cast
