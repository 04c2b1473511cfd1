"""What calls on NVIDIA GPUs are in the middle of: streams, graphs, threads, several GPUs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from differentiable import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def busy():
    """Keep the current stream from what comes next for some ten milliseconds."""
    torch.cuda._sleep(20_000_000)


def test_calls_go_to_the_current_stream(problem):
    """Also those of a kind that was kept on another: a launch anywhere else would read what is not there yet."""
    expected = problem.expected()
    moved = problem.to("cuda")
    moved.gradients()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        values = problem.to("cuda")
        poisoned = [torch.full_like(x, torch.nan) for x in (*values.tensors, values.grad)]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            busy()
            for x, y in zip(poisoned, (*values.tensors, values.grad), strict=True):
                x.copy_(y.detach())
            late = [x.requires_grad_() for x in poisoned[:-1]]
            result = problem.function(*late)
            found = [result.detach(), *torch.autograd.grad(result, late, poisoned[-1])]
        stream.synchronize()
        assert_close(found, expected)


def test_in_a_graph_forward_and_backward(problem):
    moved = problem.to("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            moved.gradients()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moved.gradients()
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for x in (*moved.tensors, moved.grad):
                x.mul_(factor)
        graph.replay()
        assert_close(captured, moved.gradients())


def test_a_first_call_while_a_graph_is_recorded_elsewhere_and_later_ones_within(problem):
    """As make_graphed_callables has it: warm-up on a side stream, then capture."""
    moved = problem.to("cuda")
    graphed = torch.cuda.make_graphed_callables(problem.function, tuple(moved.tensors))
    other = problem.to("cuda")
    assert_close(other.gradients(graphed), problem.expected())


def test_threads_with_streams_of_their_own(problem):
    """First calls of a kind at once, forward and backward, in two dtypes."""
    work = [(dtype, n) for n in range(4) for dtype in (torch.float32, torch.float16)]
    start = threading.Barrier(len(work))

    def repeat_gradients(item):
        moved = problem.to("cuda", item[0])
        torch.cuda.synchronize()
        start.wait(60)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [moved.gradients() for _ in range(3)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(len(work)) as pool:
        results = list(pool.map(repeat_gradients, work))
    for (dtype, _), found in zip(work, results, strict=True):
        expected = problem.to("cuda", dtype).gradients()
        for gradients in found:
            for one, other in zip(gradients, expected, strict=True):
                # GPUs may add the gradients of a pixel in any order.
                tolerance = 1e-5 if dtype == torch.float32 else 2e-3
                assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_views_that_vectors_cannot_be_read_from(problem):
    """After an aligned call of the same shapes and strides, for which another kernel is kept."""
    expected = problem.expected()
    for offset in (0, 1, 2, 3, 0):
        moved = problem.to("cuda")
        shifted = []
        for x in (*moved.tensors, moved.grad):
            memory = x.new_empty(x.numel() + offset)
            shifted.append(memory[offset:].view(x.shape).copy_(x.detach()))
        moved.tensors, moved.grad = [x.detach().requires_grad_() for x in shifted[:-1]], shifted[-1]
        assert moved.tensors[0].data_ptr() % 16 == 4 * offset
        assert_close(moved.gradients(), expected)


def test_the_profiler_sees_operators_and_kernels(problem):
    moved = problem.to("cuda")
    moved.gradients()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        moved.gradients()
        torch.cuda.synchronize()
    events = {event.key: event for event in profiler.key_averages()}
    for name in (f"omniops::{problem.name}", f"omniops::{problem.name}_backward"):
        assert events[name].device_time_total > 0


@NEEDS_TWO
def test_on_each_gpu_whichever_is_current(problem):
    expected = problem.expected()
    for _ in range(2):
        for device in ("cuda:1", "cuda:0"):
            found = problem.to(device).gradients()
            assert all(x.device == torch.device(device) for x in found)
            assert_close(found, expected)
    assert torch.cuda.current_device() == 0


@NEEDS_TWO
def test_on_two_gpus_at_once(problem):
    expected = problem.expected()
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda i: problem.to(f"cuda:{i % 2}").gradients(), range(8)):
            assert_close(found, expected)
