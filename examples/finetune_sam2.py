"""Fine-tune SAM 2 on pictures and clips of discs that move over textures, which NumPy draws.

    python examples/finetune_sam2.py --steps 20 --image-size 128 --device cpu
    torchrun --nproc-per-node 2 examples/finetune_sam2.py --steps 20 --image-size 128 --device cpu
    torchrun --nproc-per-node 2 examples/finetune_sam2.py --steps 20 --image-size 128 --device cpu --fsdp

``--weights`` starts from a checkpoint, as ``omniops.sam2.load`` takes it; without it weights are random. The result is
a file as Meta's, for ``omniops.sam2.load`` and the official package. Under torchrun each process has all weights (DDP),
or with ``--fsdp`` a share of them (FSDP2). Put your own frames and masks into ``draw_clip``.
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
from omniops.sam2.training import Losses, clip_step, fully_shard_step, image_step, sample_prompt, save_checkpoint


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
    """The loss as a module's forward, where DDP and FSDP2 put their hooks."""

    def __init__(self, model: SAM2Base, num_correction_pt_per_frame: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.clicks, self.dtype = model, num_correction_pt_per_frame, dtype

    def forward(self, images: Tensor, masks: Tensor, prompt: str, *, is_clip: bool) -> Losses:
        """Of pictures, or of a clip."""
        with devices.autocast(images.device, self.dtype):
            if not is_clip:
                return image_step(self.model, images, masks, prompt, num_correction_pt_per_frame=self.clicks)
            return clip_step(
                self.model,
                images,
                masks[:, None],
                prompt,
                num_correction_pt_per_frame=self.clicks,
                num_frames_to_correct=min(2, len(images)),
                rand_frames_to_correct=True,
            )


def parse_arguments() -> argparse.Namespace:
    """Those of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a checkpoint; random weights by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2, help="pictures of a process")
    parser.add_argument("--frames", type=int, default=3, help="of a clip, 2 or more; every second step is one")
    parser.add_argument("--clicks", type=int, default=3, help="corrections of a mask; Meta's training had 7")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of autocast; the device's by default"
    )
    parser.add_argument("--fsdp", action="store_true", help="share the weights out among torchrun's processes")
    parser.add_argument("--out", default="sam2_finetuned.pt")
    args = parser.parse_args()
    if args.fsdp and not Processes().are_several:
        parser.error("--fsdp is for processes: start them by torchrun --nproc-per-node N examples/finetune_sam2.py ...")
    return args


def start_processes(name: str) -> torch.device:
    """The device of this process, in a group with the others where torchrun started several."""
    processes, device = Processes(), devices.pick(name)
    if processes.are_several:
        if device.type == "cuda":
            device = torch.device("cuda", processes.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """What autocast computes in: on Apple GPUs bfloat16, as older PyTorch cannot scale the losses of float16 there."""
    return torch.bfloat16 if device.type == "mps" else devices.autocast_dtype(device)


def draw_batch(rng: np.random.Generator, args: argparse.Namespace, *, is_clip: bool) -> tuple[Tensor, Tensor]:
    """The frames of a clip, or pictures."""
    if is_clip:
        return draw_clip(rng, args.frames, args.image_size)
    pictures = [draw_clip(rng, 1, args.image_size) for _ in range(args.batch_size)]
    images, masks = (torch.cat(tensors) for tensors in zip(*pictures, strict=True))
    return images, masks


def main() -> None:
    """Train, print, save."""
    args = parse_arguments()
    device, processes = start_processes(args.device), Processes()
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    model = load(
        args.weights or "tiny", device, "float32", image_size=args.image_size, random_weights=not args.weights
    ).train()
    step: nn.Module = TrainingStep(model, args.clicks, dtype)
    if args.fsdp:
        fully_shard_step(step)
    elif processes.are_several:
        step = nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rng = np.random.default_rng(processes.rank)
    torch.manual_seed(processes.rank)
    prompts = torch.Generator().manual_seed(0)  # the same prompts in all processes: FSDP2 needs that
    for number in range(args.steps):
        is_clip = number % 2 == 1
        images, masks = draw_batch(rng, args, is_clip=is_clip)
        prompt = sample_prompt(0.5 if is_clip else 1, generator=prompts)  # masks are for clips
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
    save_checkpoint(model, args.out)  # in all processes: those of FSDP2 have a share each
    if processes.rank == 0:
        print(f"wrote {args.out}")
    if processes.are_several:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
