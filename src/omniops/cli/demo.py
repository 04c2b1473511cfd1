"""``omniops demo``: what content-aware upsampling is worth, on one photo and in two minutes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
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
    choose_device,
    output,
    progress,
    require_picture_path,
    require_pictures,
)
from omniops.nn import CARAFEPack

CHANNELS = 32
CROP = 64
BATCH = 8
LEARNING_RATE = 4e-3
GRADIENT_NORM = 0.5
SMALLEST, LARGEST = 160, 640
"""The shortest and longest side of a photo; a larger one is shrunk."""

UPSAMPLERS = ("nearest", "bilinear", "CARAFE")


class Network(nn.Module):
    """Squeezes a picture to a quarter of its resolution and rebuilds it; the upsampler is all that may differ.

    The features are the averaged picture and what a small encoder has to say about its detail. What follows the last
    upsampling sees one pixel at a time, so that the detail is the upsampler's to place.
    """

    def __init__(self, upsampler: str) -> None:
        super().__init__()
        c = CHANNELS
        self.encoder = nn.Sequential(
            nn.Conv2d(3, c, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(c, c - 3, 3, stride=2, padding=1)
        )
        self.at_quarter = _residual(nn.Conv2d(c, c, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(c, c, 3, padding=1))
        self.at_half = _residual(nn.LeakyReLU(0.1), nn.Conv2d(c, c, 3, padding=1))
        self.at_full = _residual(nn.LeakyReLU(0.1), nn.Conv2d(c, c, 1))
        self.colours = _residual(nn.LeakyReLU(0.1), nn.Conv2d(c, 3, 1))
        # Last, so that one seed starts all the other layers alike.
        self.to_half, self.to_full = (_upsampler(upsampler) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the same, rebuilt; H and W divide by 4."""
        features = torch.cat([F.avg_pool2d(x, 4), self.encoder(x)], 1)
        features = features + self.at_quarter(features)
        features = self.to_half(features)
        features = features + self.at_half(features)
        features = self.to_full(features)
        features = features + self.at_full(features)
        rebuilt: Tensor = features[:, :3] + self.colours(features)
        return rebuilt


def _residual(*layers: nn.Module) -> nn.Sequential:
    """Layers whose result is added to something, and starts small."""
    nn.init.normal_(layers[-1].weight, std=0.01)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def _upsampler(name: str) -> nn.Module:
    if name == "CARAFE":
        return CARAFEPack(CHANNELS, scale_factor=2, up_kernel=3, up_group=4, compressed_channels=16)
    return nn.Upsample(scale_factor=2, mode=name)


@dataclass(frozen=True)
class Box:
    """Rows top:bottom and columns left:right of a picture."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, picture: Tensor) -> Tensor:
        """That part of (..., H, W)."""
        return picture[..., self.top : self.bottom, self.left : self.right]

    def meets(self, other: Box) -> bool:
        """Whether the two have a pixel in common."""
        return (
            self.top < other.bottom and other.top < self.bottom and self.left < other.right and other.left < self.right
        )


@dataclass
class Contestant:
    """One network, its training and what came of it."""

    name: str
    network: Network
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float] = field(default_factory=list)
    loss: float = float("nan")
    rebuilt: Tensor = field(default_factory=lambda: torch.empty(0))
    """(3, H, W), the held-out part in 0..1, on the CPU."""
    psnr: float = float("nan")

    @property
    def parameters(self) -> int:
        """How many the network has."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def demo(
    photo: Annotated[
        Path | None, typer.Argument(metavar="[PHOTO]", help="Any picture; a portrait of Grace Hopper without it.")
    ] = None,
    device: DeviceOption = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps of each network.")] = 400,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the weights and of the crops.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The picture to write.")] = Path(
        "omniops-demo.png"
    ),
) -> None:
    """Train one small network three times on a photo, upsampling with nearest, bilinear and CARAFE, and compare.

    Each rebuilds the photo from features at a quarter of its resolution, from the same seed on the same crops, and is
    judged on a part of the photo that none has seen. Two minutes on two CPU cores.

    Example: omniops demo holiday.jpg --steps 1000 --out holiday-demo.png
    """
    chosen = choose_device(device)
    require_picture_path(out)
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
        with torch.no_grad():
            rebuilt = each.network(_centred(truth)[None].to(chosen))[0].cpu()
        each.rebuilt = (rebuilt / 4 + 0.5).clamp(0, 1)
        each.psnr = float(-10 * torch.log10(F.mse_loss(each.rebuilt, truth)))

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

    draw(picture, held_out, truth, contestants, chosen, out)
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
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except UnidentifiedImageError:
        raise CommandError(f"not a picture that Pillow can read: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CommandError(f"cannot read {path}: {error}") from None
    turned.thumbnail((LARGEST, LARGEST))
    if min(turned.size) < SMALLEST:
        size = " x ".join(map(str, turned.size))
        raise CommandError(f"{path} is too small: {size} pixels (of at most {LARGEST}), at least {SMALLEST} are needed")
    return torch.from_numpy(np.asarray(turned, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _centred(picture: Tensor) -> Tensor:
    """0..1 -> -2..2, which the networks take and give."""
    return picture * 4 - 2


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
    centred = _centred(picture)
    with progress() as bar:
        task = bar.add_task("", total=steps)
        for _ in range(steps):
            crops = torch.stack([_crop(centred, held_out, generator) for _ in range(BATCH)]).to(device)
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
