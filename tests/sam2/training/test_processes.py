"""Two processes give the gradients of one."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
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


def run_process(rank, store, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(Step(), find_unused_parameters=True)
    images, targets = batch()
    parallel(images[rank : rank + 1], targets[rank : rank + 1]).backward()
    if rank == 0:
        torch.save(gradients(parallel.module), path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed")
def test_two_processes_give_the_gradients_of_one(tmp_path):
    path = tmp_path / "gradients.pt"
    command = [sys.executable, __file__]  # not forked: threads of PyTorch that ran before would be missing there
    processes = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "store", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    step = Step()
    step(*batch()).backward()
    expected, found = gradients(step), torch.load(path, weights_only=True)
    assert found.keys() >= expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


if __name__ == "__main__":
    run_process(int(sys.argv[1]), *sys.argv[2:])
