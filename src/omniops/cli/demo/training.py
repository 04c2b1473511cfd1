"""Networks that differ in their upsamplers alone, trained side by side on one photo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops import device as devices
from omniops.cli.demo.network import Network

CROP = 64
BATCH = 8
LEARNING_RATE = 4e-3
GRADIENT_NORM = 0.5


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


def centred(picture: Tensor) -> Tensor:
    """0..1 -> -2..2, which the networks take and give."""
    return picture * 4 - 2


def uncentred(picture: Tensor) -> Tensor:
    """-2..2 -> 0..1, the inverse of ``centred``."""
    return (picture + 2) / 4


def part_to_hold_out(picture: Tensor) -> Box:
    """About the middle, where a photo's subject is; a little above it, where a face is. Its sides divide by 4."""
    height, width = picture.shape[1:]
    top, left = height * 2 // 25, width * 9 // 32
    return Box(top, top + height * 12 // 25 // 4 * 4, left, left + width * 14 // 32 // 4 * 4)


def make_contestant(name: str, device: torch.device, steps: int, seed: int) -> Contestant:
    """A network with that upsampler on the device, to be trained for so many steps."""
    torch.manual_seed(seed)
    network = Network(name).to(device)
    optimizer = torch.optim.Adam(network.parameters())
    # One cycle of the learning rate needs steps to rise and to fall in.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 10))
    return Contestant(name, network, optimizer, schedule)


def train(
    contestants: Sequence[Contestant], picture: Tensor, held_out: Box, device: torch.device, steps: int, seed: int
) -> Iterator[int]:
    """Train all in turns, step by step: they see the same crops, and what disturbs the machine slows them all alike.

    Args:
        contestants: on the device.
        picture: (3, H, W) in 0..1.
        held_out: the part of it that none shall see.
        device: where they are trained.
        steps: of each.
        seed: of the crops.

    Yields:
        The number of steps that are done.
    """
    generator = torch.Generator().manual_seed(seed)
    centred_picture = centred(picture)
    for step in range(1, steps + 1):
        crops = torch.stack([_crop(centred_picture, held_out, generator) for _ in range(BATCH)]).to(device)
        for contestant in contestants:
            devices.synchronize(device)
            started = perf_counter()
            loss = F.mse_loss(contestant.network(crops), crops)
            contestant.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(contestant.network.parameters(), GRADIENT_NORM)
            contestant.optimizer.step()
            contestant.schedule.step()
            devices.synchronize(device)
            contestant.seconds.append(perf_counter() - started)
            contestant.loss = loss.item()
        yield step


def judge(contestant: Contestant, truth: Tensor, device: torch.device) -> None:
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
