"""Hiera, the trunk of the image encoder (Ryali et al., 2023, https://arxiv.org/abs/2306.00989), as in SAM 2.

Maps are (N, H, W, C). Attention is within windows, but in few blocks over the whole map; where a stage begins, queries
are pooled to half the side, and the width doubles.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.sam2.modeling.attention import scaled_dot_product_attention
from omniops.sam2.modeling.layers import MLP, Linear


class HieraSize(NamedTuple):
    """The sizes of a trunk; what has four entries has one for each stage."""

    embed_dim: int
    """Channels of the first stage."""
    num_heads: int
    """Of the first stage."""
    stages: tuple[int, int, int, int]
    """Blocks."""
    global_att_blocks: tuple[int, int, int]
    """The blocks whose attention is over the whole map."""
    window_spec: tuple[int, int, int, int] = (8, 4, 14, 7)
    """Sides of the windows."""
    window_pos_embed_bkg_spatial_size: tuple[int, int] = (7, 7)
    """Of the encoding of position that is stretched over the whole map."""


_PIXELS_AT_ONCE = 2048
"""Of a map on the CPU: the hidden layers of more leave its caches, and their memory is asked of the system each time.
With fewer the matrix products' last digits change."""


class PatchEmbed(nn.Module):
    """Patches of 7x7 pixels, every 4: (N, 3, S, S) -> (N, S/4, S/4, C)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=7, stride=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, S/4, S/4, C)."""
        projected: Tensor = self.proj(x)
        return projected.permute(0, 2, 3, 1)


class MultiScaleAttention(nn.Module):
    """Attention within each map of a batch, whose queries may be pooled.

    Args:
        dim: channels of the input.
        dim_out: channels of the result.
        num_heads: of the attention.
        q_stride: the side of the squares of queries of which the largest values are taken; 1 for all queries.
    """

    def __init__(self, dim: int, dim_out: int, num_heads: int, q_stride: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_stride = q_stride
        self.qkv = Linear(dim, dim_out * 3)
        self.proj = Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> (N, H / q_stride, W / q_stride, dim_out)."""
        n, height, width = x.shape[:3]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2).unbind(2)
        if self.q_stride > 1:
            # A copy: in torch 2.7 and 2.8 MPS takes the view, whose strides are those of channels_last, for packed.
            q = max_pool(q.flatten(2).contiguous().unflatten(1, (height, width)), self.q_stride)
            height, width = q.shape[1:3]
            q = q.flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        attended = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(n, height, width, -1))
        return projected


class MultiScaleBlock(nn.Module):
    """A transformer block within windows.

    Args:
        dim: channels of the input.
        dim_out: channels of the result; where they are more, a stage begins and the map is pooled.
        num_heads: of the attention.
        q_stride: by which the map is pooled; 1 for none.
        window_size: the side of the windows; 0 for one over the whole map.
    """

    def __init__(self, dim: int, dim_out: int, num_heads: int, q_stride: int, window_size: int) -> None:
        super().__init__()
        self.q_stride = q_stride
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiScaleAttention(dim, dim_out, num_heads, q_stride)
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.mlp = MLP(dim_out, 4 * dim_out, dim_out, num_layers=2, activation=F.gelu)
        self.proj = Linear(dim, dim_out) if dim != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> (N, H / q_stride, W / q_stride, dim_out)."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.mlp_residual(self.attention_residual(x))
        window = self.window_size
        if window and x.shape[1] % window == x.shape[2] % window == 0:  # windows do not attend to each other
            stripes = split_rows(x, window)
            return torch.cat([self.mlp_residual(self.attention_residual(stripe)) for stripe in stripes], dim=1)
        stripes = split_rows(self.attention_residual(x), 1)
        return torch.cat([self.mlp_residual(stripe) for stripe in stripes], dim=1)

    def attention_residual(self, x: Tensor) -> Tensor:
        """The block's first half: (N, H, W, dim) -> (N, H / q_stride, W / q_stride, dim_out)."""
        shortcut = x
        x = self.norm1(x)
        if self.proj is not None:
            shortcut = max_pool(self.proj(x), self.q_stride)
        if self.window_size:
            windows = self.attn(window_partition(x, self.window_size))
            x = window_unpartition(windows, shortcut.shape[1], shortcut.shape[2])
        else:
            x = self.attn(x)
        return shortcut + x

    def mlp_residual(self, x: Tensor) -> Tensor:
        """Its second half: (N, H, W, dim_out) -> (N, H, W, dim_out)."""
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp


class Hiera(nn.Module):
    """The trunk: an image -> the maps of four stages."""

    def __init__(self, size: HieraSize) -> None:
        super().__init__()
        self.size = size
        width = size.embed_dim
        self.patch_embed = PatchEmbed(width)
        self.pos_embed = nn.Parameter(torch.empty(1, width, *size.window_pos_embed_bkg_spatial_size))
        self.pos_embed_window = nn.Parameter(torch.empty(1, width, size.window_spec[0], size.window_spec[0]))
        for parameter in (self.pos_embed, self.pos_embed_window):
            nn.init.trunc_normal_(parameter, std=0.02)
        blocks: list[MultiScaleBlock] = []
        for stage, count in enumerate(size.stages):
            for i in range(count):
                begins = stage > 0 and i == 0
                # The first block of a stage still has the windows of the stage before, whose pixels it pools.
                window = 0 if len(blocks) in size.global_att_blocks else size.window_spec[stage - begins]
                dim_out = width * 2**stage
                dim, stride = (dim_out // 2, 2) if begins else (dim_out, 1)
                blocks.append(MultiScaleBlock(dim, dim_out, size.num_heads * 2**stage, stride, window))
        self.blocks = nn.ModuleList(blocks)
        self.stage_ends = tuple(end - 1 for end in itertools.accumulate(size.stages))

    @property
    def channel_list(self) -> list[int]:
        """Channels of the four stages, from the last to the first."""
        return [self.size.embed_dim * 2**stage for stage in (3, 2, 1, 0)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, 3, S, S) -> (N, C, S/4, S/4), (N, 2C, S/8, S/8), (N, 4C, S/16, S/16), (N, 8C, S/32, S/32)."""
        x = self.patch_embed(x)
        x = x + self._position(x.shape[1], x.shape[2])
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.stage_ends:
                outputs.append(x.permute(0, 3, 1, 2))
        first, second, third, fourth = outputs
        return first, second, third, fourth

    def _position(self, height: int, width: int) -> Tensor:
        """(1, H, W, C): one encoding stretched over the map, and one repeated in every window."""
        stretched: Tensor = F.interpolate(self.pos_embed, size=(height, width), mode="bicubic")
        side = self.pos_embed_window.shape[-1]
        repeated = self.pos_embed_window.tile(1, 1, height // side, width // side)
        return (stretched + repeated).permute(0, 2, 3, 1)


def max_pool(x: Tensor, stride: int) -> Tensor:
    """(N, H, W, C) -> (N, H / stride, W / stride, C), the largest value of each square."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)


def split_rows(x: Tensor, multiple: int) -> tuple[Tensor, ...]:
    """(N, H, W, C) -> stripes (N, rows, W, C) of ``_PIXELS_AT_ONCE`` or more, whose rows are of that multiple."""
    rows = -(-_PIXELS_AT_ONCE // (x.shape[0] * x.shape[2] * multiple)) * multiple
    stripes: tuple[Tensor, ...] = x.split(rows, dim=1)
    return stripes


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """(N, H, W, C) -> (N * windows, window_size, window_size, C), zeros where windows reach over the edge."""
    bottom, right = (-length % window_size for length in x.shape[1:3])
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return x.transpose(2, 3).flatten(0, 2)


def window_unpartition(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``window_partition``: (N * windows, side, side, C) -> (N, height, width, C)."""
    side = windows.shape[1]
    rows, columns = -(-height // side), -(-width // side)
    x: Tensor = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x if x.shape[1:3] == (height, width) else x[:, :height, :width]
