"""Deformable convolution in Triton: tiles, warps, stages and limits on registers of each kernel.

All of them are those with which docs/benchmarks.md has been measured: one NVIDIA H200, 2026-11-29, torch 2.11.0+cu130,
Triton 3.6.0, dtypes float32, float32 with TF32, float16 and bfloat16. A table by ``half`` has one row for dtypes of two
bytes and one for the others; none has been timed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

PREPARE_WARPS = 4
"""``_deform_prepare.prepare`` and ``finish``; what a program of a job takes stands beside the kernels."""


class ElementsTile(NamedTuple):
    """What a program takes where it writes columns."""

    channels: int
    """At most, of an offset group."""
    elements: int
    """Positions times channels, of all its offset groups."""
    warps: int


SAMPLE = {True: ElementsTile(128, 512, 1), False: ElementsTile(256, 1024, 4)}
"""``_deform_columns.sample``, by ``half``."""

SAMPLE_FLOAT16 = ElementsTile(256, 1024, 4)
"""``_deform_float16_columns.sample``, for float32 alone."""

GROUP_CHANNELS = 64
"""Offset groups of fewer channels are taken several at once in ``sample`` and ``gradients``."""


class GradientsTile(NamedTuple):
    """What a program of ``_deform_columns.gradients`` takes."""

    channels: int
    """Of a step, at most."""
    positions: int
    warps: int


GRADIENTS = {True: GradientsTile(64, 8, 2), False: GradientsTile(64, 8, 4)}
"""``_deform_columns.gradients``, by ``half``."""

GRADIENTS_PROGRAMS = 2048
"""A program of ``gradients`` walks all taps of its positions, as they share pixels, where there are so many then."""


class GatherTile(NamedTuple):
    """What a program of ``_deform_columns.gather`` takes."""

    samples: int
    """Of a step, for each pixel."""
    warps: int


GATHER = {True: GatherTile(2, 1), False: GatherTile(8, 2)}
"""``_deform_columns.gather``, by whether a block has GATHER_WIDE channels or more."""

GATHER_WIDE, GATHER_CHANNELS, GATHER_PIXELS = 256, 512, 32
"""Channels of a block that is for one pixel; the most channels of a block; the most pixels of one of few channels."""


class ProductTile(NamedTuple):
    """What a program of a matrix product takes: M positions, or rows of the result, N columns of it, K terms a step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    """Of the pipeline that loads blocks while others are multiplied."""
    max_registers: int | None = None
    """Of a thread: with more of them fewer programs run at once."""


FUSED = {True: ProductTile(128, 128, 64, 4, 3), False: ProductTile(64, 128, 32, 4, 3)}
"""``_deform_fused.forward``, by ``half``; n and k at most."""

FUSED_PRECISE_NARROW = ProductTile(128, 64, 32, 4, 3)
"""The same for float32 without TF32 and no more output channels than n."""

FUSED_NARROW = ProductTile(64, 128, 32, 4, 1)
"""``_deform_fused_narrow.forward``; n and k at most."""

PRODUCT_FLOAT16 = {True: ProductTile(128, 128, 64, 8, 3), False: ProductTile(64, 128, 64, 4, 3, 168)}
"""``_deform_float16_columns.product``, by whether float32 is exact; k is UNIT."""

LEAST_N = 16
"""Columns of a block that tensor cores take."""
