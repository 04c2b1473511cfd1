"""Declares an operator to PyTorch's dispatcher, which is the only registry: who serves a tensor is for it to say."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from omniops import _torch_private
from omniops.backends import BACKENDS, empty, prepared
from omniops.ops import _batch, _flops
from omniops.ops._batch import PLAIN, Batch

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


Tangents = Callable[[Sequence[Any], Sequence["Tensor | None"]], "Sequence[Tensor | None]"]
"""The forward-mode derivative of an operator, in operations that are differentiable in their turn.

Called with its arguments and with the tangent of each, None for zero, it gives the tangent of each result."""


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
    batch: Batch = PLAIN,
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
        batch: where not every tensor has the batch as its first axis, or not every result is wanted.
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
    _batch.register(operator, batch, _LIBRARY)
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


class Derivative(torch.autograd.Function):
    """The derivative of an operator, for autograd.

    ``forward(ctx, keyset, *args)`` gets the operator's arguments after what ``below_autograd`` asks for, and
    ``backward`` returns a gradient for each of all these.
    """

    @staticmethod
    def keep(ctx: Any, *args: Any) -> None:
        """Keep of the operator's arguments what the backward needs."""
        raise NotImplementedError


def differentiate(operator: Any, function: type[Derivative], tangents: Tangents) -> None:
    """Make ``function`` and ``tangents`` the derivatives of an operator, under the dispatcher's keys for autograd.

    torch.library.register_autograd does the same with several layers of Python more, which take longer than the kernels
    of a small map.
    """
    apply_at_one_level = _at_one_level(operator, function)

    def autograd(keyset: Any, *args: Any) -> Any:
        transformed = _torch_private.are_functorch_transforms_active()
        if transformed or _torch_private.in_forward_mode():
            primals, given = _unpacked(args)
            if any(tangent is not None for tangent in given):
                # A graph keeps the duals, whose tangents its backward goes on with; the function has no rule for them.
                with nullcontext() if transformed else _torch_private.forward_mode(False):
                    results = in_reverse_mode(keyset, transformed, args)
                return _with_tangents(results, tangents(primals, given))
        return in_reverse_mode(keyset, transformed, args)

    def in_reverse_mode(keyset: Any, transformed: bool, args: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return (apply_at_one_level if transformed else function.apply)(keyset, *args)
        return below_autograd(operator, keyset, *args)

    _LIBRARY.impl(operator.name().partition("::")[2], autograd, "Autograd", with_keyset=True)


_LEVEL = 0
"""Of forward mode: PyTorch has no other, and what torch.compile traces does not ask for one."""


def _unpacked(args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Tensor | None]]:
    """The primals and the tangents of the arguments, None for those that have no tangent."""
    pairs = [forward_ad.unpack_dual(arg, level=_LEVEL) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    primals, tangents = zip(*pairs, strict=True)
    return primals, tangents


def _with_tangents(results: Any, tangents: Sequence[Tensor | None]) -> Any:
    if isinstance(results, Tensor):
        (tangent,) = tangents
        return _dual(results, tangent)
    return tuple(_dual(result, tangent) for result, tangent in zip(results, tangents, strict=True))


def _dual(primal: Any, tangent: Tensor | None) -> Any:
    return primal if tangent is None else forward_ad.make_dual(primal, tangent, level=_LEVEL)


def _at_one_level(operator: Any, function: type[Derivative]) -> Callable[..., Any]:
    """What applies the same derivative at one level of the transforms of torch.func."""

    def forward(keyset: Any, *args: Any) -> Any:
        # The transforms around this one are run in here, where both modes are off.
        with torch.enable_grad(), _torch_private.forward_mode(True):
            return below_autograd(operator, keyset, *args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.keep(ctx, *inputs[1:])

    return _torch_private.at_one_level(
        function.__name__, forward=forward, setup_context=setup_context, backward=function.backward
    )


def below_autograd(operator: Any, keyset: Any, *args: Any) -> Any:
    """Call the operator as the dispatcher does once autograd has been served: modes and subclasses come next.

    A kernel may return a view of its own memory. It is not marked as one, so that a result can be changed in place.
    """
    with _torch_private.BelowAutograd():
        return operator.redispatch(keyset & _torch_private.AFTER_AUTOGRAD, *args)


def call(operator: Any, *args: Any) -> Any:
    """Call an operator, past the keys for autograd where no argument asks for a graph.

    These keys' kernel is Python, and every list among the arguments is converted on the way to it and on from it: the
    guard costs less. (torch.compile, which runs neither, cannot trace the guard, and the transforms of torch.func and
    forward mode have wrapped the arguments, so that these cannot say.)
    """
    if (
        (torch.is_grad_enabled() and any(map(_requires_grad, args)))
        or _torch_private.in_forward_mode()
        or torch.compiler.is_compiling()
        or _torch_private.are_functorch_transforms_active()
    ):
        return operator(*args)
    with _torch_private.BelowAutograd():
        return operator(*args)


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What a function saved for its backward, of which ``call`` can see what asks for a graph."""
    saved: tuple[Any, ...] = ctx.saved_tensors
    return _torch_private.without_dead_wrappers(saved) if torch.is_grad_enabled() else saved


def reference_tangents(
    kernel: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The tangents of an operator's results, by forward mode through its kernel in plain PyTorch."""
    results = kernel(*map(_dual, primals, tangents))
    return _unpacked([results] if isinstance(results, Tensor) else results)[1]


def total(terms: Sequence[Tensor]) -> Tensor | None:
    """The sum of the terms; None, which stands for zero, where there are none."""
    return functools.reduce(torch.add, terms) if terms else None


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
    saved = saved_tensors(ctx)
    indices = [i for i, (tensor, want) in enumerate(zip(saved, wanted, strict=True)) if want and tensor is not None]
    given = [cotangent is not None for cotangent in cotangents]
    if not indices or not any(given):
        return [None] * len(saved)

    def of_wanted(*tensors: Any) -> tuple[Tensor, ...]:
        """The results that have a cotangent, of the tensors whose gradient is wanted."""
        replaced = dict(zip(indices, tensors, strict=True))
        results = kernel(*(replaced.get(i, tensor) for i, tensor in enumerate(saved)))
        return tuple(itertools.compress(results, given))

    chosen, by_results = [saved[i] for i in indices], tuple(itertools.compress(cotangents, given))
    with torch.enable_grad(), without_autocast(saved[0]):
        if _torch_private.are_functorch_transforms_active() or not all(x.requires_grad for x in chosen):
            found = torch.func.vjp(of_wanted, *chosen)[1](by_results)
        else:
            # A view of its own for each, so that only the paths through this kernel are followed.
            views = [x.view_as(x) for x in chosen]
            found = _gradients(of_wanted(*views), views, by_results)
    gradients = dict(zip(indices, found, strict=True))
    return [gradients.get(i) for i in range(len(saved))]


def _gradients(
    results: Sequence[Tensor], tensors: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    pairs = [pair for pair in zip(results, cotangents, strict=True) if pair[0].requires_grad]
    if not pairs:
        return [None] * len(tensors)
    outputs, grad_outputs = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, tensors, grad_outputs, create_graph=True, allow_unused=True)


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
