# mypy: ignore-errors
# (Triton's language, not Python's)
"""Multi-scale deformable attention in Triton: the forward.

    out[n, q, m * D + d] = sum over levels l and their points k of
        weights[n, q, m, k] * bilinear(value_l[n, :, m, d], x * W_l - 0.5, y * H_l - 0.5)

What bounds it are the loads through the L1 cache, four pixels of D channels for each sample: fewer instructions beside
them were measured to gain nothing. The threads of a warp hold D along 16 bytes each, and then points of a level: those
lie together, so their locations are loaded at once, 8 bytes for each. In the common case of D = 32 and four points a
warp takes those of a query at once in float32, of two in half precision, and of twice as many where queries are many; a
program is one warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._multi_scale_deform_samples import (
    SIZES,
    is_inside,
    load_pairs,
    nearest_index,
    upper_left_of,
)


@triton.jit
def add_level(
    total, first, locations, weights, row, exists, p, d, has_channel, point, start, height, width,
    PITCH: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr, DISCRETE: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """total + what the COUNT points of a level give, whose pixels are PITCH elements apart, and ``start`` the first."""
    for first_point in range(0, COUNT, BLOCK_P):
        # Of a level without pixels no location counts, infinite ones neither.
        sampled = exists & (first_point + p < tl.where(height * width > 0, COUNT, 0))
        index = row * K + (point + first_point + p)
        x, y = load_pairs(locations, index, sampled, DTYPE)
        factor = tl.load(weights + index, mask=sampled, other=0).to(DTYPE)
        if DISCRETE:
            i = nearest_index(y, height, DTYPE)
            j = nearest_index(x, width, DTYPE)
            pixel = ((start + i * width + j).to(INDEX) * PITCH)[:, None] + d
            inside = (sampled & (i >= 0) & (j >= 0))[:, None] & has_channel
            total += factor[:, None] * tl.load(first + pixel, mask=inside, other=0).to(DTYPE)
        else:
            i, j, ly, lx = upper_left_of(x, y, height, width, DTYPE)
            up = is_inside(i, height)
            down = is_inside(i + 1, height)
            left = is_inside(j, width)
            right = is_inside(j + 1, width)
            pixel = first + (((start + i * width + j).to(INDEX) * PITCH)[:, None] + d)
            below = width.to(INDEX) * PITCH
            v00 = tl.load(pixel, mask=(up & left)[:, None] & has_channel, other=0).to(DTYPE)
            v01 = tl.load(pixel + PITCH, mask=(up & right)[:, None] & has_channel, other=0).to(DTYPE)
            v10 = tl.load(pixel + below, mask=(down & left)[:, None] & has_channel, other=0).to(DTYPE)
            v11 = tl.load(pixel + (below + PITCH), mask=(down & right)[:, None] & has_channel, other=0).to(DTYPE)
            upper = factor * (1 - ly)
            lower = factor * ly
            total += (upper * (1 - lx))[:, None] * v00
            total += (upper * lx)[:, None] * v01
            total += (lower * (1 - lx))[:, None] * v10
            total += (lower * lx)[:, None] * v11
    return total


@triton.jit(do_not_specialize=["queries", "pixels", *SIZES])
def forward(
    value, locations, weights, out, queries, pixels,
    h0, w0, h1, w1, h2, w2, h3, w3, h4, w4, h5, w5, h6, w6, h7, w7,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, K: tl.constexpr, POINTS: tl.constexpr,
    DISCRETE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (N * M * blocks of queries, which vary fastest, blocks of channels).

    So programs that run together share a head, whose small levels stay in the L1 cache.
    """
    DTYPE: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(queries, BLOCK_Q)
    unit = tl.program_id(0) // blocks
    lane = tl.arange(0, BLOCK_Q * BLOCK_P)
    q = (tl.program_id(0) - unit * blocks) * BLOCK_Q + lane // BLOCK_P
    p = lane % BLOCK_P
    n = unit // M
    m = unit - n * M
    exists = q < queries
    d = tl.arange(0, BLOCK_D)[None, :]
    if D > BLOCK_D:
        d += tl.program_id(1) * BLOCK_D
    has_channel = d < D
    row = (n.to(tl.int64) * queries + q) * M + m
    first = value + (n.to(tl.int64) * pixels * M + m) * D
    total = tl.zeros([BLOCK_Q * BLOCK_P, BLOCK_D], DTYPE)
    point = 0
    start = 0
    sizes = (h0, w0, h1, w1, h2, w2, h3, w3, h4, w4, h5, w5, h6, w6, h7, w7)
    for level in tl.static_range(L):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        total = add_level(
            total, first, locations, weights, row, exists, p, d, has_channel, point, start, height, width,
            M * D, K, (POINTS >> (16 * level)) % 65536, DISCRETE, DTYPE, INDEX, BLOCK_P,
        )  # fmt: skip
        point += (POINTS >> (16 * level)) % 65536
        start += height * width
    total = tl.sum(tl.reshape(total, [BLOCK_Q, BLOCK_P, BLOCK_D]), 1)
    q = (tl.program_id(0) - unit * blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    pointers = out + ((n.to(tl.int64) * queries + q) * M + m)[:, None] * D + d
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(q < queries)[:, None] & has_channel)
