"""Two processes that train together give the weights of one with the whole batch."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from omniops.sam2.architectures import new
from omniops.sam2.checkpoints import load
from omniops.sam2.training import clip_step, fully_shard_step, image_step, save_checkpoint

SIDE = 64


class Step(nn.Module):
    """Of pictures and of clips, whose frames use the same weights again and again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = new("tiny", image_size=SIDE).train()

    def forward(self, images, targets, clips):
        losses = [image_step(self.model, images, targets, "box", num_correction_pt_per_frame=0)]
        for frames, masks in clips:
            clicks = torch.Generator().manual_seed(0)
            options = {"num_correction_pt_per_frame": 1, "num_frames_to_correct": 2, "generator": clicks}
            losses.append(clip_step(self.model, frames, masks, **options))
        image, *of_clips = (loss.total for loss in losses)
        return image + torch.stack(of_clips).mean()


def batch(device):
    """Two pictures, and a clip for each process."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(2, SIDE, SIDE)
    targets[0, 8:40, 8:40] = targets[1, 20:60, 16:48] = 1
    clips = [
        (torch.randn(3, 3, SIDE, SIDE, generator=generator).to(device), mask.expand(3, 1, -1, -1).to(device))
        for mask in targets
    ]
    return torch.randn(2, 3, SIDE, SIDE, generator=generator).to(device), targets.to(device), clips


def descend(step, *inputs):
    """A step of gradient descent, by the gradients themselves."""
    optimizer = torch.optim.SGD(step.parameters(), lr=1)
    step(*inputs).backward()
    optimizer.step()


def run_process(kind, device, rank, store, path):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False
    group = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(group, init_method=f"file://{store}", rank=rank, world_size=2)
    step = parallel = Step().to(device)
    model = step.model
    if kind == "fsdp":
        fully_shard_step(step)
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert sum(parameter.to_local().numel() for parameter in model.parameters()) < 0.6 * whole
    else:
        parallel = nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    images, targets, clips = batch(device)
    one = slice(rank, rank + 1)
    descend(parallel, images[one], targets[one], clips[one])
    save_checkpoint(model, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def test_two_processes_give_the_weights_of_one(kind, device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    path = tmp_path / "trained.pt"
    # Not forked: threads of PyTorch that ran before would be missing there.
    command = [sys.executable, __file__, kind, device]
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
    step = Step().to(device)
    before = {name: weight.clone() for name, weight in step.model.state_dict().items()}
    descend(step, *batch(device))
    expected, found = step.model.state_dict(), load(path, device, "float32", image_size=SIDE).state_dict()
    largest = max((weight - before[name]).abs().max() for name, weight in expected.items())
    assert largest > 0.1
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-5 * largest, name


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_sharding_says_what_it_needs():
    with pytest.raises(RuntimeError, match=r"torch\.distributed\.init_process_group"):
        fully_shard_step(nn.Identity())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"holds one SAM2Base .* got Identity with 0 of them"):
            fully_shard_step(nn.Identity())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_process(*sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:])
