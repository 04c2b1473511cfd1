"""The network of ``omniops demo``, and what upsamples in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.nn import CARAFEPack

CHANNELS = 32

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
