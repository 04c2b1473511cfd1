"""Two processes give the gradients of one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from omniops.sam2.architectures import new
from omniops.sam2.training.steps import image_step

SIDE = 64


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = new("tiny", image_size=SIDE).train()

    def forward(self, images, targets):
        return image_step(self.model, images, targets, "box", 0).total


def batch():
    targets = torch.zeros(2, SIDE, SIDE)
    targets[0, 8:40, 8:40] = targets[1, 20:60, 16:48] = 1
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), targets


def gradients(step):
    return {name: parameter.grad for name, parameter in step.named_parameters() if parameter.grad is not None}


def run_process(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(Step(), find_unused_parameters=True)
    images, targets = batch()
    parallel(images[rank : rank + 1], targets[rank : rank + 1]).backward()
    if rank == 0:
        torch.save(gradients(parallel.module), path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "gradients.pt"
    context = mp.start_processes(run_process, (port, path), nprocs=2, join=False, start_method="fork")
    while not context.join():
        pass
    step = Step()
    step(*batch()).backward()
    expected, found = gradients(step), torch.load(path, weights_only=True)
    assert found.keys() >= expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name
