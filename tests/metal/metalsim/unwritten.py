"""What nobody has written yet: ``poisoned()`` marks it, kernels and PyTorch's operators that read it fail.

A tensor from ``torch.empty`` inside ``poisoned()`` is filled with a pattern that no result has (a NaN with a payload,
for floats). An element counts as written once a kernel has written it, or once it no longer holds the pattern, since
PyTorch's own operators write too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_PATTERNS = {1: 0xA5, 2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_permuted,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
# Of their tensors they ask no more than the size.
_SHAPE = {
    _aten.full_like,
    _aten.new_full,
    _aten.new_ones,
    _aten.new_zeros,
    _aten.ones_like,
    _aten.rand_like,
    _aten.randn_like,
    _aten.zeros_like,
}
# In place, and what was there before does not matter.
_OVERWRITE = {_aten.copy_, _aten.fill_, _aten.zero_, _aten.normal_, _aten.random_, _aten.uniform_}

Result = TypeVar("Result")


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


def written(tensor: Tensor) -> np.ndarray | None:
    """Which elements of the tensor's storage have been written, or None if nothing is known of it."""
    if not _registry or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    unwritten = _registry.get(tensor.untyped_storage().data_ptr())
    return None if unwritten is None or unwritten.size != tensor.element_size() else unwritten.update(tensor)


def _missing(tensor: Tensor) -> str:
    """Which elements of the tensor have been written by nobody; empty if none is known of."""
    known = written(tensor)
    if known is None or not tensor.numel():
        return ""
    strides, offset = tensor.stride(), tensor.storage_offset()
    view = np.lib.stride_tricks.as_strided(known[offset:], tensor.shape, strides, writeable=False)
    if view.all():
        return ""
    missing = np.argwhere(view == 0)
    return f"{len(missing)} of {tensor.numel()} elements, first {missing[0].tolist()}"


def assert_written(tensor: Tensor) -> None:
    """Fail if an element of a tensor made inside ``poisoned()`` has been written by nobody. Call it inside too."""
    if written(tensor) is None:
        raise AssertionError("the tensor was not made inside poisoned()")
    missing = _missing(tensor)
    if missing:
        raise AssertionError(f"nothing wrote {missing}")


class _Poison(TorchDispatchMode):
    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _read(func, args, kwargs):
            missing = _missing(tensor)
            if missing:
                raise AssertionError(f"{func} reads what nothing wrote: {missing}")
        result = func(*args, **kwargs)
        if func.overloadpacket in _EMPTY and result.device.type == "cpu" and result.numel():
            _registry[result.untyped_storage().data_ptr()] = _Unwritten(result)
            self.kept.append(result)
        return result


def _read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator reads: not what it makes a view of, asks the shape of or overwrites."""
    schema = func._schema
    sizes_only = func.overloadpacket in _EMPTY | _SHAPE
    if sizes_only or any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
        return
    for i, parameter in enumerate(schema.arguments):
        written_to = parameter.alias_info is not None and parameter.alias_info.is_write
        if written_to and (parameter.kwarg_only or func.overloadpacket in _OVERWRITE):
            continue
        value = args[i] if i < len(args) else kwargs.get(parameter.name)
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield leaf


@contextmanager
def poisoned() -> Iterator[None]:
    """While this is open, ``torch.empty`` and its kind return tensors that nobody has written.

    Kernels (KernelError) and PyTorch's operators (AssertionError) that read them fail. Memory of the tensors is not
    reused until it closes.
    """
    kept: list[Tensor] = []
    try:
        with _Poison(kept):
            yield
    finally:
        for tensor in kept:
            _registry.pop(tensor.untyped_storage().data_ptr(), None)


def launched(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """What the launch code ``function(*args, **kwargs)`` returns, run as its tests have to run it.

    Inside ``poisoned()``: a kernel or an operator must have written each element of each tensor that it returns, and of
    whatever these were made of (AssertionError, KernelError). Results are copies.
    """
    with poisoned():
        results = function(*args, **kwargs)
        for i, result in enumerate(pytree.tree_leaves(results)):
            missing = _missing(result) if isinstance(result, Tensor) else ""
            if missing:
                raise AssertionError(f"result {i}: nothing wrote {missing}")
        copied: Result = pytree.tree_map_only(Tensor, Tensor.clone, results)
        return copied
