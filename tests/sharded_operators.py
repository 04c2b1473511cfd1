"""The operators on DTensors, for test_dtensor.py: in one process, or as one of several that it starts."""

import sys

import torch
from differentiable import PROBLEMS, assert_close
from operator_calls import OperatorCalls
from torch import distributed

import omniops

assert "torch.distributed.tensor" not in sys.modules or __name__ != "__main__", "omniops imports DTensor"

from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)

SHARED = {"deform_conv2d": (2, 3)}
"""The positions of weight and bias."""


def check(rank: int, world_size: int, store: str, device: str) -> None:
    """Of the whole batch each process computes a part, once, and all parts are what one process computes."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    group = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(group, init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh(device, (world_size,))
        for make in PROBLEMS:
            check_gradients(make().to(device), mesh)
            check_gradients(of_one_image(make().to(device)), mesh, sharded=world_size == 1)
            check_other_placements(make().to(device), mesh)
        check_second_derivatives(mesh)
        check_components(mesh)
        check_training(mesh)
    finally:
        distributed.destroy_process_group()


def of_one_image(problem):
    """Of fewer images than processes."""
    shared = SHARED.get(problem.name, ())
    problem.tensors = [x if i in shared else x.detach()[:1].requires_grad_() for i, x in enumerate(problem.tensors)]
    problem.grad = problem.grad[:1]
    return problem


def leaves_of(problem, mesh):
    shared = SHARED.get(problem.name, ())
    placements = [Replicate() if i in shared else Shard(0) for i in range(len(problem.tensors))]
    return [
        distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
        for x, placement in zip(problem.tensors, placements, strict=True)
    ]


def check_gradients(problem, mesh, sharded=True):
    """By each tensor, by all others and by all: the calls of the backward differ in a list alone."""
    expected, *gradients = problem.gradients()
    leaves, grad = leaves_of(problem, mesh), distribute_tensor(problem.grad, mesh, [Shard(0)])
    count, shared = len(leaves), SHARED.get(problem.name, ())
    for wanted in (*([i] for i in range(count)), *(set(range(count)) - {i} for i in range(count)), range(count)):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in wanted)
        result = problem.function(*leaves)
        found = torch.autograd.grad(result, [leaves[i] for i in wanted], grad)
        assert_close([result.full_tensor()], [expected])
        assert_close((x.full_tensor() for x in found), (gradients[i] for i in wanted))
        if sharded:
            assert result.placements == (Shard(0),)
            assert [x.placements for x in found] == [(Partial() if i in shared else Shard(0),) for i in wanted]


def check_other_placements(problem, mesh):
    """What is sharded otherwise is sharded anew, what is replicated is computed everywhere."""
    expected = problem.function(*problem.tensors).detach()
    for placement in (Shard(1), Replicate()):
        tensors = [
            distribute_tensor(x.detach(), mesh, [placement if x.dim() > 1 else Replicate()]) for x in problem.tensors
        ]
        with OperatorCalls() as calls:
            result = problem.function(*tensors)
        assert_close([result.full_tensor()], [expected])
        assert set(calls.names) == {problem.name}


def check_second_derivatives(mesh):
    """Of CARAFE, whose derivatives are operators of any order."""
    problem = PROBLEMS[0]().to(mesh.device_type)
    leaves = leaves_of(problem, mesh)

    def second(tensors):
        first = torch.autograd.grad(problem.function(*tensors).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.sin().sum() for x in first), tensors)

    assert_close((x.full_tensor() for x in second(leaves)), second(problem.tensors))


def check_components(mesh):
    masks = torch.rand(3, 1, 6, 7, generator=torch.Generator().manual_seed(0)).to(mesh.device_type) > 0.5
    found = omniops.connected_components(distribute_tensor(masks, mesh, [Shard(0)]))
    for one, other in zip(found, omniops.connected_components(masks), strict=True):
        assert one.placements == (Shard(0),)
        assert torch.equal(one.full_tensor(), other)
    logits = masks[:, 0] * 2.0 - 1
    found = omniops.fill_holes(distribute_tensor(logits, mesh, [Shard(0)]), 2)
    assert torch.equal(found.full_tensor(), omniops.fill_holes(logits, 2))


def check_training(mesh):
    """A module whose parameters every process has: their gradients are sums over the batch."""
    torch.manual_seed(0)
    module = omniops.DeformConv2d(4, 3, 3, padding=1).to(mesh.device_type)
    tensors = [torch.randn(shape).to(mesh.device_type) for shape in ((4, 4, 5, 6), (4, 18, 5, 6))]
    module(*tensors).sin().sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    replicated = distribute_module(module, mesh)
    replicated(*(distribute_tensor(x, mesh, [Shard(0)]) for x in tensors)).sin().sum().backward()
    found = [parameter.grad for parameter in replicated.parameters()]
    assert all(isinstance(x, DTensor) for x in found)
    assert_close((x.full_tensor() for x in found), expected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
