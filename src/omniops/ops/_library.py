"""Declares an operator to PyTorch's dispatcher, which is the only registry: who serves a tensor is for it to say."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops import _torch_private
from omniops.backends import BACKENDS, empty, prepared
from omniops.ops import _flops

_LIBRARY = torch.library.Library("omniops", "DEF")

MAX_KEPT = 1024
"""The kinds of calls that are kept for an operator on a backend; the oldest is forgotten for another one."""

# The device types of autocast, and how the dispatcher calls it there.
AUTOCAST_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "mps": "AutocastMPS",
    "xpu": "AutocastXPU",
    "hpu": "AutocastHPU",
    "privateuseone": "AutocastPrivateUse1",
}


Cast = Callable[..., "tuple[Any, ...]"]
"""What makes of autocast's dtype and an operator's arguments those that it is called with."""


class Result(NamedTuple):
    """What one result of an operator is like: device and memory format are those of ``like``, and the dtype too."""

    shape: Sequence[int]
    like: Tensor
    dtype: torch.dtype | None = None
    """Where it is not that of ``like``."""


def define(
    schema: str,
    *,
    file: str,
    results: Callable[..., Sequence[Result]],
    flops: Callable[..., int],
    autocast: Cast | bool = False,
) -> Any:
    """Define ``omniops::<schema>`` with its kernels and fake kernel, and return the operator.

    Args:
        schema: the operator's schema; arguments have no defaults.
        file: the file of that name in each backend holds the kernel, a function named as the operator is.
        results: called with the operator's arguments before any kernel; raises for wrong ones and says what the
            results will be.
        flops: called with the operator's arguments; says how many floating point operations torch.utils.flop_counter
            counts: as for PyTorch's convolutions two for each product that is summed, and no others.
        autocast: whether autocast casts the operator's arguments, or how. It does not those of operators that compute
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
    _flops.register(operator, flops)
    return operator


def _kernel(
    backend: ModuleType, file: str, name: str, results: Callable[..., Sequence[Result]]
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The operator on one backend: checked, empty inputs answered, the kernel's file imported when first called.

    What runs for a kind of call, as ``_kind`` tells them apart, is kept: its checks have passed, and a kernel in two
    steps has taken its first.
    """
    kept: dict[Any, Callable[..., Tensor | tuple[Tensor, ...]]] = {}
    lock = Lock()

    def run_checked(*args: Any) -> Tensor | tuple[Tensor, ...]:
        if _torch_private.in_forward_mode():
            raise NotImplementedError(
                f"omniops::{name} has no forward-mode derivative, and PyTorch would take it for zero: "
                f"use reverse mode (torch.autograd.grad), or call it outside of forward-mode differentiation"
            )
        kind = _kind(args)
        run = kept.get(kind)
        return prepare_and_run(kind, args) if run is None else run(*args)

    def prepare_and_run(kind: Any, args: tuple[Any, ...]) -> Tensor | tuple[Tensor, ...]:
        described = results(*args)
        if any(isinstance(arg, Tensor) and arg.numel() == 0 for arg in args):
            return _one_or_all(empty(*result).zero_() for result in described)
        kernel = getattr(import_module(f"{backend.__name__}.{file}"), name)
        run: Any = kernel.prepare(*args) if isinstance(kernel, prepared) else kernel
        if kind is not None:
            with lock:
                while len(kept) >= MAX_KEPT:
                    del kept[next(iter(kept))]
                kept[kind] = run
        result: Tensor | tuple[Tensor, ...] = run(*args)
        return result

    def forget() -> None:
        nonlocal lock
        lock = Lock()  # a thread that is not in this process may have held the other
        kept.clear()

    atexit.register(kept.clear)  # what it holds of compiled modules must not outlive them
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        # No kernel of the parent's is one on a GPU of the child's.
        os.register_at_fork(after_in_child=forget)
    return run_checked


def _kind(args: tuple[Any, ...]) -> Any:
    """What an operator's checks and the choice of a kernel may depend on; None where a tensor has no address.

    Such are those of devices that compute later, and sparse ones, which no kernel is for.
    """
    try:
        return tuple(
            [
                (arg.shape, arg.stride(), arg.dtype, arg.device, arg.data_ptr() % 16)
                if isinstance(arg, Tensor)
                else tuple(arg)
                if isinstance(arg, list)
                else arg
                for arg in args
            ]
        )
    except RuntimeError:
        return None


def differentiate(operator: Any, function: type[torch.autograd.Function]) -> None:
    """Make ``function`` the derivative of an operator, under the dispatcher's keys for autograd.

    Its ``forward(ctx, keyset, *args)`` gets the operator's arguments after what ``below_autograd`` asks for, and its
    ``backward`` returns a gradient for each of all these. (torch.library.register_autograd does the same with several
    layers of Python more, which take longer than the kernels of a small map.)
    """
    name = operator.name()

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    if _torch_private.are_functorch_transforms_active():
                        raise NotImplementedError(
                            f"{name} has no derivative for the transforms of torch.func (grad, vjp, jacrev, ...): "
                            f"use torch.autograd.grad or Tensor.backward"
                        )
                    return function.apply(keyset, *args)
        return below_autograd(operator, keyset, *args)

    _LIBRARY.impl(name.partition("::")[2], autograd, "Autograd", with_keyset=True)


def below_autograd(operator: Any, keyset: Any, *args: Any) -> Any:
    """Call the operator as the dispatcher does once autograd has been served: modes and subclasses come next.

    A kernel may return a view of its own memory. It is not marked as one, so that a result can be changed in place.
    """
    with _torch_private.BelowAutograd():
        return operator.redispatch(keyset & _torch_private.AFTER_AUTOGRAD, *args)


def call(operator: Any, *args: Any) -> Any:
    """Call an operator, past the keys for autograd where no argument asks for a graph.

    These keys' kernel is Python, and every list among the arguments is converted on the way to it and on from it: the
    guard costs less. (torch.compile, which runs neither, cannot trace the guard, and the transforms of torch.func have
    wrapped the arguments, so that these cannot say.)
    """
    asked = torch.is_grad_enabled() and any(map(_requires_grad, args))
    if asked or torch.compiler.is_compiling() or _torch_private.are_functorch_transforms_active():
        return operator(*args)
    with _torch_private.BelowAutograd():
        return operator(*args)


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def reference_gradients(
    ctx: Any, kernel: Callable[..., Sequence[Tensor]], wanted: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the tensors that ``ctx`` saved, by autograd through a kernel in plain PyTorch.

    Args:
        ctx: of an autograd.Function.
        kernel: called with the saved tensors.
        wanted: for each of these whether its gradient is.
        cotangents: of the kernel's results; None for one that takes no part.
    """
    saved = ctx.saved_tensors
    with torch.enable_grad(), without_autocast(saved[0]):
        # A view of its own for each, so that only the paths through this kernel are followed.
        tensors: list[Any] = [value if value is None else value.view_as(value) for value in saved]
        pairs = [
            (result, cotangent)
            for result, cotangent in zip(kernel(*tensors), cotangents, strict=True)
            if cotangent is not None and result.requires_grad
        ]
        if not pairs:
            return [None] * len(tensors)
        indices = [
            i for i, (tensor, want) in enumerate(zip(tensors, wanted, strict=True)) if want and tensor is not None
        ]
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            [tensors[i] for i in indices],
            [cotangent for _, cotangent in pairs],
            create_graph=True,
            allow_unused=True,
        )
    gradients = dict(zip(indices, found, strict=True))
    return [gradients.get(i) for i in range(len(tensors))]


def _one_or_all(tensors: Iterable[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """As PyTorch wants what a kernel returns: a tensor alone, or a tuple of several."""
    results = tuple(tensors)
    return results[0] if len(results) == 1 else results


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for the device of ``tensor``, where it has it."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def under_autocast(operator: Any, device_type: str, casts: Cast | bool) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The operator with autocast off, so that no kernel's own products are cast, and its arguments cast before.

    With ``casts`` True they are cast as PyTorch's own operators do, which leave float64 as it is.
    """

    def cast(*args: Any) -> Tensor | tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            if casts:
                args = cast_all(dtype, *args) if casts is True else casts(dtype, *args)
            result: Tensor | tuple[Tensor, ...] = operator(*args)
        return result

    return cast


def cast_all(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    """The arguments, floating tensors but those of float64 in ``dtype``."""
    return tuple(arg.to(dtype) if _is_cast(arg) else arg for arg in args)


def _is_cast(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
