# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution in Triton in one kernel, for offset groups of fewer channels than tensor cores take at a time.

Names are those of ``_deform_columns``. A block of BLOCK_K channels spans whole offset groups of one weight group, and
there is no plan in memory: it would be larger than the offsets and masks that it is made of. Products of float32 are
split into float16 (``_float16_products``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._deform_columns import sample_positions
from omniops.backends.cuda._deform_fused import store
from omniops.backends.cuda._float16_products import multiply_add, weights_in


@triton.jit
def load_offsets(
    item, tensors, steps, exists, g,
    CD: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets and factors of an item, a tap of a block of channels, as in memory: (offset groups, positions).

    ``tensors`` are offset and mask, and where the positions lie in each; ``steps`` their strides along the channels.
    """
    offset, mask, offset_index, mask_index = tensors
    offset_c, mask_c = steps
    d = (g * CG + item // K * BLOCK_K) // CD + tl.arange(0, BLOCK_K // CD)
    unit = (d * K + item % K).to(tl.int64)[:, None]
    pointers = offset + (unit * 2 * offset_c + offset_index[None, :])
    y = tl.load(pointers, mask=exists[None, :], other=0)
    x = tl.load(pointers + offset_c, mask=exists[None, :], other=0)
    factor = y
    if MASKED:
        factor = tl.load(mask + (unit * mask_c + mask_index[None, :]), mask=exists[None, :], other=0)
    return y, x, factor


@triton.jit
def load_corners(
    item, offsets, image, image_start, position, g, size, geometry,
    C: tl.constexpr, CD: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pixels at the corners of an item's samples, (offset groups, positions, channels of a group), and their
    weights, (offset groups, positions)."""
    y, x, factor = offsets
    i, j = position
    _, width = size
    row, column, ly, lx = sample_positions(y, x, i, j, item % K, size, geometry, 0, tl.float32)
    upper_weight = 1 - ly
    if MASKED:
        upper_weight *= factor.to(tl.float32)
        ly *= factor.to(tl.float32)
    c = g * CG + item // K * BLOCK_K + tl.arange(0, BLOCK_K // CD) * CD
    pixel = row * (width + 2) + column
    first = (image_start[None, :] + pixel) * C + c[:, None]
    upper = image + (first[:, :, None] + tl.arange(0, CD)[None, None, :])
    lower = upper + (width + 2) * C
    return (
        tl.load(upper), tl.load(upper + C), tl.load(lower), tl.load(lower + C),
        upper_weight * (1 - lx), upper_weight * lx, ly * (1 - lx), ly * lx,
    )  # fmt: skip


@triton.jit
def blend(corners, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The samples of an item, (positions, channels), from what ``load_corners`` gives."""
    v00, v01, v10, v11, w00, w01, w10, w11 = corners
    value = w00[:, :, None] * v00.to(tl.float32)
    value += w01[:, :, None] * v01.to(tl.float32)
    value += w10[:, :, None] * v10.to(tl.float32)
    value += w11[:, :, None] * v11.to(tl.float32)
    return tl.reshape(tl.permute(value, (1, 0, 2)), (BLOCK_M, BLOCK_K))


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

    ``out`` is contiguous, or channels_last (LAST). Weights of float32 are split into float16, without low halves where
    not PRECISE. What an item needs is read while the one before is multiplied: offsets two items ahead, pixels one.

    Grid: (blocks of positions, groups).
    """
    g, o = tl.program_id(1), tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = p < count
    n = tl.where(exists, p, 0) // (rows * columns)
    index_in_image = tl.where(exists, p, 0) - n * (rows * columns)
    i = index_in_image // columns
    j = index_in_image - i * columns
    n = n.to(tl.int64)
    image_start = n * ((height + 2) * (width + 2))
    offset_index = n * offset_n + i.to(tl.int64) * offset_y + j.to(tl.int64) * offset_x
    mask_index = n * mask_n + i.to(tl.int64) * mask_y + j.to(tl.int64) * mask_x
    # What is read of weights past the last is not stored.
    weight_index = (tl.where(o < NG, o, 0) * (K * CG))[None, :] + tl.arange(0, BLOCK_K)[:, None]
    if image.dtype.element_ty == tl.float32:
        weight, weight_low = weights_in(weight, tl.num_programs(1).to(tl.int64) * (NG * K * CG))
        weight_low += g.to(tl.int64) * (NG * K * CG)
    weight += g.to(tl.int64) * (NG * K * CG)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    LAST_ITEM: tl.constexpr = CG // BLOCK_K * K - 1
    tensors, steps = (offset, mask, offset_index, mask_index), (offset_c, mask_c)
    position, size = (i, j), (height, width)
    geometry = (KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X)
    offsets = load_offsets(0, tensors, steps, exists, g, CD, CG, K, MASKED, BLOCK_K)
    corners = load_corners(0, offsets, image, image_start, position, g, size, geometry, C, CD, CG, K, MASKED, BLOCK_K)
    offsets = load_offsets(min(1, LAST_ITEM), tensors, steps, exists, g, CD, CG, K, MASKED, BLOCK_K)
    for item in range(LAST_ITEM + 1):
        a = blend(corners, BLOCK_M, BLOCK_K)
        corners = load_corners(
            tl.minimum(item + 1, LAST_ITEM), offsets, image, image_start, position, g, size, geometry,
            C, CD, CG, K, MASKED, BLOCK_K,
        )  # fmt: skip
        offsets = load_offsets(tl.minimum(item + 2, LAST_ITEM), tensors, steps, exists, g, CD, CG, K, MASKED, BLOCK_K)
        index = weight_index + (item % K * CG + item // K * BLOCK_K)
        b = tl.load(weight + index)
        if image.dtype.element_ty == tl.float32:
            b_low = tl.load(weight_low + index) if PRECISE else b
            total = multiply_add(a, b, b_low, total, PRECISE)
        else:
            total = tl.dot(a.to(b.dtype), b, total)
    if image.dtype.element_ty == tl.float32:
        total *= tl.load(weight_scales + g * NG + o, mask=o < NG, other=0)[None, :]
    if BIASED:
        total += tl.load(bias + g * NG + o, mask=o < NG, other=0).to(tl.float32)[None, :]
    store(out, total, 0, p, count, rows * columns, g, o, NG, LAST)
