"""Fine-tune SAM 2 on pictures and clips of discs that move over textures, which NumPy draws.

    python examples/finetune_sam2.py --steps 20 --image-size 128 --device cpu
    torchrun --nproc-per-node 2 examples/finetune_sam2.py --steps 20 --image-size 128 --device cpu

``--weights`` starts from a checkpoint, as ``omniops.sam2.load`` takes it; without it weights are random. The result is
a file as Meta's, for ``omniops.sam2.load`` and the official package. Put your own frames and masks into ``draw_clip``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniops import device as devices
from omniops.distributed import Processes
from omniops.sam2 import load
from omniops.sam2.modeling.sam2 import SAM2Base, normalize
from omniops.sam2.training.losses import Losses
from omniops.sam2.training.steps import clip_step, image_step, save_checkpoint


def draw_clip(rng: np.random.Generator, frames: int, side: int) -> tuple[Tensor, Tensor]:
    """A clip of a disc: frames (T, 3, S, S) from 0 to 1, and masks (T, S, S) of 0 and 1."""
    y, x = np.mgrid[:side, :side]
    texture = rng.uniform(0, 0.6, (3, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    colour = rng.uniform(0.5, 1, (3, 1, 1))
    centre, velocity = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(-0.05, 0.05, 2) * side
    radius = rng.uniform(0.12, 0.3) * side
    images, masks = [], []
    for t in range(frames):
        row, column = centre + t * velocity
        inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
        images.append(np.where(inside, colour, texture))
        masks.append(inside)
    return torch.tensor(np.stack(images), dtype=torch.float32), torch.tensor(np.stack(masks), dtype=torch.float32)


class TrainingStep(nn.Module):
    """The loss as a module's forward, where DistributedDataParallel puts its hooks."""

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, masks: Tensor, prompt: str, *, is_clip: bool) -> Losses:
        """Of pictures, or of a clip."""
        with devices.autocast(images.device):
            if is_clip:
                return clip_step(self.model, images, masks[:, None], prompt)
            return image_step(self.model, images, masks, prompt)


def main() -> None:
    """Train, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a checkpoint; random weights by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2, help="pictures of a process")
    parser.add_argument("--frames", type=int, default=3, help="of a clip; every second step is one")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="sam2_finetuned.pt")
    args = parser.parse_args()

    processes = Processes()
    device = devices.pick(args.device)
    if device.type == "cuda" and processes.are_several:
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    if processes.are_several:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = load(
        args.weights or "tiny", device, "float32", image_size=args.image_size, random_weights=not args.weights
    ).train()
    step: nn.Module = TrainingStep(model)
    if processes.are_several:
        step = nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=devices.autocast_dtype(device) == torch.float16)
    rng = np.random.default_rng(processes.rank)
    torch.manual_seed(processes.rank)
    for number in range(args.steps):
        is_clip = number % 2 == 1
        if is_clip:
            images, masks = draw_clip(rng, args.frames, args.image_size)
        else:
            pictures = [draw_clip(rng, 1, args.image_size) for _ in range(args.batch_size)]
            images, masks = (torch.cat(tensors) for tensors in zip(*pictures, strict=True))
        prompt = "box" if number // 2 % 2 else "point"
        losses = step(normalize(images.to(device)), masks.to(device), prompt, is_clip=is_clip)
        optimizer.zero_grad()
        scaler.scale(losses.total).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if processes.rank == 0:
            kind = "clip" if is_clip else "pictures"
            print(
                f"step {number + 1} ({kind}, {prompt}): loss {losses.total:.3f}, IoU {losses.mean_iou:.3f}", flush=True
            )
    if processes.rank == 0:
        save_checkpoint(model, args.out)
        print(f"wrote {args.out}")
    if processes.are_several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
