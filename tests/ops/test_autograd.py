"""The derivatives where autograd is used in other ways than for one backward."""

import gc
import itertools
import weakref

import pytest
import torch
from differentiable import NODES, assert_close, assert_same
from torch.utils.checkpoint import checkpoint

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def subsets(length):
    """All but the empty one, as tuples of bools."""
    return [chosen for chosen in itertools.product((False, True), repeat=length) if any(chosen)]


def chosen_of(values, chosen):
    return [value for value, wanted in zip(values, chosen, strict=True) if wanted]


def test_a_gradient_for_each_subset_of_tensors(problem, device):
    expected = problem.expected()[1:]
    moved = problem.to(device)
    for chosen in subsets(len(moved.tensors)):
        leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(moved.tensors, chosen, strict=True)]
        moved.function(*leaves).backward(moved.grad)
        assert [x.grad is not None for x in leaves] == list(chosen)
        assert_close((x.grad for x in chosen_of(leaves, chosen)), chosen_of(expected, chosen))


def second_derivatives(problem, function, wanted, cotangents):
    """Of those first derivatives that have a cotangent, by the tensors and the cotangent of the result."""
    leaves = [x.detach().requires_grad_(want) for x, want in zip((*problem.tensors, problem.grad), wanted, strict=True)]
    *tensors, grad = leaves
    first = torch.autograd.grad(function(*tensors), chosen_of(tensors, wanted[:-1]), grad, create_graph=True)
    taken = [x.sin().sum() for x in chosen_of(first, cotangents) if x.requires_grad]
    if not taken:
        return [None] * sum(wanted)
    return torch.autograd.grad(sum(taken), chosen_of(leaves, wanted), allow_unused=True)


def test_second_derivatives_of_each_subset_of_the_first(problem):
    """Of one alone and of all, by one, by two and by all of the tensors and the result's cotangent, as the oracle's."""
    wide = problem.to(torch.float64)
    compared = 0
    for wanted in subsets(len(wide.tensors) + 1):
        if 2 < sum(wanted) < len(wanted):
            continue
        for cotangents in subsets(sum(wanted[:-1])):
            if 1 < sum(cotangents) < len(cotangents):
                continue
            found = second_derivatives(wide, wide.function, wanted, cotangents)
            expected = second_derivatives(wide, wide.oracle, wanted, cotangents)
            for one, other in zip(found, expected, strict=True):
                # What does not depend is None, or zeros where an operator of PyTorch's gave it.
                if one is None or other is None:
                    assert not any(x.any() for x in (one, other) if x is not None)
                else:
                    torch.testing.assert_close(one, other)
                    compared += 1
    assert compared > 10


@LAYOUTS
def test_a_result_is_changed_in_place(problem, device, layout):
    """No result is a view, nor one of the tensors that are saved."""
    moved = problem.to(device).to(memory_format=layout)
    for in_place, out_of_place in (
        (lambda x: x.relu_(), lambda x: x.relu()),
        (lambda x: x.add_(1).mul_(x.detach().cos()), lambda x: (x + 1).mul((x + 1).detach().cos())),
        (lambda x: x[:, 1:].neg_().sum() + x, lambda x: (y := torch.cat((x[:, :1], -x[:, 1:]), 1)) + y[:, 1:].sum()),
    ):
        found = moved.gradients(lambda *tensors, change=in_place: change(moved.function(*tensors)))
        expected = moved.gradients(lambda *tensors, change=out_of_place: change(moved.function(*tensors)))
        assert_close(found, expected)
    with torch.no_grad():
        assert not moved.function(*moved.tensors)._is_view()


@LAYOUTS
def test_gradients_are_changed_in_place(problem, device, layout):
    """Also where they are differentiable, and one after the other: none is a view of another."""
    moved = problem.to(device).to(memory_format=layout)
    for create_graph in (False, True):
        gradients = torch.autograd.grad(
            moved.function(*moved.tensors), moved.tensors, moved.grad, create_graph=create_graph
        )
        expected = [x.detach() + 1 for x in gradients]
        for x in gradients:
            x.add_(1)
        assert_close(gradients, expected)


def test_a_saved_tensor_that_was_changed_is_an_error(problem):
    result = problem.function(*problem.tensors)
    with torch.no_grad():
        problem.tensors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward(problem.grad)


def test_nodes_have_the_operators_name_and_take_hooks(problem):
    result = problem.function(*problem.tensors)
    assert result.grad_fn.name() == NODES[problem.name]
    _, *expected = problem.gradients()
    called = []
    result.register_hook(lambda grad: called.append("result") or 2 * grad)
    result.grad_fn.register_prehook(lambda grads: called.append("before"))
    result.grad_fn.register_hook(lambda by, grads: called.append("after"))
    problem.tensors[1].register_hook(lambda grad: called.append("tensor") or 3 * grad)
    problem.tensors[0].register_post_accumulate_grad_hook(lambda x: called.append("accumulated"))
    result.backward(problem.grad)
    assert sorted(called) == ["accumulated", "after", "before", "result", "tensor"]
    factors = [6 if i == 1 else 2 for i in range(len(expected))]
    assert_close((x.grad for x in problem.tensors), (k * x for k, x in zip(factors, expected, strict=True)))
    again = torch.autograd.grad(
        problem.function(*problem.tensors), problem.tensors[0], problem.grad, create_graph=True
    )[0]
    assert again.grad_fn.name() == NODES[problem.name].replace("Function", "BackwardFunction")


def test_a_graph_that_is_retained_and_one_that_is_not(problem):
    result = problem.function(*problem.tensors)
    first = torch.autograd.grad(result, problem.tensors, problem.grad, retain_graph=True)
    second = torch.autograd.grad(result, problem.tensors, problem.grad)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(result, problem.tensors, problem.grad)


def test_a_graph_holds_no_tensor_when_it_is_gone(problem):
    result = problem.function(*problem.tensors)
    gradients = torch.autograd.grad(result, problem.tensors, problem.grad, create_graph=True)
    gradients[0].sin().sum().backward(retain_graph=True)
    died = [weakref.ref(x) for x in (result, *gradients, *problem.tensors)]
    problem.tensors.clear()
    del result, gradients
    gc.collect()
    assert [x() for x in died] == [None] * len(died)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning", "ignore:Error detected in:UserWarning")
def test_anomaly_mode_names_the_operator(problem):
    with torch.autograd.detect_anomaly():
        problem.gradients()
        problem.grad.view(-1)[0] = torch.nan
        with pytest.raises(RuntimeError, match=f"'{NODES[problem.name]}' returned nan values"):
            problem.gradients()


def test_without_gradients_there_is_no_graph(problem, device):
    moved = problem.to(device)
    expected = moved.gradients()[0]
    with torch.no_grad():
        assert not moved.function(*moved.tensors).requires_grad
    with torch.inference_mode():
        result = moved.function(*moved.tensors)
        inferred = [x + 0 for x in moved.tensors]
    assert result.is_inference()
    assert torch.equal(result, expected)
    assert torch.equal(moved.function(*inferred), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        moved.function(*inferred[:-1], moved.tensors[-1])


def test_saved_tensors_go_through_hooks(problem, device):
    moved = problem.to(device)
    expected = moved.gradients()
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or x.detach().cpu(), lambda x: unpacked.append(x) or x.to(device)
    ):
        result = moved.function(*moved.tensors)
        # The bias is not needed again.
        needed = [x for x in moved.tensors if x.dim() > 1]
        assert {x.data_ptr() for x in packed} == {x.data_ptr() for x in needed}
        assert not unpacked
        found = torch.autograd.grad(result, moved.tensors, moved.grad)
    assert len(unpacked) == len(packed) == len(needed)
    assert_same(found, expected[1:])
    with torch.autograd.graph.save_on_cpu():
        assert_same(moved.gradients(), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_computes_it_again(problem, device, use_reentrant):
    moved = problem.to(device)
    calls = []

    def function(*tensors):
        calls.append(torch.is_grad_enabled())
        return moved.function(*(2 * x for x in tensors)).sin()

    def checkpointed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=use_reentrant)

    expected = moved.gradients(function)
    calls.clear()
    if use_reentrant:  # which torch.autograd.grad does not go with
        result = checkpointed(*moved.tensors)
        result.backward(moved.grad)
        found = [result.detach(), *(x.grad for x in moved.tensors)]
    else:
        found = moved.gradients(checkpointed)
    assert len(calls) == 2
    assert_same(found, expected)


def test_in_deterministic_mode(problem, device):
    """The same bits twice, with memory that is filled before it is used."""
    moved = problem.to(device)
    expected = moved.gradients()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = moved.gradients(), moved.gradients()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(map(torch.equal, first, second))
    assert_close(first, expected)


@pytest.mark.filterwarnings("error:There is a performance drop:UserWarning")
def test_a_jacobian_by_a_batch_of_gradients(problem):
    """PyTorch runs the backward operators for all of them at once."""
    wide = problem.to(torch.float64)
    result = wide.function(*wide.tensors)
    batch = torch.stack((wide.grad, wide.grad.sin()))
    found = torch.autograd.grad(result, wide.tensors, batch, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(result, wide.tensors, grad, retain_graph=True) for grad in batch]
    for one, others in zip(found, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others))
