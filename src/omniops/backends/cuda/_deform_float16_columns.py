# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution of float32 in Triton with columns split into float16 (``_float16_products``).

Names are those of ``_deform_columns``, and so is what is specialised. The rows that have a scale are those of a *unit*:
UNIT channels of a tap, of one weight group and one offset group, at a position. The columns of a weight group are
units[g, p, t * CG + c], high and low, and scales[g, u, p] with u counting the units of a position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._deform_columns import sample_positions
from omniops.backends.cuda._deform_fused import store
from omniops.backends.cuda._float16_products import bits_of, low_half, powers, scales_of_sums, weights_in

UNIT = 64
"""So many channels have a scale."""


@triton.jit
def store_halves(
    value, high, low, scales, index, exists,
    PRECISE: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store values, (positions, channels), as high and low at ``index``, and the scale of each unit at ``scales``."""
    UNITS: tl.constexpr = BLOCK_C // UNIT
    value = tl.reshape(value, (BLOCK_P, UNITS, UNIT))
    down, up = powers(tl.max(bits_of(value), 2))
    tl.store(scales, down, mask=exists[:, None])
    value = tl.reshape(value * up[:, :, None], (BLOCK_P, BLOCK_C))
    value_high = value.to(tl.float16)
    tl.store(high + index, value_high, mask=exists[:, None])
    if PRECISE:
        tl.store(low + index, low_half(value, value_high), mask=exists[:, None])


@triton.jit(
    do_not_specialize=[
        "first", "count", "height", "width", "rows", "columns",
        "offset_n", "offset_c", "offset_y", "offset_x", "mask_n", "mask_c", "mask_y", "mask_x",
    ]
)  # fmt: skip
def sample(
    image, offset, mask, high, low, scales, first, count, height, width, rows, columns,
    offset_n, offset_c, offset_y, offset_x, mask_n, mask_c, mask_y, mask_x,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, MASKED: tl.constexpr, PRECISE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(high + low) * scales = factor * interpolated image, without low where not PRECISE. A block of channels lies in
    one weight group and one offset group.

    Grid: (blocks of positions, offset groups, blocks of their channels). A program walks the taps, as those of a
    position share pixels.
    """
    CG: tl.constexpr = C // G
    UNITS: tl.constexpr = BLOCK_C // UNIT
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < count
    # Positions past the last read where the first does.
    position = first + tl.where(exists, p, 0)
    n = position // (rows * columns)
    index_in_image = position - n * (rows * columns)
    i = index_in_image // columns
    j = index_in_image - i * columns
    n = n.to(tl.int64)
    offset += n * offset_n + i.to(tl.int64) * offset_y + j.to(tl.int64) * offset_x
    mask += n * mask_n + i.to(tl.int64) * mask_y + j.to(tl.int64) * mask_x
    start = tl.program_id(1) * (C // D) + tl.program_id(2) * BLOCK_C
    g = start // CG
    of_group = start - g * CG
    c = tl.arange(0, BLOCK_C)
    image += start
    out_index = (g.to(tl.int64) * count + p) * (K * CG) + of_group
    scales += (g * (K * CG // UNIT) + of_group // UNIT).to(tl.int64) * count
    unit = tl.arange(0, UNITS).to(tl.int64) * count
    below = (width + 2) * C
    geometry = (KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X)
    for t in range(K):
        sample_index = (tl.program_id(1) * K + t).to(tl.int64)
        y = tl.load(offset + sample_index * 2 * offset_c, mask=exists, other=0)
        x = tl.load(offset + (sample_index * 2 + 1) * offset_c, mask=exists, other=0)
        upper, left, ly, lx = sample_positions(y, x, i, j, t, (height, width), geometry, -1, tl.float32)
        above = 1 - ly
        if MASKED:
            factor = tl.load(mask + sample_index * mask_c, mask=exists, other=0)
            above *= factor
            ly *= factor
        pixel = (n * (height + 2) + upper) * (width + 2) + left
        corner = image + ((pixel * C)[:, None] + c[None, :])
        value = (above * (1 - lx))[:, None] * tl.load(corner)
        value += (above * lx)[:, None] * tl.load(corner + C)
        value += (ly * (1 - lx))[:, None] * tl.load(corner + below)
        value += (ly * lx)[:, None] * tl.load(corner + below + C)
        store_halves(
            value, high, low, scales + (t * (CG // UNIT) * tl.cast(count, tl.int64) + p[:, None] + unit[None, :]),
            (out_index + t * CG)[:, None] + c[None, :], exists, PRECISE, UNIT, BLOCK_P, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count", "size"])
def product(
    high, low, scales, weight_halves, weight_scales, bias, out, first, count, size,
    NG: tl.constexpr, ROW: tl.constexpr, LAST: tl.constexpr, BIASED: tl.constexpr, PRECISE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[n, g * NG + o, p] = bias + sum over the ROW = K * CG numbers of columns and weights.

    Grid: (blocks of output channels * blocks of positions, groups); blocks of output channels vary fastest.
    """
    blocks_n = tl.cdiv(NG, BLOCK_N)
    g = tl.program_id(1)
    block_m = tl.program_id(0) // blocks_n
    o = (tl.program_id(0) - block_m * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # What is read past the last position or weight is not stored.
    position = tl.where(p < count, p, 0)
    k = tl.arange(0, UNIT)
    a_index = ((g.to(tl.int64) * count + position) * ROW)[:, None] + k[None, :]
    b_index = (tl.where(o < NG, o, 0) * ROW)[None, :] + k[:, None]
    weight, weight_low = weights_in(weight_halves, tl.num_programs(1).to(tl.int64) * (NG * ROW))
    weight += g.to(tl.int64) * (NG * ROW)
    weight_low += g.to(tl.int64) * (NG * ROW)
    scales += (g * (ROW // UNIT)).to(tl.int64) * count + position
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, ROW, UNIT):
        a = tl.load(high + a_index + start)
        b = tl.load(weight + b_index + start)
        # Tensor cores cut what they add to a sum, not round it: a sum of its own for each unit keeps that small.
        if PRECISE:
            partial = tl.dot(tl.load(low + a_index + start), b)
            partial = tl.dot(a, tl.load(weight_low + b_index + start), partial)
            partial = tl.dot(a, b, partial)
        else:
            partial = tl.dot(a, b)
        total += partial * scales_of_sums(tl.load(scales + (start // UNIT) * tl.cast(count, tl.int64)))[:, None]
    total *= tl.load(weight_scales + g * NG + o, mask=o < NG, other=0)[None, :]
    if BIASED:
        total += tl.load(bias + g * NG + o, mask=o < NG, other=0)[None, :]
    store(out, total, first, p, count, size, g, o, NG, LAST)
