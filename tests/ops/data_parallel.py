"""One of two processes that train both operators with DistributedDataParallel: test_processes.py starts them."""

import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import omniops


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(omniops.CARAFEPack(4, 2), omniops.ModulatedDeformConv2d(4, 3, 3, padding=1))


def batch(rank):
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(rank))


def gradients(module, x):
    module(x).sin().sum().backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    return found


def train(rank, store):
    """Two steps in each way; the gradients must be the mean over both batches."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    expected = [sum(pair) / 2 for pair in zip(*(gradients(model(), batch(i)) for i in range(2)), strict=True)]
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True, "static_graph": True}):
        parallel = DistributedDataParallel(model(), **options)
        for _ in range(2):
            found = gradients(parallel, batch(rank))
            assert any(x.any() for x in found)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(int(sys.argv[1]), sys.argv[2])
