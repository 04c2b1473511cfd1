"""Encodings of position: sines (of pixels and of time), random Fourier features, and rotary.

Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Tancik et al., 2020, https://arxiv.org/abs/2006.10739; Su et
al., 2021, https://arxiv.org/abs/2104.09864. All are computed in float32, but for the random Fourier features, whose
product autocast casts, as in the official package.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0
"""The base of the wavelengths of all sines here."""


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the row, then of the column of each pixel.

    Args:
        num_pos_feats: the channels C.
    """

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self._cache: dict[tuple[int, int, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the encodings: a copy or a file of the module may be for another device."""
        return {**super().__getstate__(), "_cache": {}}  # type: ignore[no-untyped-call]

    @torch.inference_mode(False)
    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """(1, C, H, W), float32, the same tensor whenever the size is the same."""
        key = (height, width, device)
        if key not in self._cache:
            rows, columns = (self._sines(length, device) for length in (height, width))
            encoding = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=2)
            self._cache[key] = encoding.permute(2, 0, 1)[None].contiguous()
        return self._cache[key]

    def _sines(self, length: int, device: torch.device) -> Tensor:
        """(length, C/2), of positions that end at 2 pi."""
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        position = position / (position[-1:] + 1e-6) * (2 * math.pi)
        half = self.num_pos_feats // 2
        channel = torch.arange(half, dtype=torch.float32, device=device)
        angles = position[:, None] / TEMPERATURE ** (2 * (channel // 2) / half)
        return torch.stack((angles[:, ::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)


def get_1d_sine_pe(pos_inds: Tensor, dim: int) -> Tensor:
    """(N) -> (N, dim): the sines of each position, then its cosines."""
    half = dim // 2
    power = torch.arange(half, device=pos_inds.device) // 2 * 2 / half
    angles = pos_inds[:, None] / TEMPERATURE**power
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of positions in an image.

    Args:
        num_pos_feats: half of the channels C.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, num_pos_feats))

    def forward(self, coords: Tensor) -> Tensor:
        """(..., 2), x and y from 0 to 1 -> (..., C)."""
        angles = (2 * coords - 1) @ self.positional_encoding_gaussian_matrix * (2 * math.pi)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def of_grid(self, height: int, width: int) -> Tensor:
        """(1, C, H, W), of the centres of all pixels."""
        device = self.positional_encoding_gaussian_matrix.device
        y, x = ((torch.arange(length, dtype=torch.float32, device=device) + 0.5) / length for length in (height, width))
        coords = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=2)
        encoding: Tensor = self(coords)
        return encoding.permute(2, 0, 1)[None]


class AxialRotation(NamedTuple):
    """Rotary encoding of N pixels: channels 2i and 2i + 1 are rotated by the same angle."""

    cos: Tensor
    """(N, D)"""
    sin: Tensor
    """(N, D/2)"""

    def rotate(self, x: Tensor) -> Tensor:
        """(B, heads, R * N, D), R maps of N pixels one after the other -> the same in float32, rotated."""
        x = x.float().unflatten(2, (-1, len(self.cos)))
        rotated = x * self.cos
        rotated[..., ::2].addcmul_(x[..., 1::2], self.sin, value=-1)
        rotated[..., 1::2].addcmul_(x[..., ::2], self.sin)
        return rotated.flatten(2, 3)


def compute_axial_rotation(dim: int, height: int, width: int, device: torch.device) -> AxialRotation:
    """Of the pixels of a map, row by row: half of the channels is rotated by the column, half by the row."""
    frequency = 1 / TEMPERATURE ** (torch.arange(0, dim, 4, dtype=torch.float32, device=device) / dim)
    pixel = torch.arange(height * width, device=device)
    columns, rows = pixel % width, pixel.div(width, rounding_mode="floor")
    angles = torch.cat([position[:, None] * frequency for position in (columns, rows)], dim=1)
    return AxialRotation(angles.cos().repeat_interleave(2, dim=1), angles.sin())
