"""What is kept for a kind of call: bounded, of no tensor, and never of a call that is wrong."""

import gc
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch

import omniops
from omniops.backends import prepared
from omniops.ops import _library
from omniops.ops._library import MAX_KEPT, Result

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
IGNORES_FORK_WARNING = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def kept_of(function):
    """The dict in which an operator keeps what its calls need."""
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["kept"].cell_contents


class Operator:
    """An operator of one backend that multiplies a vector of at most 9 numbers, its kernel in one step or in two."""

    def __init__(self, monkeypatch, in_two_steps=True):
        self.checks = self.preparations = self.runs = 0
        self.failing = False
        module = ModuleType("pretended_backend.scale")
        module.scale = prepared(self.prepare) if in_two_steps else self.run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        self.call = _library._kernel(ModuleType("pretended_backend"), "scale", "scale", self.results)
        self.kept = kept_of(self.call)

    def results(self, x, factors):
        self.checks += 1
        if x.dim() != 1 or len(x) > 9:
            raise ValueError(f"x must be a vector of at most 9 numbers, got shape {tuple(x.shape)}")
        if sum(factors) < 0:
            raise ValueError(f"factors must not be negative, got {factors}")
        return [Result(x.shape, like=x)]

    def prepare(self, x, factors):
        self.preparations += 1
        if self.failing:
            raise MemoryError("no memory to prepare it")
        product = float(np.prod(factors))
        described = x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16

        def run(x, factors):
            self.runs += 1
            assert described == (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
            assert product == np.prod(factors)
            return x * product

        return run

    def run(self, x, factors):
        self.runs += 1
        return x * float(np.prod(factors))


@pytest.fixture
def operator(monkeypatch):
    return Operator(monkeypatch)


def test_a_second_call_of_a_kind_is_neither_checked_nor_prepared(operator):
    for _ in range(3):
        assert torch.equal(operator.call(torch.ones(3), [2, 3]), torch.full((3,), 6.0))
    assert (operator.checks, operator.preparations, operator.runs) == (1, 1, 3)


def test_a_kernel_in_one_step_is_checked_once_too(monkeypatch):
    operator = Operator(monkeypatch, in_two_steps=False)
    for _ in range(3):
        assert torch.equal(operator.call(torch.ones(3), [2, 3]), torch.full((3,), 6.0))
    assert (operator.checks, operator.runs) == (1, 3)


def test_whatever_a_kernel_may_look_at_makes_another_kind(operator):
    """The kernel itself asserts that it runs on what it was prepared for."""
    memory = torch.arange(40.0)
    alike = [memory[:4], memory[4:8], memory[8:12].requires_grad_(False), torch.nn.Parameter(memory[12:16])]
    for x in alike:
        operator.call(x.detach(), [2])
    assert len(operator.kept) == 1
    others = [
        (memory[:5], [2]),
        (memory[:8:2], [2]),
        (memory[1:5], [2]),  # as aligned as a float alone
        (memory[2:6], [2]),
        (memory[:4].double(), [2]),
        (memory[:4].long(), [2]),
        (memory[:4], [3]),
        (memory[:4], [2, 1]),
        (memory[:4], []),
    ]
    for _ in range(2):
        for x, factors in others:
            assert torch.equal(operator.call(x, factors), x * float(np.prod(factors)))
    assert len(operator.kept) == operator.preparations == 1 + len(others)


def test_wrong_arguments_raise_the_same_each_time_and_next_to_right_ones(operator):
    operator.call(torch.ones(9), [1])
    messages = set()
    for _ in range(3):
        for x, factors in ((torch.ones(3, 3), [1]), (torch.ones(9), [-1])):
            with pytest.raises(ValueError, match="must") as caught:
                operator.call(x, factors)
            messages.add(str(caught.value))
        operator.call(torch.ones(9), [1])
    assert messages == {
        "x must be a vector of at most 9 numbers, got shape (3, 3)",
        "factors must not be negative, got [-1]",
    }
    assert len(operator.kept) == 1


def test_a_preparation_that_fails_keeps_nothing(operator):
    operator.failing = True
    for _ in range(2):
        with pytest.raises(MemoryError, match="no memory to prepare it"):
            operator.call(torch.ones(3), [2])
    assert not operator.kept
    operator.failing = False
    assert torch.equal(operator.call(torch.ones(3), [2]), torch.full((3,), 2.0))


def test_the_oldest_kind_leaves_when_there_are_too_many(operator):
    for i in range(MAX_KEPT + 100):
        operator.call(torch.ones(3), [i])
    assert len(operator.kept) == MAX_KEPT
    before = operator.preparations
    operator.call(torch.ones(3), [MAX_KEPT + 99])  # the newest, and the oldest that is left
    operator.call(torch.ones(3), [100])
    assert operator.preparations == before
    operator.call(torch.ones(3), [99])  # the youngest that had to go
    assert operator.preparations == before + 1
    assert len(operator.kept) == MAX_KEPT


@pytest.mark.slow
def test_memory_does_not_grow_with_the_kinds(operator):
    x = torch.ones(3)

    def more(first):
        for i in range(first, first + MAX_KEPT):
            operator.call(x, [i])
        gc.collect()

    more(0)
    tracemalloc.start()
    try:
        more(MAX_KEPT)  # those of the first round leave
        start = tracemalloc.get_traced_memory()[0]
        more(2 * MAX_KEPT)
        assert tracemalloc.get_traced_memory()[0] - start < 64 * 1024
    finally:
        tracemalloc.stop()


def test_threads_that_make_more_kinds_than_are_kept_at_once(operator):
    """Each finds its own, and none takes one away that has left already."""
    start = threading.Barrier(8)

    def work(thread):
        start.wait(30)
        for i in range(MAX_KEPT // 2):
            x = torch.full((1 + i % 9,), 1.0)
            assert operator.call(x, [1 + i, 1 + thread % 4]).eq((1 + i) * (1 + thread % 4)).all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(operator.kept) == MAX_KEPT


@NEEDS_FORK
@IGNORES_FORK_WARNING
def test_a_fork_while_another_thread_keeps_something(operator):
    """The child starts with nothing kept, and its lock is not the one that the other thread of the parent's holds."""
    x = torch.ones(3)
    operator.call(x, [2])
    lock = dict(zip((first := _first(operator)).__code__.co_freevars, first.__closure__, strict=True))["lock"]
    with lock.cell_contents:  # as the other thread would
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that waits forever ends as a failure
            left = len(operator.kept)
            right = operator.call(x, [2]).eq(2).all() and operator.call(x, [3]).eq(3).all()
            os._exit(0 if right and left == 0 and len(operator.kept) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(operator.kept) == 1


def _first(operator):
    call = operator.call
    return dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))["prepare_and_run"].cell_contents


def test_tensors_without_an_address_are_computed_and_not_kept(operator):
    class Later(torch.Tensor):
        def data_ptr(self):
            raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    x = torch.ones(3).as_subclass(Later)
    operator.prepare = None  # it asks for addresses
    sys.modules["pretended_backend.scale"].scale = operator.run
    for _ in range(2):
        assert operator.call(x, [2]).eq(2).all()
    assert operator.checks == 2
    assert not operator.kept


# The operators themselves.


def problems(name, size=4, offset=0):
    """Arguments of an operator, all tensors of which start ``offset`` numbers after an address that vectors take."""
    generator = torch.Generator().manual_seed(size)

    def made(*shape):
        memory = torch.randn(offset + int(np.prod(shape)), generator=generator)
        assert memory.data_ptr() % 16 == 0
        return memory[offset:].view(shape)

    if name == "carafe":
        return made(1, 4, 3, size), made(1, 9, 6, 2 * size), 3, 1, 2
    if name == "deform_conv2d":
        return made(1, 4, 3, size), made(1, 18, 3, size), made(4, 4, 3, 3), made(4), 1, 1, 1, made(1, 9, 3, size)
    if name == "multi_scale_deform_attn":
        value, locations, weights = made(1, 3 * size, 2, 8), made(1, 4, 2, 2, 2, 2), made(1, 4, 2, 2, 2)
        return value, [(2, size), (1, size)], locations / 4 + 0.5, weights
    return ((made(1, 1, 3, size) > 0),)


NAMES = ("carafe", "deform_conv2d", "multi_scale_deform_attn", "connected_components")
DIFFERENTIABLE = NAMES[:3]


def gradients(name, arguments, operator=None):
    """The result's, and then those of all tensors among the arguments."""
    leaves = [x.detach().requires_grad_() for x in arguments if isinstance(x, torch.Tensor)]
    inputs = iter(leaves)
    result = (operator or getattr(omniops, name))(
        *(next(inputs) if isinstance(x, torch.Tensor) else x for x in arguments)
    )
    grad = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device).view(result.shape)
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


def assert_close(found, expected):
    """To float32's share of the largest number."""
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= 1e-5 * other.abs().max()


def in_float64(arguments):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_views_at_odd_offsets_after_aligned_tensors_of_the_same_shape(name):
    for size in (4, 8):
        for offset in (0, 1, 2, 3, 0, 4):
            arguments = problems(name, size, offset)
            assert_close(gradients(name, arguments), gradients(name, in_float64(arguments)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_kinds_are_not_confused(name):
    """Layouts, negative and conjugate bits, parameters and subclasses, of one shape one after the other."""

    class Sub(torch.Tensor):
        pass

    contiguous = problems(name)
    looks = (
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
        lambda x: torch.complex(x, -x).conj().imag,  # its negative bit is set
        lambda x: x.mT.contiguous().mT if x.dim() == 4 else x,
        torch.nn.Parameter,
        lambda x: x.as_subclass(Sub),
        lambda x: torch._lazy_clone(x),
        lambda x: x[None].expand(2, *x.shape)[1],
    )
    expected = gradients(name, in_float64(contiguous))
    for _ in range(2):
        for i, look in enumerate(looks):
            inputs = [look(x) if isinstance(x, torch.Tensor) else x for x in contiguous]
            if i == 2:
                assert inputs[0].is_neg()
            assert_close(map(torch.Tensor, gradients(name, inputs)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_holds_no_tensor_when_it_is_over(name):
    died = []
    for _ in range(2):  # the first of a kind, and one for which something is kept
        arguments = problems(name, size=5)
        if name == "connected_components":
            results = omniops.connected_components(*arguments)
        else:
            results = gradients(name, arguments)
        died += [weakref.ref(x) for x in (*arguments, *results) if isinstance(x, torch.Tensor)]
        del arguments, results
    gc.collect()
    assert [x() for x in died] == [None] * len(died)


def arguments_of_kernels(name, device):
    """Of each kernel of an operator's file, made anew."""
    tensors = [x.to(device) if isinstance(x, torch.Tensor) else x for x in problems(name, size=8)]
    if name == "connected_components":
        return {name: (tensors[0], 8)}
    if name == "carafe":
        features, masks, *sizes = tensors
        return {
            "carafe": (features, masks, *sizes, 1),
            "carafe_backward": (masks.new_ones(1, 4, 6, 16), features, masks, 3, 8, *sizes, 1),
        }
    if name == "multi_scale_deform_attn":
        value, _, locations, weights = tensors
        others = [2, 8, 1, 8], locations.flatten(3, 4), weights.flatten(3, 4), [2, 2], False
        return {name: (value, *others), f"{name}_backward": (value.new_ones(1, 4, 16), value, *others, [True] * 3)}
    input, offset, weight, bias, _, _, _, mask = tensors
    numbers = [1, 1], [1, 1], [1, 1]
    return {
        "deform_conv2d": (input, offset, weight, bias, mask, *numbers),
        "deform_conv2d_backward": (torch.ones_like(input), input, offset, weight, mask, *numbers, [True] * 5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_what_is_prepared_holds_no_tensor(backend, name):
    """Triton's interpreter runs CUDA's where there is no GPU, once, as it takes long."""
    if backend == "cuda":
        pytest.importorskip("triton", reason="Triton is not installed")
    device = "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"
    module = import_module(f"omniops.backends.{backend}.{name}")
    for operator in arguments_of_kernels(name, device):
        kernel = getattr(module, operator)
        arguments = arguments_of_kernels(name, device)[operator]
        run = kernel.prepare(*arguments) if isinstance(kernel, prepared) else kernel
        results = _tuple(run(*arguments))
        expected = [x.tolist() for x in results]
        died = [weakref.ref(x) for x in (*arguments, *results) if isinstance(x, torch.Tensor)]
        del arguments, results
        gc.collect()
        assert [x() for x in died] == [None] * len(died)
        if backend == "cuda" != device:
            continue
        again = arguments_of_kernels(name, device)[operator]  # others of their kind
        for one, numbers in zip(_tuple(run(*again)), expected, strict=True):
            torch.testing.assert_close(one, torch.tensor(numbers, dtype=one.dtype, device=device))


def _tuple(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_raise_on_each_call_though_their_likes_passed(name):
    wrong = {
        "carafe": (lambda x: (*x[:2], 3, 1, 3), "masks must have shape"),
        "deform_conv2d": (lambda x: (*x[:4], 2, *x[5:]), "offset must have shape"),
        "multi_scale_deform_attn": (lambda x: (x[0], [(2, 4), (1, 3)], *x[2:]), "value must have the 11 pixels"),
        "connected_components": (lambda x: (x[0].expand(1, 2, -1, -1),), r"mask must have shape \(N, 1, H, W\)"),
    }
    change, message = wrong[name]
    arguments = problems(name)
    for _ in range(2):
        getattr(omniops, name)(*arguments)
        with pytest.raises(ValueError, match=message):
            getattr(omniops, name)(*change(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_over_thousands_of_shapes(name):
    """By more than the kinds that are kept take, which are full before it is measured."""
    operator = getattr(omniops, name)

    def called(first, last):
        for i in range(first, last):
            size = 100 + i
            if name == "carafe":
                operator(torch.ones(1, 1, 1, size), torch.ones(1, 1, 1, size), 1, 1, 1)
            elif name == "deform_conv2d":
                operator(torch.ones(1, 1, 1, size), torch.ones(1, 2, 1, size), torch.ones(1, 1, 1, 1))
            elif name == "multi_scale_deform_attn":
                points = torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
                operator(torch.ones(1, size, 1, 1), [(1, size)], *points)
            else:
                operator(torch.ones(1, 1, 1, size, dtype=torch.bool))
        gc.collect()

    tracemalloc.start()
    try:
        called(0, MAX_KEPT)
        full = tracemalloc.get_traced_memory()[0]
        called(MAX_KEPT, MAX_KEPT + 1000)
        assert tracemalloc.get_traced_memory()[0] < 1.1 * full
        assert full < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_calls_of_many_threads(name):
    """In a process of its own nothing would be imported; here nothing is kept, as no shape was there before."""
    work = [problems(name, size) for size in range(40, 48) for _ in range(4)]
    start = threading.Barrier(8)

    def forward_and_backward(arguments):
        start.wait(30)
        return gradients(name, arguments)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(forward_and_backward, work))
    for i, arguments in enumerate(work):
        for one, other in zip(found[i], gradients(name, arguments), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_number_of_threads_is_that_of_the_call(name, monkeypatch):
    """Not that of the first call of its kind: PyTorch is asked each time."""
    asked = []
    number = torch.get_num_threads
    arguments = problems(name, size=17)
    gradients(name, arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(number()) or asked[-1])
    before = number()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            asked.clear()
            gradients(name, arguments)
            assert len(asked) >= 2  # forward and backward
            assert set(asked) == {threads}
    finally:
        torch.set_num_threads(before)


def test_a_process_that_ends_says_nothing():
    """Not of objects of the compiled module, which must be gone before it is."""
    run = subprocess.run([sys.executable, "-c", """
import torch, omniops
x = torch.ones(1, 4, 4, 4)
omniops.deform_conv2d(x, torch.zeros(1, 18, 4, 4), torch.ones(2, 4, 3, 3), padding=1)
omniops.carafe(x, torch.ones(1, 9, 8, 8), 3, 1, 2)
omniops.connected_components(x[:, :1] > 0)
"""], capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@NEEDS_FORK
@IGNORES_FORK_WARNING
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_forked_child_computes_what_its_parent_does(name):
    """One thread, for PyTorch's own pool need not survive a fork; NumPy compares."""
    arguments = problems(name)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        operator = getattr(omniops, name)
        expected = operator(*arguments)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            results = [operator(*arguments).numpy() for _ in range(2)]
            os._exit(0 if all(np.array_equal(result, expected.numpy()) for result in results) else 1)
    finally:
        torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0
