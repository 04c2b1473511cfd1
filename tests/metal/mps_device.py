"""A pretended device "mps" on a machine without one, whose PyTorch operators are held to the rules of mps_rules.py.

``mps_device()`` is a context in which tensors can be made on, moved to and read back from the device "mps". Code that
asks ``tensor.device.type``, autocast and the dispatcher's choice of omniops' kernels answer as on an Apple GPU: the
Metal kernels' launch code runs. Autograd alone does not know the device, so a training step takes tensors of "meta",
which the context takes for tensors of MPS too.

With ``values=True`` operators compute on the CPU, and Metal kernels in the emulator. Without, tensors have no contents,
so that models of full size run in seconds: Metal kernels only have their arguments checked, what is read back is zero,
and of a boolean mask two elements are taken to be true.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import emulator
import torch
import torch.nn.functional as F
from metalsim import toolchain
from metalsim.arguments import bind, dispatch
from mps_call import is_on_mps, leaves
from mps_rules import check, check_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from omniops import device as omniops_device
from omniops.backends.mps._library import library

MPS = torch.device("mps", 0)
META = torch.device("meta")
_TRUE = 2  # how many elements of a mask without contents are taken to be true
aten = torch.ops.aten


class MpsTensor(Tensor):
    """A tensor of the pretended device; ``inner`` holds its strides and offset, and its contents where it has them."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> MpsTensor:
        made: MpsTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=MPS,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended device is used outside of mps_device()")

    def tolist(self) -> Any:
        """As of the device, whose contents are read first."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the contents."""
        return self.inner.untyped_storage()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"MpsTensor({tuple(self.shape)}, strides={self.stride()}, dtype={self.dtype})"


class _Operators(TorchDispatchMode):
    """Runs PyTorch's operators on the pretended device, each held to the rules before."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = list(leaves(args, kwargs))
        tensors = [leaf for leaf in arguments if isinstance(leaf, Tensor)]
        on_mps = [tensor for tensor in tensors if is_on_mps(tensor)]
        target = next((leaf for leaf in arguments if isinstance(leaf, torch.device)), None)
        if not on_mps and (target is None or target.type not in ("mps", "meta")):
            return func(*args, **kwargs)
        if func.namespace in ("omniops", "torchvision") and _has_mps_kernel(func):
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.MPS), *args, **kwargs)
        if func is aten._has_compatible_shallow_copy_type.default:
            return False
        if func not in _OWN and _is_composite(func):
            with self:  # inference mode leaves to the device what autograd takes apart
                return func.decompose(*args, **kwargs)
        _on_one_device(func, tensors)
        check(func, args, kwargs)
        return self._run(func, args, kwargs, on_mps)

    def _run(self, func: Any, args: Any, kwargs: Any, on_mps: Sequence[Tensor]) -> Any:
        read = self._read(func, args, kwargs) if on_mps and not self.values else None
        if read is not None:
            return read[0]
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        inner_device = torch.device("cpu") if self.values else META
        outer = {id(leaf.inner): leaf for leaf in on_mps if isinstance(leaf, MpsTensor)}

        def unwrapped(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [unwrapped(item) for item in value]
            if isinstance(value, MpsTensor):
                return value.inner
            if isinstance(value, Tensor) and not self.values and value.device.type == "cpu":
                return value.to(META)
            return inner_device if isinstance(value, torch.device) and value.type == "mps" else value

        is_mps = any(isinstance(leaf, MpsTensor) for leaf in on_mps) or str(kwargs.get("device")).startswith("mps")

        def wrapped(result: Tensor) -> Tensor:
            if id(result) in outer:
                same = outer[id(result)]
                assert (result.shape, result.stride()) == (same.shape, same.stride()), (
                    f"{func} changes what a tensor is"
                )
                return same
            return MpsTensor(result) if is_mps and not to_cpu else result

        # A view of an ordinary tensor is one too, in inference mode as well.
        inference = torch.is_inference_mode_enabled() and all(leaf.is_inference() for leaf in on_mps)
        with torch.utils._python_dispatch._disable_current_modes():
            result = func(*map(unwrapped, args), **{name: unwrapped(value) for name, value in kwargs.items()})
            if is_mps:
                check_results(func, result)
            with torch.inference_mode(inference):
                return tree_map_only(Tensor, wrapped, result)

    def _read(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The result of an operator that needs contents, which tensors have not here; None for others."""
        if func is aten._local_scalar_dense.default:
            return (torch.zeros((), dtype=args[0].dtype).item(),)
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            read = torch.zeros(args[0].shape, dtype=dtype)
            if args[0].dtype == torch.bool:
                read.flatten()[:_TRUE] = 1
            return (read,)
        if func is aten.nonzero.default:
            return (self._like(args[0], (min(_TRUE, args[0].numel()), args[0].dim()), torch.int64),)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices: list[Tensor | None] = []
            for index in args[1]:
                if index is None or index.dtype not in (torch.bool, torch.uint8):
                    indices.append(index)
                else:
                    indices += [self._like(args[0], (min(_TRUE, index.numel()),), torch.int64)] * index.dim()
            if len(indices) != len(args[1]) or any(a is not b for a, b in zip(indices, args[1], strict=True)):
                with self:
                    return (func(args[0], indices, *args[2:], **kwargs),)
        if func.namespace == "torchvision" and func._opname == "nms":
            return (self._like(args[0], (min(_TRUE, len(args[0])),), torch.int64),)
        return None

    def _like(self, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=META)
        return MpsTensor(made) if isinstance(tensor, MpsTensor) else made


def _patched_functions() -> list[Any]:
    """Functions that MPS has an operator for, where autograd would take them apart before the operators are seen."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if is_on_mps(input):
            check(aten.linear.default, _cast((input, weight, bias)), {})
        return _linear(input, weight, bias)

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(query, MpsTensor):
            return _attention(query, *args, **kwargs)
        # Which kernel serves it is asked of the device's own code, which is not in this build.
        with torch.inference_mode():
            return _attention(*_cast((query, *args)), **_cast(kwargs))

    return [mock.patch.object(F, "linear", linear), mock.patch.object(F, "scaled_dot_product_attention", attention)]


_linear, _attention = F.linear, F.scaled_dot_product_attention


def _cast(values: Any) -> Any:
    """As autocast does, where it is on."""
    if not torch.is_autocast_enabled("mps"):
        return values
    dtype = torch.get_autocast_dtype("mps")
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)


@cache
def _has_mps_kernel(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "MPS")


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


# What MPS has an operator for, where other devices run several.
_OWN = {aten.linear.default, aten.scaled_dot_product_attention.default}
_MOVES = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.lift_fresh.default,
}


def _on_one_device(func: Any, tensors: Sequence[Tensor]) -> None:
    flags = [is_on_mps(tensor) for tensor in tensors if tensor.dim()]
    if func not in _MOVES and any(flags) and not all(flags):
        devices = [str(tensor.device) for tensor in tensors]
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, got {', '.join(devices)}")


class _CheckedKernels:
    """The kernels of a Metal source that have their arguments checked, and compute where there are values."""

    def __init__(self, source: str, values: bool) -> None:
        self._library, self._values = emulator.compile_shader(source), values

    def __dir__(self) -> list[str]:
        return dir(self._library)

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self._library, name)

        def launch(*args: Any, **kwargs: Any) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                inner = [arg.inner if isinstance(arg, MpsTensor) else arg for arg in args]
                if self._values:
                    kernel(*inner, **kwargs)
                    return
                casts = kwargs.pop("arg_casts", None)
                dispatch(name, inner, kwargs.get("threads"), kwargs.get("group_size"), kernel.max_threads)
                bind(name, inner, casts, kernel.parameters)

        return launch


@cache
def _guard() -> ctypes.CDLL:
    """PyTorch's questions about the device, answered by mps_guard.cpp for as long as the process lives."""
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("mps_guard.cpp")

    def make(path: Path) -> None:
        options = ("-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10")
        toolchain.run(("c++", str(source), *options, "-o", str(path)))

    return ctypes.CDLL(str(toolchain.cached("guard.so", [torch.__version__, source], make)))


@contextmanager
def mps_device(*, values: bool) -> Iterator[torch.device]:
    """The pretended device, "mps:0"; see above."""
    _guard()
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        # Modules that move get new parameters, as contents cannot be put into old ones.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        # torch.tensor makes a tensor on the CPU, and moves it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        compile_shader = mock.patch.object(torch.mps, "compile_shader", lambda source: _CheckedKernels(source, values))
        stack.enter_context(compile_shader)
        stack.enter_context(mock.patch.object(omniops_device, "found", return_value=[torch.device("cpu"), MPS]))
        # Autocast asks, before it takes bfloat16.
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_macos_or_newer", return_value=True))
        library.cache_clear()
        stack.callback(library.cache_clear)
        for patch in _patched_functions():
            stack.enter_context(patch)
        stack.enter_context(_Operators(values))
        yield MPS
