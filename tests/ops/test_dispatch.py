"""The operators and what stands between a call and a kernel: modes, subclasses, transforms, compilers, counters."""

import copy
from typing import ClassVar

import pytest
import torch
from differentiable import assert_close, assert_same
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import omniops

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
OF_VMAP = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def names_of(problem):
    return [f"omniops.{problem.name}.default", f"omniops.{problem.name}_backward.default"]


def ours(names):
    return [name for name in map(str, names) if name.startswith("omniops.")]


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class RecordedFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Recorded, RecordedFunctions])
def test_a_mode_sees_each_operator_once(problem, device, mode):
    """Also for calls of a kind that is kept. Of functions none is called by a backward, but for the whole of it."""
    there = problem.to(device)
    expected = there.gradients()
    names = names_of(problem)[: 2 if mode is Recorded else 1]
    for _ in range(2):
        with mode() as recorded:
            found = there.gradients()
        assert ours(recorded.seen) == names
        assert_same(found, expected)
    with mode() as recorded, torch.no_grad():
        there.function(*there.tensors)
    assert ours(recorded.seen) == names_of(problem)[:1]


def test_a_mode_may_answer_itself(problem):
    """What it returns is the result, and what it is given is no kernel's business: shapes that none would take."""

    class Answer(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if ours([function]):
                return torch.full((1,), 7.0)
            return function(*args, **(kwargs or {}))

    problem.gradients()
    with Answer(), torch.no_grad():
        assert problem.function(*problem.tensors).tolist() == [7.0]
        assert problem.function(*(x[:0] for x in problem.tensors)).tolist() == [7.0]


class Named(torch.Tensor):
    """A subclass that sees functions."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_that_sees_functions(problem, device):
    there = problem.to(device)
    expected = there.gradients()
    for i in range(len(there.tensors)):
        given = list(there.tensors)
        given[i] = given[i].detach().as_subclass(Named).requires_grad_()
        for _ in range(2):
            Named.seen.clear()
            result = there.function(*given)
            assert type(result) is Named
            assert ours(Named.seen) == names_of(problem)[:1]
            found = torch.autograd.grad(result, given, there.grad)
            assert_same(found, expected[1:])


class Wrapper(torch.Tensor):
    """A subclass that holds another tensor and sees the operators below autograd."""

    seen: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        args, kwargs = tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, function(*args, **kwargs))


def test_a_subclass_that_sees_operators(problem, device):
    """It has no memory of its own: whatever looked for some would fail, or take what it finds for the tensor."""
    there = problem.to(device)
    expected = there.gradients()
    for i in range(len(there.tensors)):
        given = list(there.tensors)
        given[i] = Wrapper(given[i].detach()).requires_grad_()
        for _ in range(2):
            Wrapper.seen.clear()
            result = there.function(*given)
            assert type(result) is Wrapper
            found = torch.autograd.grad(result, given, there.grad)
            # The backward operator gets all but the bias.
            assert ours(Wrapper.seen) == names_of(problem)[: 2 if given[i].dim() == 4 else 1]
            found = [x.inner if isinstance(x, Wrapper) else x for x in found]
            assert_same(found, expected[1:])


@LAYOUTS
def test_fake_tensors_are_what_real_ones_would_be(problem, device, layout):
    real = problem.to(device).to(memory_format=layout)
    with FakeTensorMode() as mode:
        fake = copy.copy(real)
        fake.tensors = [mode.from_tensor(x) for x in real.tensors]
        fake.grad = mode.from_tensor(real.grad)
        found = fake.gradients()
    for one, other in zip(found, real.gradients(), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.stride() == other.stride()


@OF_VMAP
def test_transforms_of_functions(problem):
    """vmap runs a slice after the other; what would differentiate raises, as forward mode does."""
    wide = problem.to(torch.float64)
    tensors = [x.detach() for x in wide.tensors]
    expected = wide.function(*tensors)
    assert torch.equal(torch.func.functionalize(wide.function)(*tensors), expected)
    changed = torch.func.functionalize(lambda *given: wide.function(*given).relu_().add_(1))(*tensors)
    assert torch.equal(changed, expected.relu() + 1)
    stacked = [torch.stack((x, x.sin())) for x in tensors]
    for kept in range(len(tensors)):  # one of them for both
        in_dims = [None if i == kept else 0 for i in range(len(tensors))]
        given = [x if dim is None else many for x, many, dim in zip(tensors, stacked, in_dims, strict=True)]
        found = torch.vmap(wide.function, tuple(in_dims))(*given)
        for n in range(2):
            one = wide.function(*(x if dim is None else x[n] for x, dim in zip(given, in_dims, strict=True)))
            assert torch.equal(found[n], one)
    # A gradient through vmap, for what it runs is an operator as any other.
    leaves = [x.requires_grad_() for x in stacked]
    torch.vmap(wide.function)(*leaves).backward(torch.stack((wide.grad, wide.grad)))
    for x, by in zip(leaves, wide.gradients()[1:], strict=True):
        torch.testing.assert_close(x.grad[0], by)


@OF_VMAP
def test_transforms_that_differentiate_say_what_to_use(problem):
    loss = lambda *tensors: problem.function(*tensors).sum()  # noqa: E731
    message = f"omniops::{problem.name} has no derivative for the transforms of torch.func .*: use torch.autograd.grad"
    tensors = [x.detach() for x in problem.tensors]
    for transform in (
        torch.func.grad(loss),
        torch.func.jacrev(problem.function),
        lambda *given: torch.func.vjp(problem.function, *given),
        torch.func.grad(lambda *given: torch.vmap(loss)(*(x[None] for x in given)).sum()),
        torch.func.functionalize(torch.func.grad(loss)),
    ):
        with pytest.raises(NotImplementedError, match=message):
            transform(*tensors)
    assert torch.equal(problem.function(*tensors), problem.gradients()[0])


def test_modules_are_called_with_other_parameters():
    for module in (omniops.CARAFEPack(4, 2), omniops.ModulatedDeformConv2d(4, 3, 3, padding=1)):
        x = torch.randn(1, 4, 5, 6)
        others = {name: torch.randn_like(value).requires_grad_() for name, value in module.named_parameters()}
        found = torch.func.functional_call(module, others, x)
        gradients = torch.autograd.grad(found.sum(), list(others.values()))
        module.load_state_dict(others, strict=False)
        expected = module(x)
        assert torch.equal(found, expected)
        for one, other in zip(gradients, torch.autograd.grad(expected.sum(), list(module.parameters())), strict=True):
            assert torch.equal(one, other)


def test_a_traced_graph_has_both_operators(problem):
    tensors = [x.detach() for x in problem.tensors]

    def both_ways(grad, *given):
        leaves = [x.detach().requires_grad_() for x in given]
        return torch.autograd.grad(problem.function(*leaves), leaves, grad)

    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(both_ways, tracing_mode=mode)(problem.grad, *tensors)
        assert ours(node.target for node in traced.graph.nodes) == names_of(problem)
        assert all(map(torch.equal, traced(problem.grad, *tensors), problem.gradients()[1:]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_operator_and_trains(problem, strict):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return problem.function(*tensors).sin()

    given = tuple(x.detach() for x in problem.tensors)
    batch = torch.export.Dim("batch", min=1, max=8)
    whole = [x.dim() == 4 and i != (2 if problem.name == "deform_conv2d" else None) for i, x in enumerate(given)]
    dynamic = {"tensors": tuple({0: batch} if of_batch else None for of_batch in whole)}
    program = torch.export.export(Module(), given, dynamic_shapes=dynamic, strict=strict)
    for exported in (program, program.run_decompositions()):
        assert ours(node.target for node in exported.graph.nodes) == names_of(problem)[:1]
    more = [torch.cat((x, x[:1])) if of_batch else x for x, of_batch in zip(given, whole, strict=True)]
    assert torch.equal(program.module()(*more), Module()(*more))
    found = problem.gradients(program.module())
    assert all(map(torch.equal, found, problem.gradients(Module())))


def test_a_compiled_graph_is_one_with_dynamic_sizes(problem, device):
    """By the compiler's front half, which traces both ways; inductor has tests of its own."""
    seen = []

    def backend(graph, inputs):
        def keep(traced, _):
            seen.extend(node.target for node in traced.graph.nodes)
            return make_boxed_func(traced.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def function(*tensors):
        return problem.function(*(2 * x for x in tensors)).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 1, 2):
        there = problem.to(device)
        there.grad = there.grad[:batch]
        there.tensors = [
            (x[:batch] if x.dim() == 4 and len(x) == 2 else x).detach().requires_grad_() for x in there.tensors
        ]
        assert_close(there.gradients(compiled), there.gradients(function))
    assert ours(seen) == names_of(problem) * (ours(seen).count(names_of(problem)[0]))


def test_a_backward_that_is_compiled_when_it_runs(problem):
    expected = problem.gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        for _ in range(2):
            problem.function(*problem.tensors).backward(problem.grad)
    assert_close((x.grad for x in problem.tensors), (2 * x for x in expected[1:]))


def test_floating_point_operations_are_counted(problem):
    with FlopCounterMode(display=False) as counter:
        problem.gradients()
    counted = {str(packet): number for packet, number in counter.get_flop_counts()["Global"].items()}
    assert counted == {f"omniops.{problem.name}": problem.flops, f"omniops.{problem.name}_backward": 2 * problem.flops}
    for i, x in enumerate(problem.tensors):
        with FlopCounterMode(display=False) as counter:
            given = [y.detach() for y in problem.tensors]
            given[i] = x
            torch.autograd.grad(problem.function(*given), x, problem.grad)
        of_bias = x.dim() == 1
        assert counter.get_total_flops() == problem.flops + (0 if of_bias else problem.flops)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        problem.to("meta").gradients()
    assert counter.get_total_flops() == 3 * problem.flops


def test_a_convolution_counts_as_pytorchs():
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(6, 4, 3, 2)
    offset, mask = torch.randn(2, 12, 3, 3), torch.rand(2, 6, 3, 3)
    counts = []
    for function in (
        lambda x, w: torch.nn.functional.conv2d(x, w, None, (1, 2), 0, 1),
        lambda x, w: omniops.deform_conv2d(x, offset.requires_grad_(), w, None, (1, 2), 0, 1, mask.requires_grad_()),
    ):
        with FlopCounterMode(display=False) as counter:
            function(x.requires_grad_(), weight.requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with FlopCounterMode(display=False) as counter:
        omniops.connected_components(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert counter.get_total_flops() == 0


def test_the_profiler_has_the_operators_names(problem):
    nodes = {"carafe": "CARAFEFunctionBackward", "deform_conv2d": "DeformConv2dFunctionBackward"}
    problem.gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        problem.gradients()
    events = {event.key: event for event in profiler.key_averages(group_by_input_shape=True)}
    forward, backward = events[f"omniops::{problem.name}"], events[f"omniops::{problem.name}_backward"]
    assert forward.input_shapes[0] == list(problem.tensors[0].shape)
    assert backward.input_shapes[0] == list(problem.grad.shape)
    assert nodes[problem.name] in events
    assert any(key.endswith(f"evaluate_function: {nodes[problem.name]}") for key in events)
