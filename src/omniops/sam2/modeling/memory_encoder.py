"""The memory encoder: a frame's features and an object's mask -> a memory for later frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.sam2.modeling.layers import LayerNorm2d, Linear
from omniops.sam2.modeling.position_encoding import PositionEmbeddingSine


class MaskDownSampler(nn.Module):
    """Convolutions of stride 2, each with four times the channels: (B, 1, S, S) -> (B, embed_dim, S/16, S/16)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for _ in range(4):
            layers += [
                nn.Conv2d(channels, channels * 4, kernel_size=3, stride=2, padding=1),
                LayerNorm2d(channels * 4),
                nn.GELU(),
            ]
            channels *= 4
        self.encoder = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, kernel_size=1))

    def forward(self, mask: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, embed_dim, S/16, S/16)."""
        encoded: Tensor = self.encoder(mask)
        return encoded


class CXBlock(nn.Module):
    """A block of ConvNeXt (Liu et al., 2022, https://arxiv.org/abs/2201.03545)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim)
        self.pwconv1 = Linear(dim, 4 * dim)
        self.pwconv2 = Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)."""
        hidden: Tensor = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        hidden = self.gamma * self.pwconv2(F.gelu(self.pwconv1(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


class Fuser(nn.Module):
    """Blocks one after the other."""

    def __init__(self, dim: int, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CXBlock(dim) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)."""
        for layer in self.layers:
            x = layer(x)
        return x


class MemoryEncoder(nn.Module):
    """Features and masks, fused.

    Args:
        in_dim: channels C of the features.
        out_dim: channels M of a memory.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mask_downsampler = MaskDownSampler(in_dim)
        self.pix_feat_proj = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.fuser = Fuser(in_dim)
        self.position_encoding = PositionEmbeddingSine(out_dim)
        self.out_proj = nn.Conv2d(in_dim, out_dim, kernel_size=1)

    def forward(self, pix_feat: Tensor, masks: Tensor) -> Tensor:
        """(1 or B, C, S/16, S/16) and (B, 1, S, S) -> (B, M, S/16, S/16)."""
        memory: Tensor = self.out_proj(self.fuser(self.pix_feat_proj(pix_feat) + self.mask_downsampler(masks)))
        return memory
