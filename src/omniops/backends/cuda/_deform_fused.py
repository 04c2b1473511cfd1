# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution in Triton without columns in memory: samples go straight into a matrix product.

Names are those of ``_deform_columns``. A *segment* is a run of SEGMENT channels that lie in one weight group and one
offset group: CG // SEGMENT of them are the channels of a weight group. The products run over the segments' taps, and
over the channels of each, BLOCK_K at a time. Both factors of a product lie along the axis that is summed over, as
tensor cores want it in float32.

PRECISE takes float32 products as ``_float32_products`` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._deform_columns import load_plan
from omniops.backends.cuda._float32_products import multiply_add


@triton.jit
def blend(image, pixel, c, C, below, w00, w01, w10, w11):
    """The samples, (positions, channels), with pixels and weights of their corners, (positions,)."""
    upper = image + ((pixel.to(tl.int64) * C)[:, None] + c[None, :])
    lower = upper + below
    value = w00[:, None] * tl.load(upper).to(tl.float32)
    value += w01[:, None] * tl.load(upper + C).to(tl.float32)
    value += w10[:, None] * tl.load(lower).to(tl.float32)
    value += w11[:, None] * tl.load(lower + C).to(tl.float32)
    return value.to(image.dtype.element_ty)


@triton.jit
def store(out, total, first, p, count, size, g, o, NG: tl.constexpr, LAST: tl.constexpr):
    """out[n, g * NG + o, p] = total of the chunk's positions p < count, in an out as ``forward`` has it."""
    channel = g * NG + o
    exists = (p < count)[:, None] & (o < NG)[None, :]
    if LAST:
        out_index = (first + p).to(tl.int64)[:, None] * (NG * tl.num_programs(1)) + channel[None, :]
    else:
        n = (first + p) // size
        image_start = (n.to(tl.int64) * (NG * tl.num_programs(1)) * size + (first + p - n * size))[:, None]
        out_index = image_start + (channel.to(tl.int64) * size)[None, :]
    tl.store(out + out_index, total.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first", "count", "width", "size"])
def forward(
    image, pixels, fractions, weight, weight_low, bias, out,
    first, count, width, size,
    C: tl.constexpr, CD: tl.constexpr, CG: tl.constexpr, NG: tl.constexpr, SEGMENT: tl.constexpr, K: tl.constexpr,
    LAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, g * NG + o, p] = bias + sum over taps and channels of samples * weight[g, o, t * CG + c].

    ``out`` is contiguous, or channels_last (LAST). Sizes are no constants, as they change with the map; numbers of
    channels are, so that loads along them are wide.

    Grid: (blocks of output channels * blocks of positions, groups); blocks of output channels vary fastest.
    """
    blocks_n = tl.cdiv(NG, BLOCK_N)
    g = tl.program_id(1)
    block_m = tl.program_id(0) // blocks_n
    o = (tl.program_id(0) - block_m * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = p < count
    k = tl.arange(0, BLOCK_K)
    below = (width + 2) * C
    plane = (C // CD * K) * count.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # What is read of weights past the last is not stored.
    o_weight = tl.where(o < NG, o, 0) * (K * CG)
    weight += g.to(tl.int64) * NG * (K * CG)
    weight_low += g.to(tl.int64) * NG * (K * CG)
    STEPS: tl.constexpr = SEGMENT // BLOCK_K
    for item in range(CG // BLOCK_K * K):
        unit = item // STEPS
        segment = unit // K
        t = unit - segment * K
        of_group = segment * SEGMENT + (item - unit * STEPS) * BLOCK_K + k
        sample_index = ((g * CG + segment * SEGMENT) // CD * K + t).to(tl.int64) * count + p
        pixel, w00, w01, w10, w11 = load_plan(pixels, fractions, plane, sample_index, exists, MASKED)
        a = blend(image, pixel, g * CG + of_group, C, below, w00, w01, w10, w11)
        weight_index = o_weight[None, :] + (t * CG + of_group)[:, None]
        b = tl.load(weight + weight_index)
        if PRECISE:
            total = multiply_add(a, b, tl.load(weight_low + weight_index), total)
        else:
            total = tl.dot(a, b, total, input_precision="tf32")
    if BIASED:
        total += tl.load(bias + g * NG + o, mask=o < NG, other=0).to(tl.float32)[None, :]
    store(out, total, first, p, count, size, g, o, NG, LAST)
