"""Times of calls on a device, taken in turns so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container
from time import perf_counter

import torch

from omniops.device import synchronize

Call = Callable[[], object]

CALL, GRAPH, HOST = "call", "graph", "host"

METHOD = {
    CALL: "One call as a user makes it, from an idle device to its end: Python's and the launch's time included.",
    GRAPH: "Replay of a CUDA graph of the call: the kernels' own time.",
    HOST: "One of calls in a row at a tiny shape, none of which waits for the device: what Python, the dispatcher and "
    "the launches take. On the CPU the kernel's time is part of it.",
}

_ROUNDS = 100
_FEWEST_ROUNDS = 3
_SLOW_SECONDS = 1.0
# Of a dozen launches each, they do not fill the device's queue, which holds 1024.
_CALLS_IN_A_ROW = 20


def warm_up(call: Call, device: torch.device, seconds: float) -> bool:
    """Run the call for about ``seconds``; say whether it is slow: whether a run takes over a second.

    The very first run is not counted: it may compile, or wake the device.
    """
    call()
    synchronize(device)
    started = perf_counter()
    while True:
        before = perf_counter()
        call()
        synchronize(device)
        now = perf_counter()
        if now - started >= seconds:
            return now - before > _SLOW_SECONDS


def milliseconds(
    calls: dict[tuple[str, str], Call], device: torch.device, seconds: float, slow: Container[str] = ()
) -> dict[tuple[str, str], list[float]]:
    """Time calls in turns, each for about ``seconds``: 3 to 100 times. Keys are (name, mode).

    The slow ones, by name, are timed once, so that what nobody would use does not eat the time of the rest. On CUDA the
    time lies between two events, and the L2 cache is flushed before each call.

    Example:
        >>> x = torch.ones(10)
        >>> calls = {("sum", CALL): x.sum, ("product", CALL): x.prod}
        >>> times = milliseconds(calls, torch.device("cpu"), seconds=0)
        >>> len(times["sum", CALL])
        3
    """
    once = _cuda_events(device) if device.type == "cuda" else _wall_clock(device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0.0)
    for turn in range(_ROUNDS):
        for key, call in calls.items():
            fewest = 1 if key[0] in slow else _FEWEST_ROUNDS
            if turn < fewest or spent[key] < seconds:
                started = perf_counter()
                times[key].append(_host_milliseconds(call, device) if key[1] == HOST else once(call, key[1]))
                spent[key] += perf_counter() - started
    return times


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes, which should be far more than the caches hold."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    times = milliseconds({("copy", GRAPH): lambda: target.copy_(source)}, device, seconds=1.0)["copy", GRAPH]
    return 2 * size / (statistics.median(times) / 1e3)


def quartiles(times: list[float]) -> tuple[float, float] | tuple[None, None]:
    """The lower and the upper one, where there are times enough."""
    if len(times) == 1:
        return None, None
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
    return lower, upper


def _host_milliseconds(call: Call, device: torch.device) -> float:
    """The mean of calls in a row; the device is waited for before and after them."""
    synchronize(device)
    started = perf_counter()
    for _ in range(_CALLS_IN_A_ROW):
        call()
    seconds = perf_counter() - started
    synchronize(device)
    return seconds / _CALLS_IN_A_ROW * 1e3


def _wall_clock(device: torch.device) -> Callable[[Call, str], float]:
    def once(call: Call, mode: str) -> float:
        synchronize(device)
        started = perf_counter()
        call()
        synchronize(device)
        return (perf_counter() - started) * 1e3

    return once


def _cuda_events(device: torch.device) -> Callable[[Call, str], float]:
    properties = torch.cuda.get_device_properties(device)
    flush = torch.empty(8 * properties.L2_cache_size, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(call: Call, mode: str) -> float:
        torch.cuda.synchronize(device)
        flush.zero_()
        if mode == CALL:
            # A call starts from an idle device. A replay is queued behind the flush instead, so that the time of
            # launching it is hidden.
            torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return once
