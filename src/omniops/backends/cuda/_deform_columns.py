# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution in Triton: where the samples lie, columns of them in memory, and what comes back from those.

Names: N batch, C channels, H, W of the input; D offset groups of CD channels; G weight groups of CG channels; K taps;
P positions of the result, numbered through the batch, ROWS x COLUMNS to an image. A sample is that of an offset group
d, a tap t and a position p, and its number is (d * K + t) * P + p.

The *image* is (N, H + 2, W + 2, C): channels lie together, as they are sampled at one position, and a border of zeros
makes every corner of every sample readable. A *plan* says of each sample the number of its upper left pixel in the
image, how far below (ly) and right of it (lx) the sample lies, and its factor, the mask's. A sample outside the map has
corners in the border alone, and so has one whose position is not a number: that has a ly or lx which is none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relayout(
    source, target, height, width, C,
    source_n, source_c, source_y, source_x, target_n, target_c, target_y, target_x,
    BORDER: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """target[n, c, y, x] = source[n, c, y - BORDER, x - BORDER], zero outside; height and width are the target's.

    Grid: (rows of the target in the batch, blocks of columns, blocks of channels).
    """
    n = tl.program_id(0) // height
    y = tl.program_id(0) - n * height
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    from_y = y - BORDER
    from_x = x - BORDER
    some = (x < width)[:, None] & (c < C)[None, :]
    known = some
    if BORDER > 0:
        from_row = from_y + tl.zeros([BLOCK_X], tl.int32)
        inside = (from_x >= 0) & (from_x < width - 2 * BORDER) & (from_row >= 0) & (from_row < height - 2 * BORDER)
        known = known & inside[:, None]
    n = n.to(tl.int64)
    source += n * source_n + from_y.to(tl.int64) * source_y
    target += n * target_n + y.to(tl.int64) * target_y
    c = c.to(tl.int64)
    x = x.to(tl.int64)
    value = tl.load(source + ((x - BORDER) * source_x)[:, None] + (c * source_c)[None, :], mask=known, other=0)
    tl.store(target + (x * target_x)[:, None] + (c * target_c)[None, :], value.to(target.dtype.element_ty), mask=some)


@triton.jit
def plan(
    offset, mask, pixels, ly_plan, lx_plan, factors,
    first, count, height, width, rows, columns, D,
    K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The plan of the samples of the positions first ... first + count - 1, with p counted from first.

    Grid: (D * K * blocks of positions), the blocks varying fastest.
    """
    unit = tl.program_id(0) // tl.cdiv(count, BLOCK)
    p = (tl.program_id(0) - unit * tl.cdiv(count, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    t = unit % K
    some = p < count
    size = rows * columns
    n = (first + p) // size
    place = first + p - n * size
    i = place // columns
    j = place - i * columns
    channel = n.to(tl.int64) * (D * K) + unit
    at = offset + (channel * 2 * size + place)
    dtype = ly_plan.dtype.element_ty
    y = tl.load(at, mask=some, other=0).to(dtype) + (i * STRIDE_Y - PAD_Y + t // KW * STEP_Y).to(dtype)
    x = tl.load(at + size, mask=some, other=0).to(dtype) + (j * STRIDE_X - PAD_X + t % KW * STEP_X).to(dtype)
    outside = (y < -1) | (y >= height) | (x < -1) | (x >= width)
    far = outside | (y != y) | (x != x)
    upper = tl.floor(tl.where(far, -1, y)).to(tl.int32) + 1
    left = tl.floor(tl.where(far, width, x)).to(tl.int32) + 1
    to = unit.to(tl.int64) * count + p
    tl.store(pixels + to, (n.to(pixels.dtype.element_ty) * (height + 2) + upper) * (width + 2) + left, mask=some)
    tl.store(ly_plan + to, tl.where(outside, 0, y - tl.floor(y)), mask=some)
    tl.store(lx_plan + to, tl.where(outside, 0, x - tl.floor(x)), mask=some)
    if MASKED:
        tl.store(factors + to, tl.load(mask + (channel * size + place), mask=some, other=0).to(dtype), mask=some)


@triton.jit
def planned(pixels, ly_plan, lx_plan, factors, at, some, MASKED: tl.constexpr):
    """The upper left pixel of samples, and the weights of their corners."""
    pixel = tl.load(pixels + at, mask=some, other=0)
    ly = tl.load(ly_plan + at, mask=some, other=0)
    lx = tl.load(lx_plan + at, mask=some, other=0)
    upper = 1 - ly
    lower = ly
    if MASKED:
        factor = tl.load(factors + at, mask=some, other=0)
        upper *= factor
        lower *= factor
    return pixel, upper * (1 - lx), upper * lx, lower * (1 - lx), lower * lx


@triton.jit
def channels_of(first, CG, stride_g, stride_c, ONE_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a block of channels lies in columns. ONE_G: in one weight group, which shows that they lie together."""
    c = first + tl.arange(0, BLOCK_C)
    g = first // CG if ONE_G else c // CG
    return g.to(tl.int64) * stride_g + (c - g * CG).to(tl.int64) * stride_c


@triton.jit
def sample(
    image, pixels, ly_plan, lx_plan, factors, out,
    count, width, C, CD, CG, out_g, out_p, out_t, out_c,
    K: tl.constexpr, MASKED: tl.constexpr, ONE_D: tl.constexpr, ONE_G: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[g, p, t, c] = factor * interpolated image. ONE_D: a block of channels lies in one offset group.

    Grid: (blocks of positions, blocks of channels). A program walks the taps, as those of a position share pixels.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    more = (c < C)[None, :]
    every = (p < count)[:, None] & more
    channels = channels_of(tl.program_id(1) * BLOCK_C, CG, out_g, out_c, ONE_G, BLOCK_C)
    for t in range(K):
        if ONE_D:
            at = (((tl.program_id(1) * BLOCK_C // CD) * K + t).to(tl.int64) * count + p)[:, None]
            some = (p < count)[:, None]
        else:
            at = ((c // CD) * K + t).to(tl.int64)[None, :] * count + p[:, None]
            some = every
        pixel, w00, w01, w10, w11 = planned(pixels, ly_plan, lx_plan, factors, at, some, MASKED)
        dtype = w00.dtype
        upper = image + (pixel.to(tl.int64) * C + c[None, :])
        lower = upper + (width + 2) * C
        value = w00 * tl.load(upper, mask=more, other=0).to(dtype)
        value += w01 * tl.load(upper + C, mask=more, other=0).to(dtype)
        value += w10 * tl.load(lower, mask=more, other=0).to(dtype)
        value += w11 * tl.load(lower + C, mask=more, other=0).to(dtype)
        to = (p.to(tl.int64) * out_p + t * out_t)[:, None] + channels[None, :]
        tl.store(out + to, value.to(out.dtype.element_ty), mask=every)


@triton.jit
def gradients_of_place(
    by_columns, image, pixels, ly_plan, lx_plan, factors, by_offset, by_mask,
    first, count, width, rows, columns, C, D, CD, CG, column_g,
    K: tl.constexpr, MASKED: tl.constexpr, ONE_G: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of offset and mask.

    With s_ab the sum over the channels of the offset group of by_columns * the pixel at corner (a, b), and w_ab its
    weight: by_mask = sum of w_ab * s_ab, by_y = factor * ((1-lx) * (s_10 - s_00) + lx * (s_11 - s_01)), by_x alike.

    Grid: (blocks of positions, blocks of TAPS taps, offset groups).
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(2)
    some = p < count
    dtype = ly_plan.dtype.element_ty
    size = rows * columns
    n = (first + p) // size
    place = first + p - n * size
    for t in range(tl.program_id(1) * TAPS, tl.minimum(tl.program_id(1) * TAPS + TAPS, K)):
        at = (d * K + t).to(tl.int64) * count + p
        pixel = tl.load(pixels + at, mask=some, other=0).to(tl.int64)
        s00 = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        s01 = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        s10 = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        s11 = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        for start in range(0, CD, BLOCK_C):
            of_group = start + tl.arange(0, BLOCK_C)
            c = d * CD + of_group
            more = (of_group < CD)[None, :]
            channels = channels_of(d * CD + start, CG, column_g, 1, ONE_G, BLOCK_C)
            column_at = ((p.to(tl.int64) * K + t) * CG)[:, None] + channels[None, :]
            by_column = tl.load(by_columns + column_at, mask=some[:, None] & more, other=0).to(dtype)
            upper = image + ((pixel * C)[:, None] + c[None, :])
            lower = upper + (width + 2) * C
            s00 += by_column * tl.load(upper, mask=more, other=0).to(dtype)
            s01 += by_column * tl.load(upper + C, mask=more, other=0).to(dtype)
            s10 += by_column * tl.load(lower, mask=more, other=0).to(dtype)
            s11 += by_column * tl.load(lower + C, mask=more, other=0).to(dtype)
        t00 = tl.sum(s00, 1)
        t01 = tl.sum(s01, 1)
        t10 = tl.sum(s10, 1)
        t11 = tl.sum(s11, 1)
        ly = tl.load(ly_plan + at, mask=some, other=0)
        lx = tl.load(lx_plan + at, mask=some, other=0)
        channel = (n.to(tl.int64) * D + d) * K + t
        of_y = (1 - lx) * (t10 - t00) + lx * (t11 - t01)
        of_x = (1 - ly) * (t01 - t00) + ly * (t11 - t10)
        if MASKED:
            factor = tl.load(factors + at, mask=some, other=0)
            of_y *= factor
            of_x *= factor
            of_mask = (1 - ly) * ((1 - lx) * t00 + lx * t01) + ly * ((1 - lx) * t10 + lx * t11)
            tl.store(by_mask + (channel * size + place), of_mask.to(by_mask.dtype.element_ty), mask=some)
        to = by_offset + (channel * 2 * size + place)
        tl.store(to, of_y.to(by_offset.dtype.element_ty), mask=some)
        tl.store(to + size, of_x.to(by_offset.dtype.element_ty), mask=some)


@triton.jit
def gather(
    by_columns, order, starts, ly_plan, lx_plan, factors, by_image,
    count, first_image, height, width, C, D, CD, CG, column_g,
    K: tl.constexpr, MASKED: tl.constexpr, ONE_G: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """by_image[n, y, x, c] += sum of weight * by_columns over the samples that have (y, x) for a corner.

    ``order`` lists the samples by offset group and upper left pixel, those of pixel i of group d from starts[d, i] on,
    in their own order: so the order of the sum is fixed. Samples whose upper left pixel is the left or the right one of
    a pair follow each other, and are walked as one list. by_image has no border, the pixels of starts have.

    Grid: (blocks of pixels of the chunk's images, offset groups, blocks of their channels).
    """
    size = height * width
    n = tl.program_id(0) // tl.cdiv(size, BLOCK_X)
    images = tl.num_programs(0) // tl.cdiv(size, BLOCK_X)
    pixel = (tl.program_id(0) - n * tl.cdiv(size, BLOCK_X)) * BLOCK_X + tl.arange(0, BLOCK_X)
    known = pixel < size
    y = pixel // width
    x = pixel - y * width
    d = tl.program_id(1)
    of_group = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    more = of_group < CD
    channels = channels_of(d * CD + tl.program_id(2) * BLOCK_C, CG, column_g, 1, ONE_G, BLOCK_C)
    dtype = ly_plan.dtype.element_ty
    total = tl.zeros([BLOCK_X, BLOCK_C], dtype)
    for a in range(2):  # the pixel is in the upper row of the samples' corners, or in the lower
        cell = ((d * images + n).to(tl.int64) * (height + 2) + y + 1 - a) * (width + 2) + x
        begin = tl.load(starts + cell, mask=known, other=0)
        middle = tl.load(starts + cell + 1, mask=known, other=0)
        end = tl.load(starts + cell + 2, mask=known, other=0)
        for start in range(0, tl.max(end - begin), BLOCK_E):
            place = begin[:, None] + start + tl.arange(0, BLOCK_E)[None, :]
            some = place < end[:, None]
            e = tl.load(order + place, mask=some, other=0).to(tl.int64)
            ly = tl.load(ly_plan + e, mask=some, other=0)
            lx = tl.load(lx_plan + e, mask=some, other=0)
            weight = tl.where(a == 0, 1 - ly, ly) * tl.where(place < middle[:, None], lx, 1 - lx)
            if MASKED:
                weight *= tl.load(factors + e, mask=some, other=0)
            unit = e // count
            row = (e - unit * count) * K + unit - d * K
            values = tl.load(
                by_columns + ((row * CG)[:, :, None] + channels[None, None, :]),
                mask=some[:, :, None] & more[None, None, :],
                other=0,
            )
            total += tl.sum(tl.where(some, weight, 0)[:, :, None] * values.to(dtype), 1)
    to = by_image + ((first_image + n).to(tl.int64) * size + pixel)[:, None] * C + (d * CD + of_group)[None, :]
    every = known[:, None] & more[None, :]
    tl.store(to, tl.load(to, mask=every, other=0) + total, mask=every)
