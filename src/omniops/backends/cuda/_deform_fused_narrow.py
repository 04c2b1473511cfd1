# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution in Triton in one kernel, for offset groups of fewer channels than tensor cores take at a time.

Names are those of ``_deform_columns``. A block of BLOCK_K channels spans whole offset groups of one weight group, and
there is no plan in memory: it would be larger than the offsets and masks that it is made of. Products of float32 are
taken in parts of float16 (``_float16_products``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._deform_columns import placed
from omniops.backends.cuda._deform_fused import store
from omniops.backends.cuda._float16_products import multiply_add, weights_in


@triton.jit
def moves_of(
    item, offset, mask, of_offset, of_mask, here, g, offset_c, mask_c,
    CD: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets and factors of an item, a tap of a block of channels, as in memory: (offset groups, positions)."""
    d = (g * CG + item // K * BLOCK_K) // CD + tl.arange(0, BLOCK_K // CD)
    unit = (d * K + item % K).to(tl.int64)[:, None]
    at = offset + (unit * 2 * offset_c + of_offset[None, :])
    y = tl.load(at, mask=here[None, :], other=0)
    x = tl.load(at + offset_c, mask=here[None, :], other=0)
    factor = y
    if MASKED:
        factor = tl.load(mask + (unit * mask_c + of_mask[None, :]), mask=here[None, :], other=0)
    return y, x, factor


@triton.jit
def corners_of(
    item, y, x, factor, image, of_image, i, j, g, height, width,
    C: tl.constexpr, CD: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pixels at the corners of an item's samples, (offset groups, positions, channels of a group), and their
    weights, (offset groups, positions)."""
    t = item % K
    y = y.to(tl.float32) + (i * STRIDE_Y - PAD_Y + t // KW * STEP_Y).to(tl.float32)[None, :]
    x = x.to(tl.float32) + (j * STRIDE_X - PAD_X + t % KW * STEP_X).to(tl.float32)[None, :]
    upper, left, ly, lx = placed(y, x, height, width)
    above = 1 - ly
    if MASKED:
        above *= factor.to(tl.float32)
        ly *= factor.to(tl.float32)
    c = g * CG + item // K * BLOCK_K + tl.arange(0, BLOCK_K // CD) * CD
    pixel = upper * (width + 2) + left
    first = (of_image[None, :] + pixel) * C + c[:, None]
    at = image + (first[:, :, None] + tl.arange(0, CD)[None, None, :])
    under = at + (width + 2) * C
    return (
        tl.load(at), tl.load(at + C), tl.load(under), tl.load(under + C),
        above * (1 - lx), above * lx, ly * (1 - lx), ly * lx,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "count", "height", "width", "rows", "columns",
        "offset_n", "offset_c", "offset_y", "offset_x", "mask_n", "mask_c", "mask_y", "mask_x",
    ]
)  # fmt: skip
def forward(
    image, offset, mask, weight, weight_scales, bias, out, count, height, width, rows, columns,
    offset_n, offset_c, offset_y, offset_x, mask_n, mask_c, mask_y, mask_x,
    C: tl.constexpr, CD: tl.constexpr, CG: tl.constexpr, NG: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    LAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, g * NG + o, p] = bias + sum over taps and channels of samples * weight[g, o, t * CG + c].

    ``out`` is contiguous, or channels_last (LAST). Of float32 the weights are in parts, without the low ones where not
    PRECISE. What an item needs is read while the one before is multiplied: offsets two items ahead, pixels one.

    Grid: (blocks of positions, groups).
    """
    g = tl.program_id(1)
    o = tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = p < count
    n = tl.where(here, p, 0) // (rows * columns)
    place = tl.where(here, p, 0) - n * (rows * columns)
    i = place // columns
    j = place - i * columns
    n = n.to(tl.int64)
    of_image = n * ((height + 2) * (width + 2))
    of_offset = n * offset_n + i.to(tl.int64) * offset_y + j.to(tl.int64) * offset_x
    of_mask = n * mask_n + i.to(tl.int64) * mask_y + j.to(tl.int64) * mask_x
    # What is read of weights past the last is not stored.
    at_weight = (tl.where(o < NG, o, 0) * (K * CG))[None, :] + tl.arange(0, BLOCK_K)[:, None]
    if image.dtype.element_ty == tl.float32:
        weight, weight_low = weights_in(weight, tl.num_programs(1).to(tl.int64) * (NG * K * CG))
        weight_low += g.to(tl.int64) * (NG * K * CG)
    weight += g.to(tl.int64) * (NG * K * CG)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    LAST_ITEM: tl.constexpr = CG // BLOCK_K * K - 1
    y, x, factor = moves_of(0, offset, mask, of_offset, of_mask, here, g, offset_c, mask_c, CD, CG, K, MASKED, BLOCK_K)
    v00, v01, v10, v11, w00, w01, w10, w11 = corners_of(
        0, y, x, factor, image, of_image, i, j, g, height, width,
        C, CD, CG, K, KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X, MASKED, BLOCK_K,
    )  # fmt: skip
    y, x, factor = moves_of(
        min(1, LAST_ITEM), offset, mask, of_offset, of_mask, here, g, offset_c, mask_c, CD, CG, K, MASKED, BLOCK_K
    )
    for item in range(LAST_ITEM + 1):
        value = w00[:, :, None] * v00.to(tl.float32)
        value += w01[:, :, None] * v01.to(tl.float32)
        value += w10[:, :, None] * v10.to(tl.float32)
        value += w11[:, :, None] * v11.to(tl.float32)
        a = tl.reshape(tl.permute(value, (1, 0, 2)), (BLOCK_M, BLOCK_K))
        v00, v01, v10, v11, w00, w01, w10, w11 = corners_of(
            tl.minimum(item + 1, LAST_ITEM), y, x, factor, image, of_image, i, j, g, height, width,
            C, CD, CG, K, KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X, MASKED, BLOCK_K,
        )  # fmt: skip
        y, x, factor = moves_of(
            tl.minimum(item + 2, LAST_ITEM),
            offset, mask, of_offset, of_mask, here, g, offset_c, mask_c, CD, CG, K, MASKED, BLOCK_K,
        )  # fmt: skip
        at = at_weight + (item % K * CG + item // K * BLOCK_K)
        b = tl.load(weight + at)
        if image.dtype.element_ty == tl.float32:
            b_low = tl.load(weight_low + at) if PRECISE else b
            total = multiply_add(a, b, b_low, total, PRECISE)
        else:
            total = tl.dot(a.to(b.dtype), b, total)
    if image.dtype.element_ty == tl.float32:
        total *= tl.load(weight_scales + g * NG + o, mask=o < NG, other=0)[None, :]
    if BIASED:
        total += tl.load(bias + g * NG + o, mask=o < NG, other=0).to(tl.float32)[None, :]
    store(out, total, 0, p, count, rows * columns, g, o, NG, LAST)
