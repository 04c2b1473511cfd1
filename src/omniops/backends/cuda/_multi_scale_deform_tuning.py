"""Multi-scale deformable attention in Triton: tiles and warps of each kernel.

All of them are those with which docs/benchmarks.md has been measured: one NVIDIA H200, 2026-11-29, torch 2.11.0+cu130,
Triton 3.6.0, in encoders and decoders of Deformable DETR (D = 32, four points). None has been timed in float64.
"""

from __future__ import annotations

from typing import NamedTuple


class VectorsTile(NamedTuple):
    """What a program takes. A vector are the channels of 16 bytes, and a warp has 32 vectors at once."""

    warps: int
    vectors: int
    """Of a thread, that a step takes."""


FORWARD, FORWARD_OF_FEW = VectorsTile(1, 2), VectorsTile(1, 1)
"""``_multi_scale_deform_forward.forward``, for many queries and for few."""

BACKWARD, BACKWARD_OF_FEW = VectorsTile(1, 1), VectorsTile(2, 1)
"""``_multi_scale_deform_backward.backward``, likewise."""


class ElementsTile(NamedTuple):
    """What a program takes."""

    elements: int
    warps: int


FINISH = ElementsTile(512, 4)
"""``_multi_scale_deform_backward.finish``."""

CELLS = ElementsTile(256, 4)
"""``_multi_scale_deform_gather.cells_of``, whose elements are samples."""


class GatherTile(NamedTuple):
    """What a program takes."""

    elements: int
    """Pixels times channels."""
    samples: int
    """Of a step, for each pixel."""
    warps: int


GATHER = GatherTile(128, 8, 2)
"""``_multi_scale_deform_gather.gather``."""

MAX_CHANNELS, MAX_POINTS = 128, 16
"""Channels of a block, and points of a block of ``cells_of``."""
