"""CUDA graphs on the CPU: a capture records PyTorch's operators, and a replay runs them again on the same memory.

Outside of its replays a graph's memory holds no values: a capture runs nothing, and graphs overwrite each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omniops.sam2.modeling import cuda_graphs

_aten = torch.ops.aten
# They wait for the GPU, or copy what Python has just made on the CPU.
_REFUSED = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.item,
    _aten.lift_fresh,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_dim,
    _aten._unique2,
}


class EmulatedCudaGraph:
    """In place of ``torch.cuda.CUDAGraph``."""

    capturing: EmulatedCudaGraph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.memory: list[torch.UntypedStorage] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert not torch.is_inference_mode_enabled()
        EmulatedCudaGraph.capturing = self

    def capture_end(self) -> None:
        EmulatedCudaGraph.capturing = None
        self.overwrite()

    def overwrite(self) -> None:
        """With NaN, and -1 where there are integers."""
        for storage in self.memory:
            storage.fill_(255)

    def call(self, operator: Any, args: Any, kwargs: Any) -> Any:
        if operator.overloadpacket in _REFUSED:
            raise RuntimeError(f"{operator} cannot be captured")
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        addresses = {storage.data_ptr() for storage in _storages((args, kwargs))}
        self.memory += [storage for storage in _storages(result) if storage.data_ptr() not in addresses]
        return result

    def replay(self) -> None:
        for operator, args, kwargs, captured in self.calls:
            result = operator(*args, **kwargs)
            for written, computed in zip(_tensors(captured), _tensors(result), strict=True):
                if written.data_ptr() != computed.data_ptr():  # it is no view, nor written in place
                    written.copy_(computed)


class _Stream(TorchDispatchMode):
    """On which graphs are captured."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        graph = EmulatedCudaGraph.capturing
        return operator(*args, **(kwargs or {})) if graph is None else graph.call(operator, args, kwargs or {})


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [item for item in result or () if isinstance(item, Tensor)]


def _storages(value: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def emulate_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedCudaGraph]:
    """Have models on the CPU use such graphs; returns the list in which each replay puts its graph."""
    replayed: list[EmulatedCudaGraph] = []
    captured: WeakSet[Recorded] = WeakSet()
    streams: dict[object, object] = {}
    current: list[object] = []

    class Recorded(EmulatedCudaGraph):
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            assert current, "the default stream cannot be captured"
            assert streams.setdefault(pool, current[-1]) is current[-1], "memory is of the stream that got it first"
            super().capture_begin(pool, capture_error_mode)
            captured.add(self)

        def replay(self) -> None:
            for graph in captured:
                graph.overwrite()
            super().replay()
            replayed.append(self)

    @contextmanager
    def stream(other: object) -> Iterator[None]:
        current.append(other)
        try:
            with _Stream():
                yield
        finally:
            current.pop()

    monkeypatch.setattr(cuda_graphs, "_can_replay", lambda device: torch.is_inference_mode_enabled())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return replayed
