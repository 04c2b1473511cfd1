"""The operators and what stands between a call and a kernel: modes, subclasses, transforms, compilers, counters."""

import copy
from typing import ClassVar

import pytest
import torch
from differentiable import NODES, assert_close, assert_same
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


def names_of(problem):
    return [f"omniops.{problem.name}.default", f"omniops.{problem.name}_backward.default"]


def ours(names):
    return [name for name in map(str, names) if name.startswith("omniops.")]


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


class RecordedFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Recorded, RecordedFunctions])
def test_a_mode_sees_each_operator_once(problem, device, mode):
    """Also for calls of a kind that is kept. Of functions none is called by a backward, but for the whole of it."""
    moved = problem.to(device)
    expected = moved.gradients()
    names = names_of(problem)[: 2 if mode is Recorded else 1]
    for _ in range(2):
        with mode() as recorded:
            found = moved.gradients()
        assert ours(recorded.functions) == names
        assert_same(found, expected)
    with mode() as recorded, torch.no_grad():
        moved.function(*moved.tensors)
    assert ours(recorded.functions) == names_of(problem)[:1]


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

    functions: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.functions.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_that_sees_functions(problem, device):
    moved = problem.to(device)
    expected = moved.gradients()
    for i in range(len(moved.tensors)):
        tensors = list(moved.tensors)
        tensors[i] = tensors[i].detach().as_subclass(Named).requires_grad_()
        for _ in range(2):
            Named.functions.clear()
            result = moved.function(*tensors)
            assert type(result) is Named
            assert ours(Named.functions) == names_of(problem)[:1]
            found = torch.autograd.grad(result, tensors, moved.grad)
            assert_same(found, expected[1:])


class Wrapper(torch.Tensor):
    """A subclass that holds another tensor and sees the operators below autograd."""

    functions: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.functions.append(function)
        args, kwargs = tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, function(*args, **kwargs))


def test_a_subclass_that_sees_operators(problem, device):
    """It has no memory of its own: whatever looked for some would fail, or take what it finds for the tensor."""
    moved = problem.to(device)
    expected = moved.gradients()
    for i in range(len(moved.tensors)):
        tensors = list(moved.tensors)
        tensors[i] = Wrapper(tensors[i].detach()).requires_grad_()
        for _ in range(2):
            Wrapper.functions.clear()
            result = moved.function(*tensors)
            assert type(result) is Wrapper
            found = torch.autograd.grad(result, tensors, moved.grad)
            is_bias = problem.name == "deform_conv2d" and i == 3  # which the backward operator does not get
            assert ours(Wrapper.functions) == names_of(problem)[: 1 if is_bias else 2]
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


def test_transforms_of_functions(problem):
    """Of functions that are not differentiated: test_transforms.py has those that are."""
    wide = problem.to(torch.float64)
    tensors = [x.detach() for x in wide.tensors]
    expected = wide.function(*tensors)
    assert torch.equal(torch.func.functionalize(wide.function)(*tensors), expected)
    changed = torch.func.functionalize(lambda *inputs: wide.function(*inputs).relu_().add_(1))(*tensors)
    assert torch.equal(changed, expected.relu() + 1)
    stacked = [torch.stack((x, x.sin())) for x in tensors]
    for kept in range(len(tensors)):  # one of them for both
        in_dims = [None if i == kept else 0 for i in range(len(tensors))]
        inputs = [x if dim is None else many for x, many, dim in zip(tensors, stacked, in_dims, strict=True)]
        found = torch.vmap(wide.function, tuple(in_dims))(*inputs)
        for n in range(2):
            one = wide.function(*(x if dim is None else x[n] for x, dim in zip(inputs, in_dims, strict=True)))
            assert torch.equal(found[n], one)
    # A gradient through vmap, for what it runs is an operator as any other.
    leaves = [x.requires_grad_() for x in stacked]
    torch.vmap(wide.function)(*leaves).backward(torch.stack((wide.grad, wide.grad)))
    for x, by in zip(leaves, wide.gradients()[1:], strict=True):
        torch.testing.assert_close(x.grad[0], by)


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

    def gradients(grad, *inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(problem.function(*leaves), leaves, grad)

    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(gradients, tracing_mode=mode)(problem.grad, *tensors)
        assert ours(node.target for node in traced.graph.nodes) == names_of(problem)
        assert all(map(torch.equal, traced(problem.grad, *tensors), problem.gradients()[1:]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_operator_and_trains(problem, strict):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return problem.function(*tensors).sin()

    inputs = tuple(x.detach() for x in problem.tensors)
    batch = torch.export.Dim("batch", min=1, max=8)
    without_batch = (2, 3) if problem.name == "deform_conv2d" else ()  # weight and bias
    batched = [i not in without_batch for i in range(len(inputs))]
    dynamic = {"tensors": tuple({0: batch} if of_batch else None for of_batch in batched)}
    program = torch.export.export(Module(), inputs, dynamic_shapes=dynamic, strict=strict)
    for exported in (program, program.run_decompositions()):
        assert ours(node.target for node in exported.graph.nodes) == names_of(problem)[:1]
    more = [torch.cat((x, x[:1])) if of_batch else x for x, of_batch in zip(inputs, batched, strict=True)]
    assert torch.equal(program.module()(*more), Module()(*more))
    found = problem.gradients(program.module())
    assert all(map(torch.equal, found, problem.gradients(Module())))


def test_a_compiled_graph_is_one_with_dynamic_sizes(problem, device):
    """By the compiler's front half, which traces both ways; inductor has tests of its own."""
    targets = []

    def backend(graph, inputs):
        def keep(traced, _):
            targets.extend(node.target for node in traced.graph.nodes)
            return make_boxed_func(traced.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def function(*tensors):
        return problem.function(*(2 * x for x in tensors)).sin()

    torch.compiler.reset()  # which counts the graphs of this function on other devices
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 1, 2):
        moved = problem.to(device)
        moved.grad = moved.grad[:batch]
        moved.tensors = [(x[:batch] if len(x) == 2 else x).detach().requires_grad_() for x in moved.tensors]
        assert_close(moved.gradients(compiled), moved.gradients(function))
    assert ours(targets) == names_of(problem) * (ours(targets).count(names_of(problem)[0]))


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
            inputs = [y.detach() for y in problem.tensors]
            inputs[i] = x
            torch.autograd.grad(problem.function(*inputs), x, problem.grad)
        of_bias = x.dim() == 1
        assert counter.get_total_flops() == problem.flops + (0 if of_bias else problem.flops)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        problem.to("meta").gradients()
    assert counter.get_total_flops() == 3 * problem.flops


class Upsampled(torch.nn.Module):
    """A module in which two others call operators."""

    def __init__(self):
        super().__init__()
        self.up = omniops.CARAFEPack(4, 2)
        self.convolution = omniops.ModulatedDeformConv2d(4, 3, 3, padding=1)

    def forward(self, x):
        return self.convolution(self.up(x))


OF_UPSAMPLED = {"carafe": 2 * (10 * 12) * 4 * 25, "deform_conv2d": 2 * (10 * 12) * 4 * 3 * 9}
"""For one map of 5 x 6."""


def counts_of(counter, module):
    """Of our operators alone."""
    counts = {str(packet): number for packet, number in counter.get_flop_counts()[module].items()}
    return {packet.removeprefix("omniops."): number for packet, number in counts.items() if "omniops." in packet}


def test_floating_point_operations_are_counted_by_module():
    module, x = Upsampled(), torch.randn(2, 4, 5, 6)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    expected = {name: 2 * number for name, number in OF_UPSAMPLED.items()}
    carafe, convolution = expected["carafe"], expected["deform_conv2d"]
    # The map asks for no gradient: of CARAFE's two the masks alone have one.
    assert counts_of(counter, "Upsampled.up") == {"carafe": carafe, "carafe_backward": carafe}
    assert counts_of(counter, "Upsampled.convolution") == {
        "deform_conv2d": convolution,
        "deform_conv2d_backward": 2 * convolution,
    }
    total = counts_of(counter, "Global")
    assert total == counts_of(counter, "Upsampled")
    assert sum(total.values()) == 2 * carafe + 3 * convolution
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    assert counts_of(counter, "Upsampled") == expected


def test_floating_point_operations_under_vmap_are_those_of_all_slices(problem):
    tensors = [torch.stack([x, x, x]) for x in problem.tensors]
    with FlopCounterMode(display=False) as counter:
        torch.vmap(problem.function)(*tensors)
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
    problem.gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        problem.gradients()
    events = {event.key: event for event in profiler.key_averages(group_by_input_shape=True)}
    forward, backward = events[f"omniops::{problem.name}"], events[f"omniops::{problem.name}_backward"]
    assert forward.input_shapes[0] == list(problem.tensors[0].shape)
    assert backward.input_shapes[0] == list(problem.grad.shape)
    assert NODES[problem.name] in events
    assert any(key.endswith(f"evaluate_function: {NODES[problem.name]}") for key in events)


def test_the_profiler_has_the_names_where_no_graph_is_asked_for(problem):
    """The call goes past autograd there, on to the kernel."""
    for context in (torch.no_grad, torch.inference_mode):
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler,
            context(),
        ):
            problem.function(*problem.tensors)
        (event,) = [event for event in profiler.events() if event.name.startswith("omniops::")]
        assert event.name == f"omniops::{problem.name}"
        assert event.input_shapes[0] == list(problem.tensors[0].shape)
        assert event.cpu_children  # what the kernel does is below it


def test_the_profiler_has_the_names_of_what_has_no_derivative():
    masks = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        omniops.connected_components(masks)
    assert "omniops::connected_components" in [event.name for event in profiler.events()]
