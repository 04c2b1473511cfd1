"""``omniops demo``: what content-aware upsampling is worth, on one photo and in two minutes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

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
from omniops.cli.demo.network import UPSAMPLERS
from omniops.cli.demo.options import OutOption, PhotoArgument, SeedOption, StepsOption
from omniops.cli.demo.training import Box, Contestant, judge, make_contestant, part_to_hold_out, train
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, writing
from omniops.cli.pictures import read_picture

SMALLEST, LARGEST = 160, 640
"""The shortest and longest side of a photo; a larger one is shrunk."""


def demo(
    photo: PhotoArgument = None,
    device: DeviceOption = None,
    steps: StepsOption = 400,
    seed: SeedOption = 0,
    out: OutOption = Path("omniops-demo.png"),
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
    held_out = part_to_hold_out(picture)
    truth = held_out.cut(picture)

    contestants = [make_contestant(name, chosen, steps, seed) for name in UPSAMPLERS]
    _train(contestants, picture, held_out, chosen, steps, seed)
    for contestant in contestants:
        judge(contestant, truth, chosen)

    table = Table(
        "upsampling",
        "parameters",
        "PSNR held out",
        "time a step",
        title=f"{steps} steps, {devices.title(chosen)}",
        box=SIMPLE_HEAD,
    )
    for contestant in contestants:
        step = statistics.median(contestant.seconds) * 1e3
        table.add_row(contestant.name, f"{contestant.parameters:,}", f"{contestant.psnr:.2f} dB", f"{step:.1f} ms")
    console = output()
    console.print(table)

    from omniops.cli.demo.picture import draw

    with writing(out, overwrite) as temporary:
        draw(picture, held_out, truth, contestants, chosen, temporary)
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


def _train(
    contestants: Sequence[Contestant], picture: Tensor, held_out: Box, device: torch.device, steps: int, seed: int
) -> None:
    """Train them, with a progress bar."""
    with progress() as bar:
        task = bar.add_task("", total=steps)
        heartbeat = Heartbeat(bar)
        heartbeat.beat(f"0 of {steps} steps")
        for step in train(contestants, picture, held_out, device, steps, seed):
            bar.update(
                task, description="  ".join(f"{contestant.name} {contestant.loss:.3f}" for contestant in contestants)
            )
            bar.advance(task)
            if step < steps:
                heartbeat.beat(f"{step} of {steps} steps")
