"""Steps of the network as CUDA graphs, each launched by one call.

Of a small model Python takes longer to launch a step's kernels one by one than the GPU takes to run them.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

MAX_GRAPHS = 32
"""Of one model; those used last stay."""

_CAPTURE_LOCK = threading.Lock()
"""Graphs of all models are captured one at a time: captures share PyTorch's generator of random numbers."""

_Result = TypeVar("_Result")


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    args: Any
    """What the kernels read, in nested tuples as the function's arguments."""
    result: Any
    """What they write, in nested tuples as the function's result."""


class CudaGraphs:
    """The CUDA graphs of a module's functions.

    A function is called as it is the first two times that it gets tensors of those shapes, captured after the second
    call, and replayed from then on: its Python does not run any more, nor do hooks of modules. So it must not wait for
    the GPU, and nothing that it copies from the CPU changes, but for tensors that are its arguments. Where it cannot be
    captured, or there is no memory left for it, a warning says so, and all goes on without graphs.

    The graphs share their memory, as they run one after the other, and what they return is copied from it. They end
    where a weight is at another address than when they were captured; call ``clear`` where a parameter is replaced by
    another, where a setting of the module or of PyTorch (for TF32, attention, determinism) changes, and for their
    memory. A copy of this object has no graphs.

    Args:
        enabled: capture and replay; else functions are called as they are. An attribute too.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._lock = threading.RLock()
        self._streams: dict[torch.device, Any] = {}
        self.clear()

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[bool]]:
        return CudaGraphs, (self.enabled,)

    def clear(self) -> None:
        """Forget all graphs."""
        with self._lock:
            self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
            self._called: OrderedDict[Hashable, None] = OrderedDict()  # functions called once so far
            self._buffers: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()  # the graphs hold them
            self._weights: list[Tensor] = []
            self._addresses: list[int] = []
            self._pool: Any = None

    def run(self, function: Callable[..., _Result], *args: Any, device: torch.device, **options: Hashable) -> _Result:
        """``function(*args, **options)``.

        Args:
            function: a method of the module; returns a tensor, or a tuple or a named tuple of tensors, None and such
                tuples.
            args: of those kinds. A tensor of the CPU is copied to the device before the graph runs.
            device: where the function runs.
            options: its other arguments, which tell one graph from another by their values.
        """
        if not self.enabled or not _can_replay(device):
            return function(*args, **options)
        module: nn.Module = function.__self__  # type: ignore[attr-defined]
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (function.__qualname__, _layout(args), tuple(options.items()), device, dtype, module.training)
        with self._lock:
            if [weight.data_ptr() for weight in self._weights] != self._addresses:
                self.clear()
            if key not in self._graphs:
                return self._call_and_capture(key, function, args, device, options)
            captured = self._graphs[key]
            self._graphs.move_to_end(key)
            for buffer, tensor in zip(_tensors(captured.args), _tensors(args), strict=True):
                buffer.copy_(tensor, non_blocking=True)
            captured.graph.replay()
            result: _Result = _map(Tensor.clone, captured.result)
        return result

    def _call_and_capture(
        self, key: Hashable, function: Callable[..., _Result], args: Any, device: torch.device, options: Any
    ) -> _Result:
        """Call the function, and capture it if it was called before.

        The call comes first, because what libraries set up at a thread's first call cannot be captured, and so that
        wrong arguments raise their error there and are not taken for a failed capture.
        """
        with _without_kept_casts(device):  # as when it is captured, for torch.compile to compile once
            result = function(*args, **options)
        if key not in self._called:
            _keep_last(self._called, key, None)
            return result
        del self._called[key]
        if not self._weights:
            module: nn.Module = function.__self__  # type: ignore[attr-defined]
            self._prepare(module, device)
        try:
            _keep_last(self._graphs, key, self._capture(function, args, device, options))
        except RuntimeError as error:
            self.enabled = False
            self.clear()
            warnings.warn(f"no CUDA graphs any more: {function.__qualname__}: {error}", stacklevel=4)
        return result

    def _prepare(self, module: nn.Module, device: torch.device) -> None:
        self._weights = [*module.parameters(), *module.buffers()]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        self._pool = torch.cuda.graph_pool_handle()
        if device not in self._streams:  # one for all graphs: PyTorch reuses freed memory on the same stream alone
            self._streams[device] = torch.cuda.Stream(device)

    def _capture(self, function: Callable[..., Any], args: Any, device: torch.device, options: Any) -> _Graph:
        number = itertools.count()
        args = _map(lambda tensor: self._buffer(next(number), tensor, device), args)
        graph = torch.cuda.CUDAGraph()
        with _without_kept_casts(device), torch.cuda.stream(self._streams[device]), _CAPTURE_LOCK:
            with torch.inference_mode(False):  # before torch 2.11 graphs of other libraries use tensors made here
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may go on
            try:
                result = function(*args, **options)
            except BaseException:
                with suppress(RuntimeError):  # that the capture failed, where it is the error that says why
                    graph.capture_end()
                raise
            graph.capture_end()
        return _Graph(graph, args, result)

    def _buffer(self, number: int, tensor: Tensor, device: torch.device) -> Tensor:
        """Where all graphs find an argument of that number and layout; with the tensor's values."""
        key = (number, *_layout(tensor), device)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = torch.empty_like(tensor, device=device)
        return buffer.copy_(tensor)


def _can_replay(device: torch.device) -> bool:
    """Whether all graphs of a model run one after the other there, on the stream that PyTorch has by default."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.is_inference_mode_enabled()
        and not torch.compiler.is_compiling()
        and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        and not torch.cuda.is_current_stream_capturing()
    )


def _without_kept_casts(device: torch.device) -> torch.autocast:
    """Autocast as it is, but for the casts of weights that it keeps for all threads: graphs must not read them."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _keep_last(kept: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    kept[key] = value
    while len(kept) > MAX_GRAPHS:
        kept.popitem(last=False)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _layout(value: Any) -> Any:
    """Shape, strides and dtype of each tensor in nested tuples."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return None if value is None else tuple(_layout(item) for item in value)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Nested tuples with ``function`` of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    items = [_map(function, item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
