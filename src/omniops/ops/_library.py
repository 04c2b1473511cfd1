"""Declares an operator to PyTorch's dispatcher, which is the only registry: who serves a tensor is for it to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from omniops.backends import BACKENDS, empty

_LIBRARY = torch.library.Library("omniops", "DEF")

# The device types of autocast, and how the dispatcher calls it there.
AUTOCAST_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "mps": "AutocastMPS",
    "xpu": "AutocastXPU",
    "hpu": "AutocastHPU",
    "privateuseone": "AutocastPrivateUse1",
}


class Result(NamedTuple):
    """What one result of an operator is like: device and memory format are those of ``like``, and the dtype too."""

    shape: Sequence[int]
    like: Tensor
    dtype: torch.dtype | None = None
    """Where it is not that of ``like``."""


def define(schema: str, *, file: str, results: Callable[..., Sequence[Result]], autocast: bool = False) -> Any:
    """Define ``omniops::<schema>`` with its kernels and fake kernel, and return the operator.

    Args:
        schema: the operator's schema; arguments have no defaults.
        file: the file of that name in each backend holds the kernel, a function named as the operator is.
        results: called with the operator's arguments before any kernel; raises for wrong ones and says what the
            results will be.
        autocast: whether autocast casts the operator's arguments. It does not those of operators that compute
            gradients: a backward has the dtypes of its forward.
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
    for device_type, key in AUTOCAST_KEYS.items():
        _LIBRARY.impl(name, under_autocast(operator, device_type, autocast), key)
    return operator


def _kernel(
    backend: ModuleType, file: str, name: str, results: Callable[..., Sequence[Result]]
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The operator on one backend: checked, empty inputs answered, the kernel's file imported when first called."""
    kernel: Callable[..., Tensor | tuple[Tensor, ...]] | None = None

    def checked(*args: Any) -> Tensor | tuple[Tensor, ...]:
        nonlocal kernel
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"omniops::{name} has no forward-mode derivative, and PyTorch would take it for zero: "
                f"use reverse mode (torch.autograd.grad), or call it outside of forward-mode differentiation"
            )
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


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for the device of ``tensor``, where it has it."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def under_autocast(operator: Any, device_type: str, casts: bool) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The operator with autocast off, so that no kernel's own products are cast, and its arguments cast before.

    They are cast as PyTorch's own operators do, which leave float64 as it is.
    """

    def cast(*args: Any) -> Tensor | tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            result: Tensor | tuple[Tensor, ...] = operator(
                *(arg.to(dtype) if casts and _is_cast(arg) else arg for arg in args)
            )
        return result

    return cast


def _is_cast(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
