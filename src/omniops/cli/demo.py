"""``omniops demo``: what content-aware upsampling is worth, on one photo and in two minutes."""

from __future__ import annotations

import statistics
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from omniops import device as devices
from omniops.cli.common import (
    CommandError,
    DeviceOption,
    Heartbeat,
    choose_device,
    output,
    progress,
    require_pictures,
)
from omniops.cli.demo_parts import UPSAMPLERS, Box, Contestant, Network, centred, uncentred
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, writing
from omniops.cli.pictures import read_picture

CROP = 64
BATCH = 8
LEARNING_RATE = 4e-3
GRADIENT_NORM = 0.5
SMALLEST, LARGEST = 160, 640
"""The shortest and longest side of a photo; a larger one is shrunk."""


def demo(
    photo: Annotated[
        Path | None, typer.Argument(metavar="PHOTO", help="Any picture; a portrait of Grace Hopper without it.")
    ] = None,
    device: DeviceOption = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps of each network.")] = 400,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Of the weights and of the crops.")
    ] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The picture to write.")] = Path(
        "omniops-demo.png"
    ),
    overwrite: OverwriteOption = False,
) -> None:
    """Train one small network three times on a photo, upsampling with nearest, bilinear and CARAFE, and compare.

    Each rebuilds the photo from features at a quarter of its resolution, from the same seed on the same crops, and is
    judged on a part of the photo that none has seen. Two minutes on two CPU cores.

    Example: omniops demo holiday.jpg --steps 1000 --out holiday-demo.png
    """
    chosen = choose_device(device)
    require_picture("--out", out)
    require_new([out], overwrite, [] if photo is None else [photo])
    require_pictures()
    picture = _read(_sample() if photo is None else photo)

    height, width = picture.shape[1:]
    # About the middle, where a photo's subject is; a little above it, where a face is.
    top, left = height * 2 // 25, width * 9 // 32
    held_out = Box(top, top + height * 12 // 25 // 4 * 4, left, left + width * 14 // 32 // 4 * 4)
    truth = held_out.cut(picture)

    contestants = [_contestant(name, chosen, steps, seed) for name in UPSAMPLERS]
    _train(contestants, picture, held_out, chosen, steps, seed)
    for each in contestants:
        _judge(each, truth, chosen)

    table = Table(
        "upsampling",
        "parameters",
        "PSNR held out",
        "time a step",
        title=f"{steps} steps, {devices.title(chosen)}",
        box=SIMPLE_HEAD,
    )
    for each in contestants:
        step = statistics.median(each.seconds) * 1e3
        table.add_row(each.name, f"{each.parameters:,}", f"{each.psnr:.2f} dB", f"{step:.1f} ms")
    console = output()
    console.print(table)

    from omniops.cli.demo_picture import draw

    with writing(out, overwrite) as part:
        draw(picture, held_out, truth, contestants, chosen, part)
    console.print(f"Wrote {out}")


def _sample() -> Path:
    """The photo that ships inside matplotlib."""
    from matplotlib.cbook import get_sample_data

    try:
        return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    except OSError:
        raise CommandError("this matplotlib came without its sample photo: name one, omniops demo PHOTO", 1) from None


def _read(path: Path) -> Tensor:
    """(3, H, W) in 0..1, shrunk to LARGEST."""
    picture = read_picture(path)
    picture.thumbnail((LARGEST, LARGEST))
    if min(picture.size) < SMALLEST:
        size = " x ".join(map(str, picture.size))
        raise CommandError(f"{path} is too small: {size} pixels (of at most {LARGEST}), at least {SMALLEST} are needed")
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _contestant(name: str, device: torch.device, steps: int, seed: int) -> Contestant:
    torch.manual_seed(seed)
    network = Network(name).to(device)
    optimizer = torch.optim.Adam(network.parameters())
    # One cycle of the learning rate needs steps to rise and to fall in.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 10))
    return Contestant(name, network, optimizer, schedule)


def _train(
    contestants: list[Contestant], picture: Tensor, held_out: Box, device: torch.device, steps: int, seed: int
) -> None:
    """All in turns, step by step: they see the same crops, and what disturbs the machine slows them all alike."""
    generator = torch.Generator().manual_seed(seed)
    whole = centred(picture)
    with progress() as bar:
        task = bar.add_task("", total=steps)
        heartbeat = Heartbeat(bar)
        for step in range(steps):
            heartbeat.beat(f"{step} of {steps} steps")
            crops = torch.stack([_crop(whole, held_out, generator) for _ in range(BATCH)]).to(device)
            for each in contestants:
                devices.synchronize(device)
                started = perf_counter()
                loss = F.mse_loss(each.network(crops), crops)
                each.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(each.network.parameters(), GRADIENT_NORM)
                each.optimizer.step()
                each.schedule.step()
                devices.synchronize(device)
                each.seconds.append(perf_counter() - started)
                each.loss = loss.item()
            bar.update(task, description="  ".join(f"{each.name} {each.loss:.3f}" for each in contestants))
            bar.advance(task)


def _judge(contestant: Contestant, truth: Tensor, device: torch.device) -> None:
    """What the network makes of the held-out part, and its PSNR: -10 log10 of the mean squared error of 0..1."""
    with torch.no_grad():
        rebuilt = contestant.network(centred(truth)[None].to(device))[0].cpu()
    contestant.rebuilt = uncentred(rebuilt).clamp(0, 1)
    contestant.psnr = float(-10 * torch.log10(F.mse_loss(contestant.rebuilt, truth)))


def _crop(picture: Tensor, held_out: Box, generator: torch.Generator) -> Tensor:
    """A crop outside the held-out part, turned and recoloured at random, for one photo has few shapes and colours."""

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    height, width = picture.shape[1:]
    while True:
        top, left = below(height - CROP + 1), below(width - CROP + 1)
        box = Box(top, top + CROP, left, left + CROP)
        if not box.meets(held_out):
            break
    crop = box.cut(picture)[torch.randperm(3, generator=generator)]
    if below(2):
        crop = crop.flip(1)
    if below(2):
        crop = crop.mT
    return -crop if below(2) else crop
