"""Small models with omniops' operators, and inputs for them of any sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

import omniops

SHAPES = [(4, 6), (2, 3)]
PIXELS = sum(height * width for height, width in SHAPES)


class EveryOperator(nn.Module):
    """Deformable convolution, CARAFE, and deformable attention."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(4, 27, 3, padding=1)
        self.deform = omniops.DeformConv2d(4, 4, 3, padding=1)
        self.upsample = omniops.CARAFEPack(4, 2, compressed_channels=4)
        self.attention = omniops.MultiScaleDeformableAttention(8, 2, 2, 3, batch_first=True)
        nn.init.normal_(self.attention.sampling_offsets.weight)

    def forward(self, image: Tensor, query: Tensor, value: Tensor, reference_points: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 4, H, W), (N, Q, 8), (N, S, 8), (N, Q, 2, 2) -> (N, 4, 2 * H, 2 * W), (N, Q, 8)."""
        offset, mask = self.offset(image).split([18, 9], 1)
        upsampled = self.upsample(self.deform(image, offset, mask.sigmoid()))
        attended = self.attention(query, value=value, reference_points=reference_points, spatial_shapes=SHAPES)
        return upsampled, attended


def every_operator() -> EveryOperator:
    torch.manual_seed(0)
    return EveryOperator().eval()


def inputs(n: int = 2, height: int = 5, width: int = 6, queries: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (n, 4, height, width), (n, queries, 8), (n, PIXELS, 8), (n, queries, 2, 2)
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


def dynamic() -> tuple[dict[int, object], ...]:
    size = Dim.AUTO
    return {0: size, 2: size, 3: size}, {0: size, 1: size}, {0: size}, {0: size, 1: size}


class Holes(nn.Module):
    """What ONNX alone can express."""

    def forward(self, logits: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        return omniops.fill_holes(logits, 4)
