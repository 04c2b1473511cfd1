# mypy: ignore-errors
# (Triton's language, not Python's)
"""Multi-scale deformable attention in Triton: the gradient of value without atomics.

A *cell* is a place between pixels: those of a level that has pixels are (H + 1) rows of W + 1, and cell (i + 1, j + 1)
has the samples whose upper left corner is (i, j). The samples are sorted by head, level and cell; each pixel then sums
over the samples of the four cells around it, in their order.
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


@triton.jit(do_not_specialize=["rows", "queries", "cells", *SIZES])
def cells_of(
    locations, keys, rows, queries, cells,
    h0, w0, h1, w1, h2, w2, h3, w3, h4, w4, h5, w5, h6, w6, h7, w7,
    M: tl.constexpr, L: tl.constexpr, K: tl.constexpr, POINTS: tl.constexpr, DISCRETE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """keys[n, q, m, k] = (n * M + m) * cells + the sample's cell among those of all levels, or N * M * cells for none.

    Grid: blocks of rows.
    """
    DTYPE: tl.constexpr = tl.float64 if locations.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    m = row % M
    unit = row // M // queries * M + m
    none = rows.to(tl.int64) // queries * cells
    point = 0
    start = 0
    sizes = (h0, w0, h1, w1, h2, w2, h3, w3, h4, w4, h5, w5, h6, w6, h7, w7)
    for level in tl.static_range(L):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        for first_point in range(0, (POINTS >> (16 * level)) % 65536, BLOCK_P):
            p = first_point + tl.arange(0, BLOCK_P)
            in_level = exists[:, None] & (p < (POINTS >> (16 * level)) % 65536)[None, :]
            index = row[:, None] * K + (point + p)[None, :]
            x, y = load_pairs(locations, index, in_level, DTYPE)
            if DISCRETE:
                i = nearest_index(y, height, DTYPE)
                j = nearest_index(x, width, DTYPE)
                inside = (i >= 0) & (j >= 0)
            else:
                i, j, _, _ = upper_left_of(x, y, height, width, DTYPE)
                inside = is_inside(i, height) | is_inside(i + 1, height)
                inside &= is_inside(j, width) | is_inside(j + 1, width)
            cell = start + (i + 1).to(tl.int64) * (width + 1) + j + 1
            key = tl.where(inside, (unit * cells)[:, None] + cell, none)
            tl.store(keys + index, key.to(keys.dtype.element_ty), mask=in_level)
        point += (POINTS >> (16 * level)) % 65536
        start += tl.where(height * width > 0, (height + 1).to(tl.int64) * (width + 1), 0)


@triton.jit(do_not_specialize=["pixels", "cells", "height", "width", "start", "start_of_cells"])
def gather(
    grad, locations, weights, order, starts, by_value, pixels, cells, height, width, start, start_of_cells,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DISCRETE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """by_value[n, pixel of the level, m] = sum of weights * the pixel's weight * grad over the samples around it.

    ``order`` lists the samples by their keys, those of a key from starts[key] on. Those of a cell and of the one to the
    right of it follow each other, and are walked as one list. Grid: (N * M * blocks of pixels, blocks of channels).
    """
    DTYPE: tl.constexpr = tl.float64 if by_value.dtype.element_ty == tl.float64 else tl.float32
    size = height * width
    blocks = tl.cdiv(size, BLOCK_X)
    unit = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) - unit * blocks) * BLOCK_X + tl.arange(0, BLOCK_X)
    in_level = pixel < size
    i = pixel // width
    j = pixel - i * width
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    has_channel = d < D
    total = tl.zeros([BLOCK_X, BLOCK_D], DTYPE)
    for a in range(2):  # the pixel is in the upper row of the samples' corners, or in the lower
        cell = unit.to(tl.int64) * cells + start_of_cells + (i + 1 - a).to(tl.int64) * (width + 1) + j
        begin = tl.load(starts + cell, mask=in_level, other=0).to(tl.int64)
        middle = tl.load(starts + cell + 1, mask=in_level, other=0).to(tl.int64)
        end = tl.load(starts + cell + 2, mask=in_level, other=0).to(tl.int64)
        for first in range(0, tl.max(end - begin), BLOCK_E):
            rank = begin[:, None] + first + tl.arange(0, BLOCK_E)[None, :]
            exists = rank < end[:, None]
            sample = tl.load(order + rank, mask=exists, other=0)
            x, y = load_pairs(locations, sample, exists, DTYPE)
            factor = tl.load(weights + sample, mask=exists, other=0).to(DTYPE)
            is_right = rank < middle[:, None]
            if DISCRETE:
                # The pixel itself is the upper left corner.
                exists = exists & (rank >= tl.where(a == 0, middle, end)[:, None])
            else:
                _, _, ly, lx = upper_left_of(x, y, height, width, DTYPE)
                factor *= tl.where(a == 0, 1 - ly, ly) * tl.where(is_right, lx, 1 - lx)
            values = tl.load(
                grad + ((sample // K * D)[:, :, None] + d[None, None, :]),
                mask=exists[:, :, None] & has_channel[None, None, :],
                other=0,
            )
            total += tl.sum(tl.where(exists, factor, 0)[:, :, None] * values.to(DTYPE), 1)
    row = (unit // M).to(tl.int64) * pixels + start + pixel
    pointers = by_value + ((row * M + unit % M) * D)[:, None] + d[None, :]
    tl.store(pointers, total.to(by_value.dtype.element_ty), mask=in_level[:, None] & has_channel[None, :])
