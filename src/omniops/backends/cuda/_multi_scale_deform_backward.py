# mypy: ignore-errors
# (Triton's language, not Python's)
"""Multi-scale deformable attention in Triton: the backward.

With g = grad[n, q, m, :] and the corners v00, v01, v10, v11 of a sample k at (h, w), ly and lx from its upper left one:

    by_weights = <g, sample>
    by_x = weights * W_l * <g, (1 - ly) * (v01 - v00) + ly * (v11 - v10)>
    by_y = weights * H_l * <g, (1 - lx) * (v10 - v00) + lx * (v11 - v01)>
    by_value at each corner += weights * the corner's weight * g

The products of g with the four corners make the first three. The sums over value are atomics in float32, 16 bytes a
thread, a pixel's D channels together: they bound the kernel, at the rate of the L2 cache. In the common case of D = 32
a warp takes a query's four points of a level at a time; a program is one warp, or two where queries are few.
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
def add(pointers, factor, grads, inside):
    """Add factor * grads at corners inside of the map."""
    tl.atomic_add(pointers, factor[:, None] * grads, mask=inside, sem="relaxed")


@triton.jit
def store_pair(pairs, index, x, y, in_level):
    """x and y of samples."""
    x = x.to(pairs.dtype.element_ty)
    y = y.to(pairs.dtype.element_ty)
    if pairs.dtype.element_ty == tl.float32:
        low = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        bits = low | (y.to(tl.int32, bitcast=True).to(tl.int64) << 32)
        tl.store(pairs.to(tl.pointer_type(tl.int64)) + index, bits, mask=in_level)
    else:
        tl.store(pairs + 2 * index, x, mask=in_level)
        tl.store(pairs + 2 * index + 1, y, mask=in_level)


@triton.jit
def sample_gradients(p00, p01, p10, p11, ly, lx):
    """Of each product of g with a corner, by channel: the sums for by_weights, and for by_x and by_y without factors.

    The sums come last, as each takes steps between threads.
    """
    above = (1 - lx) * p00 + lx * p01
    under = (1 - lx) * p10 + lx * p11
    by_weight = tl.sum((1 - ly) * above + ly * under, 1)
    by_x = tl.sum((1 - ly) * (p01 - p00) + ly * (p11 - p10), 1)
    return by_weight, by_x, tl.sum(under - above, 1)


@triton.jit
def load_grads(
    grad, first, row, exists, channel, has_channel,
    D: tl.constexpr, DTYPE: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The rows of grad for a block of channels: ``first``, which are loaded, where there is one block."""
    if CHANNEL_BLOCKS == 1:
        return first
    else:  # noqa: RET505 - only so is the other branch left out
        return tl.load(grad + row[:, None] * D + channel, mask=exists[:, None] & has_channel, other=0).to(DTYPE)


@triton.jit
def backward_level(
    inputs, gradients, row, exists, p, d, grads, point, start, add_start, size,
    PITCH: tl.constexpr, D: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SAMPLES: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The gradients by the COUNT points of a level; its pixels are PITCH elements apart, and ``start`` is the first.

    ``add_start`` is the first in by_value; ``grads`` is grad for the first of CHANNEL_BLOCKS blocks of channels.
    """
    grad, value, locations, weights = inputs
    by_value, by_locations, by_weights = gradients
    height, width = size
    for first_point in range(0, COUNT, BLOCK_P):
        in_level = exists & (first_point + p < COUNT)
        index = row * K + (point + first_point + p)
        # Of a level without pixels no location counts, infinite ones neither.
        sampled = exists & (first_point + p < tl.where(height * width > 0, COUNT, 0))
        x, y = load_pairs(locations, index, sampled, DTYPE)
        factor = tl.load(weights + index, mask=sampled, other=0).to(DTYPE)
        i, j, ly, lx = upper_left_of(x, y, height, width, DTYPE)
        up, down = is_inside(i, height), is_inside(i + 1, height)
        left, right = is_inside(j, width), is_inside(j + 1, width)
        upper, lower = factor * (1 - ly), factor * ly
        pixel = ((start + i * width + j).to(INDEX) * PITCH)[:, None]
        ahead = (add_start - start).to(INDEX) * PITCH
        below = width.to(INDEX) * PITCH
        p00 = tl.zeros_like(grads)
        p01 = p00
        p10 = p00
        p11 = p00
        for channel_block in range(CHANNEL_BLOCKS):
            channel = d + channel_block * BLOCK_D
            has_channel = channel < D
            g = load_grads(grad, grads, row, exists, channel, has_channel, D, DTYPE, CHANNEL_BLOCKS)
            pointers = value + (pixel + channel)
            add_pointers = by_value + ahead + (pixel + channel)
            m00, m01 = (up & left)[:, None] & has_channel, (up & right)[:, None] & has_channel
            m10, m11 = (down & left)[:, None] & has_channel, (down & right)[:, None] & has_channel
            if BY_SAMPLES:
                p00 += g * tl.load(pointers, mask=m00, other=0).to(DTYPE)
                p01 += g * tl.load(pointers + PITCH, mask=m01, other=0).to(DTYPE)
                pointers += below
                p10 += g * tl.load(pointers, mask=m10, other=0).to(DTYPE)
                p11 += g * tl.load(pointers + PITCH, mask=m11, other=0).to(DTYPE)
            if BY_VALUE:
                add(add_pointers, upper * (1 - lx), g, m00)
                add(add_pointers + PITCH, upper * lx, g, m01)
                add_pointers += below
                add(add_pointers, lower * (1 - lx), g, m10)
                add(add_pointers + PITCH, lower * lx, g, m11)
        if BY_SAMPLES:
            by_weight, by_x, by_y = sample_gradients(p00, p01, p10, p11, ly[:, None], lx[:, None])
            # Zero times what is not finite in grad, where a level has no pixels.
            by_x = tl.where(sampled, by_x * (factor * width.to(DTYPE)), 0.0)
            by_y = tl.where(sampled, by_y * (factor * height.to(DTYPE)), 0.0)
            by_weight = tl.where(sampled, by_weight, 0.0)
            store_pair(by_locations, index, by_x, by_y, in_level)
            tl.store(by_weights + index, by_weight.to(by_weights.dtype.element_ty), mask=in_level)


@triton.jit
def backward_nearest(
    inputs, gradients, row, exists, p, d, grads, point, start, add_start, size,
    PITCH: tl.constexpr, D: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SAMPLES: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
):  # fmt: skip
    """``backward_level`` for the method "discrete": the pixel takes weights * g, and by_x and by_y are zero."""
    grad, value, locations, weights = inputs
    by_value, by_locations, by_weights = gradients
    height, width = size
    for first_point in range(0, COUNT, BLOCK_P):
        in_level = exists & (first_point + p < COUNT)
        index = row * K + (point + first_point + p)
        # Of a level without pixels no location counts, infinite ones neither.
        sampled = exists & (first_point + p < tl.where(height * width > 0, COUNT, 0))
        x, y = load_pairs(locations, index, sampled, DTYPE)
        factor = tl.load(weights + index, mask=sampled, other=0).to(DTYPE)
        i = nearest_index(y, height, DTYPE)
        j = nearest_index(x, width, DTYPE)
        inside = (in_level & (i >= 0) & (j >= 0))[:, None]
        pixel = ((start + i * width + j).to(INDEX) * PITCH)[:, None]
        ahead = (add_start - start).to(INDEX) * PITCH
        products = tl.zeros_like(grads)
        for channel_block in range(CHANNEL_BLOCKS):
            channel = d + channel_block * BLOCK_D
            has_channel = channel < D
            g = load_grads(grad, grads, row, exists, channel, has_channel, D, DTYPE, CHANNEL_BLOCKS)
            pointers = value + (pixel + channel)
            if BY_SAMPLES:
                products += g * tl.load(pointers, mask=inside & has_channel, other=0).to(DTYPE)
            if BY_VALUE:
                add(by_value + ahead + (pixel + channel), factor, g, inside & has_channel)
        if BY_SAMPLES:
            by_weight = tl.where(sampled, tl.sum(products, 1), 0.0)
            store_pair(by_locations, index, tl.zeros_like(by_weight), tl.zeros_like(by_weight), in_level)
            tl.store(by_weights + index, by_weight.to(by_weights.dtype.element_ty), mask=in_level)


@triton.jit(do_not_specialize=["queries", "pixels", "first_small", "copies", *SIZES])
def backward(
    grad, value, locations, weights, by_value, by_locations, by_weights, queries, pixels, first_small, copies,
    h0, w0, h1, w1, h2, w2, h3, w3, h4, w4, h5, w5, h6, w6, h7, w7,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, K: tl.constexpr, POINTS: tl.constexpr,
    DISCRETE: tl.constexpr, WIDE: tl.constexpr, BY_VALUE: tl.constexpr, BY_SAMPLES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
):  # fmt: skip
    """With BY_VALUE adds to by_value, which holds zeros; with BY_SAMPLES writes the others.

    An image of by_value has ``copies`` of the pixels from ``first_small`` on, one after another: of small levels, to
    which so many samples add that they would wait for each other. ``finish`` sums them.

    Grid: N * M * blocks of queries, which vary fastest.
    """
    DTYPE: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(queries, BLOCK_Q)
    unit = tl.program_id(0) // blocks
    block = tl.program_id(0) - unit * blocks
    lane = tl.arange(0, BLOCK_Q * BLOCK_P)
    q = block * BLOCK_Q + lane // BLOCK_P
    p = lane % BLOCK_P
    n = unit // M
    m = unit - n * M
    exists = q < queries
    row = (n.to(tl.int64) * queries + q) * M + m
    image = (n.to(tl.int64) * pixels * M + m) * D
    small = pixels - first_small
    add_image = (n.to(tl.int64) * (pixels + (copies - 1) * small) * M + m) * D
    copy = block % copies * small
    d = tl.arange(0, BLOCK_D)[None, :]
    grads = tl.load(grad + row[:, None] * D + d, mask=exists[:, None] & (d < D), other=0).to(DTYPE)
    point = 0
    start = 0
    sizes = (h0, w0, h1, w1, h2, w2, h3, w3, h4, w4, h5, w5, h6, w6, h7, w7)
    for level in tl.static_range(L):
        height, width = sizes[2 * level], sizes[2 * level + 1]
        inputs = (grad, value + image, locations, weights)
        gradients = (by_value + add_image, by_locations, by_weights)
        add_start = start + tl.where(start >= first_small, copy, 0)
        if DISCRETE:
            backward_nearest(
                inputs, gradients, row, exists, p, d, grads, point, start, add_start, (height, width),
                M * D, D, K, (POINTS >> (16 * level)) % 65536, BY_VALUE, BY_SAMPLES, DTYPE, INDEX,
                BLOCK_P, BLOCK_D, CHANNEL_BLOCKS,
            )  # fmt: skip
        else:
            backward_level(
                inputs, gradients, row, exists, p, d, grads, point, start, add_start, (height, width),
                M * D, D, K, (POINTS >> (16 * level)) % 65536, BY_VALUE, BY_SAMPLES, DTYPE, INDEX,
                BLOCK_P, BLOCK_D, CHANNEL_BLOCKS,
            )  # fmt: skip
        point += (POINTS >> (16 * level)) % 65536
        start += height * width


@triton.jit(do_not_specialize=["pixels", "first_small", "copies"])
def finish(total, out, pixels, first_small, copies, PITCH: tl.constexpr, BLOCK: tl.constexpr):
    """out = total in its dtype, with the copies of small levels summed. Grid: N * blocks of an image."""
    blocks = tl.cdiv(pixels.to(tl.int64) * PITCH, BLOCK)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) - n * blocks
    small = pixels - first_small
    index = block * BLOCK + tl.arange(0, BLOCK)
    exists = index < pixels.to(tl.int64) * PITCH
    first = total + n * (pixels + (copies - 1) * small) * PITCH
    values = tl.load(first + index, mask=exists, other=0)
    if block * BLOCK + BLOCK > first_small.to(tl.int64) * PITCH:
        is_copied = exists & (index >= first_small.to(tl.int64) * PITCH)
        for copy in range(1, copies):
            values += tl.load(first + (small.to(tl.int64) * copy * PITCH + index), mask=is_copied, other=0)
    tl.store(out + n * pixels * PITCH + index, values.to(out.dtype.element_ty), mask=exists)
