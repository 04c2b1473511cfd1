# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution in Triton: where the samples lie, columns of them in memory, and what comes back from those.

Names: N batch, C channels, H, W of the input; D offset groups of CD channels; G weight groups of CG channels; K taps;
P positions of the result, numbered through the batch, ROWS x COLUMNS to an image. A sample is that of an offset group
d, a tap t and a position p, and its number is (d * K + t) * P + p.

The *image* is (N, H + 2, W + 2, C): channels lie together, as they are sampled at one position, and a border of zeros
makes every corner of every sample readable. A *plan* says of each sample the number of its upper left pixel in the
image (in ``pixels``), how far below (ly) and right of it (lx) the sample lies, and its factor, the mask's (in
``fractions``: the ly of all samples, then their lx, then their factors). A sample outside the map has
corners in the border alone, and so has one whose position is not a number: that has a ly or lx which is none.

Sizes of maps, numbers of positions and strides are not specialised, so that no map of another size is compiled for.
Numbers of channels, groups and taps are constants, for wide loads and stores along the channels, and so are stride,
padding and dilation, which a network does not change.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upper_left_of(y, x, height, width):
    """Of samples at (y, x): row and column of their upper left pixel in the image, ly and lx."""
    outside = (y < -1) | (y >= height) | (x < -1) | (x >= width)
    far = outside | (y != y) | (x != x)
    upper = tl.floor(tl.where(far, -1, y)).to(tl.int32) + 1
    left = tl.floor(tl.where(far, width, x)).to(tl.int32) + 1
    return upper, left, tl.where(outside, 0, y - tl.floor(y)), tl.where(outside, 0, x - tl.floor(x))


@triton.jit
def sample_positions(y, x, i, j, t, size, geometry, AXIS: tl.constexpr, DTYPE: tl.constexpr):
    """``upper_left_of`` for offsets (y, x) of tap t at positions (i, j).

    Positions are numbers along one axis, and so are the offsets, or these have another beside it, AXIS. ``geometry`` is
    (KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X).
    """
    KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X = geometry
    height, width = size
    y = y.to(DTYPE)
    tap_y = (i * STRIDE_Y - PAD_Y + t // KW * STEP_Y).to(DTYPE)
    if AXIS >= 0:
        tap_y = tl.expand_dims(tap_y, AXIS)
    y += tap_y
    x = x.to(DTYPE)
    tap_x = (j * STRIDE_X - PAD_X + t % KW * STEP_X).to(DTYPE)
    if AXIS >= 0:
        tap_x = tl.expand_dims(tap_x, AXIS)
    x += tap_x
    return upper_left_of(y, x, height, width)


@triton.jit
def write_plan(
    offset, mask, pixels, fractions, block, first, count, size, result_size, offset_strides, mask_strides, geometry,
    D: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The plan of the samples of the positions first ... first + count - 1, with p counted from first.

    Blocks: D * K * blocks of positions, which vary fastest.
    """
    height, width = size
    rows, columns = result_size
    offset_n, offset_c, offset_y, offset_x = offset_strides
    mask_n, mask_c, mask_y, mask_x = mask_strides
    unit = block // tl.cdiv(count, BLOCK)
    p = (block - unit * tl.cdiv(count, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    t = unit % K
    exists = p < count
    positions = rows * columns
    n = (first + p) // positions
    index_in_image = first + p - n * positions
    i = index_in_image // columns
    j = index_in_image - i * columns
    index = n.to(tl.int64) * offset_n + unit.to(tl.int64) * 2 * offset_c + i.to(tl.int64) * offset_y
    index += j.to(tl.int64) * offset_x
    dtype = fractions.dtype.element_ty
    y = tl.load(offset + index, mask=exists, other=0).to(dtype)
    x = tl.load(offset + index + offset_c, mask=exists, other=0).to(dtype)
    upper, left, ly, lx = sample_positions(y, x, i, j, t, size, geometry, -1, dtype)
    out_index = unit.to(tl.int64) * count + p
    plane = (D * K) * count.to(tl.int64)
    pointers = pixels + out_index
    tl.store(pointers, (n.to(pixels.dtype.element_ty) * (height + 2) + upper) * (width + 2) + left, mask=exists)
    tl.store(fractions + out_index, ly, mask=exists)
    tl.store(fractions + plane + out_index, lx, mask=exists)
    if MASKED:
        index = n.to(tl.int64) * mask_n + unit.to(tl.int64) * mask_c + i.to(tl.int64) * mask_y + j.to(tl.int64) * mask_x
        tl.store(fractions + 2 * plane + out_index, tl.load(mask + index, mask=exists, other=0).to(dtype), mask=exists)


@triton.jit
def load_plan(pixels, fractions, plane, index, exists, MASKED: tl.constexpr):
    """The upper left pixel of samples, and the weights of their corners."""
    pixel = tl.load(pixels + index, mask=exists, other=0)
    ly = tl.load(fractions + index, mask=exists, other=0)
    lx = tl.load(fractions + plane + index, mask=exists, other=0)
    upper = 1 - ly
    lower = ly
    if MASKED:
        factor = tl.load(fractions + 2 * plane + index, mask=exists, other=0)
        upper *= factor
        lower *= factor
    return pixel, upper * (1 - lx), upper * lx, lower * (1 - lx), lower * lx


@triton.jit
def column_offsets(first, stride_g, stride_c, CG: tl.constexpr, ONE_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a block of channels lies in columns. ONE_G: in one weight group, which shows that they lie together."""
    c = first + tl.arange(0, BLOCK_C)
    g = first // CG if ONE_G else c // CG
    return g.to(tl.int64) * stride_g + (c - g * CG).to(tl.int64) * stride_c


@triton.jit
def channel_block(
    start,
    stride_g,
    stride_c,
    C: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of channels from ``start`` on, of a block of offset groups, as (groups, channels): the channels, which of
    them there are, and where they lie in columns, as ``column_offsets`` says."""
    CD: tl.constexpr = C // D
    CG: tl.constexpr = C // G
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    of_group = start + tl.arange(0, BLOCK_C)
    c = d[:, None] * CD + of_group[None, :]
    if G == 1:
        column = c.to(tl.int64) * stride_c
    elif BLOCK_D == 1 and (CG % BLOCK_C == 0 and CD % BLOCK_C == 0):
        g = (tl.program_id(1) * CD + start) // CG
        column = g.to(tl.int64) * stride_g + (c - g * CG).to(tl.int64) * stride_c
    else:
        g = c // CG
        column = g.to(tl.int64) * stride_g + (c - g * CG).to(tl.int64) * stride_c
    return c, (d < D)[:, None] & (of_group < CD)[None, :], column


@triton.jit
def load_samples(
    offset, mask, pixels, fractions, p, exists, t, first, count, size, result_size, offset_strides, mask_strides,
    geometry, D: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, PLANNED: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of the samples of positions and a block of offset groups, as (positions, groups, 1): the pixel, whether it has a
    corner in the map, ly, lx, the factor; from the plan where there is one (PLANNED)."""
    height, width = size
    rows, columns = result_size
    offset_n, offset_c, offset_y, offset_x = offset_strides
    mask_n, mask_c, mask_y, mask_x = mask_strides
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Positions past the last read where the first does.
    position = first + tl.where(exists, p, 0)
    exists = exists[:, None] & (d < D)[None, :]
    unit = (d * K + t).to(tl.int64)
    n = position // (rows * columns)
    index_in_image = position - n * (rows * columns)
    i = index_in_image // columns
    j = index_in_image - i * columns
    factor = tl.full(exists.shape, 1, DTYPE)
    if PLANNED:
        plane = (D * K) * count.to(tl.int64)
        index = p[:, None] + (unit * count)[None, :]
        pixel = tl.load(pixels + index, mask=exists, other=0).to(tl.int64)
        # What the plan says of samples without a corner in the map.
        far = n.to(tl.int64) * (height + 2) * (width + 2) + width + 1
        near = exists & (pixel != far[:, None])
        ly = tl.load(fractions + index, mask=exists, other=0)
        lx = tl.load(fractions + plane + index, mask=exists, other=0)
        if MASKED:
            factor = tl.load(fractions + 2 * plane + index, mask=exists, other=0)
    else:
        index = n.to(tl.int64) * offset_n + i.to(tl.int64) * offset_y + j.to(tl.int64) * offset_x
        index = index[:, None] + (unit * 2 * offset_c)[None, :]
        y = tl.load(offset + index, mask=exists, other=0).to(DTYPE)
        x = tl.load(offset + index + offset_c, mask=exists, other=0).to(DTYPE)
        upper, left, ly, lx = sample_positions(y, x, i, j, t, size, geometry, 1, DTYPE)
        pixel = (n.to(tl.int64)[:, None] * (height + 2) + upper) * (width + 2) + left
        near = exists & (left <= width)
        if MASKED:
            index = n.to(tl.int64) * mask_n + i.to(tl.int64) * mask_y + j.to(tl.int64) * mask_x
            factor = tl.load(mask + (index[:, None] + (unit * mask_c)[None, :]), mask=exists, other=0).to(DTYPE)
    return pixel[:, :, None], near[:, :, None], ly[:, :, None], lx[:, :, None], factor[:, :, None]


@triton.jit
def load_corners(corner, below, has_channel, C: tl.constexpr, DTYPE: tl.constexpr):
    """The pixels at the corners of samples: upper left (which is where ``corner`` points), upper right, lower ones."""
    v00 = tl.load(corner, mask=has_channel, other=0).to(DTYPE)
    v01 = tl.load(corner + C, mask=has_channel, other=0).to(DTYPE)
    v10 = tl.load(corner + below, mask=has_channel, other=0).to(DTYPE)
    v11 = tl.load(corner + below + C, mask=has_channel, other=0).to(DTYPE)
    return v00, v01, v10, v11


@triton.jit
def interpolate(v00, v01, v10, v11, ly, lx, factor):
    """factor * the interpolated pixels."""
    value = (1 - ly) * factor * (1 - lx) * v00
    value += (1 - ly) * factor * lx * v01
    value += ly * factor * (1 - lx) * v10
    value += ly * factor * lx * v11
    return value


@triton.jit(
    do_not_specialize=[
        "first", "count", "height", "width", "rows", "columns", "along",
        "offset_n", "offset_c", "offset_y", "offset_x", "mask_n", "mask_c", "mask_y", "mask_x",
    ]
)  # fmt: skip
def sample(
    image, offset, mask, pixels, fractions, out, first, count, height, width, rows, columns, along,
    offset_n, offset_c, offset_y, offset_x, mask_n, mask_c, mask_y, mask_x,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, MASKED: tl.constexpr, PLANNED: tl.constexpr, ALONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns: out[g, p, t, c] = factor * interpolated image; ALONG: out[g, t, c, p], p < along, zero from count on.

    Grid: (blocks of positions, blocks of offset groups, blocks of their channels). A program walks the taps, as those
    of a position share pixels.
    """
    CG: tl.constexpr = C // G
    dtype: tl.constexpr = tl.float64 if image.dtype.element_ty == tl.float64 else tl.float32
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < count
    if ALONG:
        step = CG * along.to(tl.int64)
        c, has_channel, column = channel_block(tl.program_id(2) * BLOCK_C, step * K, along, C, D, G, BLOCK_D, BLOCK_C)
        out_index = p[:, None, None] + column[None, :, :]
        stored = (p < along)[:, None, None] & has_channel[None, :, :]
    else:
        step = tl.full([], CG, tl.int64)
        c, has_channel, column = channel_block(
            tl.program_id(2) * BLOCK_C, count.to(tl.int64) * (K * CG), 1, C, D, G, BLOCK_D, BLOCK_C
        )
        out_index = (p.to(tl.int64) * (K * CG))[:, None, None] + column[None, :, :]
        stored = exists[:, None, None] & has_channel[None, :, :]
    below = (width + 2) * C
    offset_strides, mask_strides = (offset_n, offset_c, offset_y, offset_x), (mask_n, mask_c, mask_y, mask_x)
    geometry = (KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X)
    for t in range(K):
        pixel, _near, ly, lx, factor = load_samples(
            offset, mask, pixels, fractions, p, exists, t, first, count, (height, width), (rows, columns),
            offset_strides, mask_strides, geometry, D, K, MASKED, PLANNED, BLOCK_D, dtype,
        )  # fmt: skip
        corner = image + (pixel * C + c[None, :, :])
        v00, v01, v10, v11 = load_corners(corner, below, has_channel[None, :, :], C, dtype)
        value = interpolate(v00, v01, v10, v11, ly, lx, factor)
        if ALONG:
            value = tl.where(exists[:, None, None], value, 0)
        tl.store(out + out_index + t * step, value.to(out.dtype.element_ty), mask=stored)


@triton.jit
def add(pointers, weight, values, exists, has_channel):
    """Add weight * values where the weight is not 0, as those of three corners are of a sample on a pixel."""
    tl.atomic_add(pointers, weight * values, mask=exists & (weight != 0) & has_channel, sem="relaxed")


@triton.jit
def tap_gradients(
    by_columns, image, by_image, out, p, t, exists, pixel, near, ly, lx, factor, count, along, width,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
    ADD: tl.constexpr, OUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """What ``gradients`` makes of a tap: the sums over channels for by_y and by_x, without the factor, and by_mask, as
    (positions, groups); the columns and the gradient of the image are stored."""
    CG: tl.constexpr = C // G
    below = (width + 2) * C
    by_y = tl.zeros([BLOCK_P, BLOCK_D, BLOCK_C], DTYPE)
    by_x = tl.zeros([BLOCK_P, BLOCK_D, BLOCK_C], DTYPE)
    by_factor = tl.zeros([BLOCK_P, BLOCK_D, BLOCK_C], DTYPE)
    for start in range(0, C // D, BLOCK_C):
        c, has_channel, column = channel_block(start, count.to(tl.int64) * (K * CG), 1, C, D, G, BLOCK_D, BLOCK_C)
        has_channel = has_channel[None, :, :]
        column_index = ((p.to(tl.int64) * K + t) * CG)[:, None, None] + column[None, :, :]
        by_column = tl.load(by_columns + column_index, mask=exists[:, None, None] & has_channel, other=0).to(DTYPE)
        corner = pixel * C + c[None, :, :]
        v00, v01, v10, v11 = load_corners(image + corner, below, has_channel, C, DTYPE)
        upper = (1 - lx) * v00 + lx * v01
        lower = (1 - lx) * v10 + lx * v11
        by_y += by_column * (lower - upper)
        by_x += by_column * ((1 - ly) * (v01 - v00) + ly * (v11 - v10))
        if MASKED:
            by_factor += by_column * ((1 - ly) * upper + ly * lower)
        if OUT > 0:
            value = interpolate(v00, v01, v10, v11, ly, lx, factor)
            if OUT == 1:
                tl.store(out + column_index, value.to(out.dtype.element_ty), mask=exists[:, None, None] & has_channel)
            else:
                step = CG * along.to(tl.int64)
                c, has_channel, out_index = channel_block(start, step * K, along, C, D, G, BLOCK_D, BLOCK_C)
                out_index = p[:, None, None] + out_index[None, :, :] + t * step
                value = tl.where(exists[:, None, None], value, 0)
                has_channel = has_channel[None, :, :]
                tl.store(out + out_index, value.to(out.dtype.element_ty), mask=(p < along)[:, None, None] & has_channel)
        if ADD:
            add(by_image + corner, (1 - ly) * factor * (1 - lx), by_column, near, has_channel)
            add(by_image + corner + C, (1 - ly) * factor * lx, by_column, near, has_channel)
            add(by_image + corner + below, ly * factor * (1 - lx), by_column, near, has_channel)
            add(by_image + corner + below + C, ly * factor * lx, by_column, near, has_channel)
    return tl.sum(by_y, 2), tl.sum(by_x, 2), tl.sum(by_factor, 2)


@triton.jit(
    do_not_specialize=[
        "first", "count", "height", "width", "rows", "columns", "along",
        "offset_n", "offset_c", "offset_y", "offset_x", "mask_n", "mask_c", "mask_y", "mask_x", "taps",
        "by_offset_n", "by_offset_c", "by_offset_y", "by_offset_x", "by_mask_n", "by_mask_c", "by_mask_y", "by_mask_x",
    ]
)  # fmt: skip
def gradients(
    by_columns, image, offset, mask, pixels, fractions, by_offset, by_mask, by_image, out,
    first, count, height, width, rows, columns, along, taps,
    offset_n, offset_c, offset_y, offset_x, mask_n, mask_c, mask_y, mask_x,
    by_offset_n, by_offset_c, by_offset_y, by_offset_x, by_mask_n, by_mask_c, by_mask_y, by_mask_x,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, MASKED: tl.constexpr, PLANNED: tl.constexpr,
    ADD: tl.constexpr, OUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of offset and mask; with ADD that of the image, and with OUT the columns, too.

    With v the interpolated pixels of a sample, without its factor: by_mask = sum over the channels of the offset group
    of by_columns * v, by_y = factor * the sum of by_columns * dv/dy, by_x alike; to by_image, of the image's shape, the
    weighted by_columns are added at the corners. OUT: out gets the columns, as by_columns lie (1), which may be their
    place, or as out[g, t, c, p] with p < along, zero from count on (2).

    Grid: (blocks of positions, blocks of offset groups, blocks of ``taps`` taps).
    """
    dtype: tl.constexpr = tl.float64 if image.dtype.element_ty == tl.float64 else tl.float32
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < count
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = (first + p) // (rows * columns)
    index_in_image = first + p - n * (rows * columns)
    i = index_in_image // columns
    j = (index_in_image - i * columns).to(tl.int64)
    offset_index = (n.to(tl.int64) * by_offset_n + i.to(tl.int64) * by_offset_y + j * by_offset_x)[:, None]
    mask_index = (n.to(tl.int64) * by_mask_n + i.to(tl.int64) * by_mask_y + j * by_mask_x)[:, None]
    stored = exists[:, None] & (d < D)[None, :]
    offset_strides, mask_strides = (offset_n, offset_c, offset_y, offset_x), (mask_n, mask_c, mask_y, mask_x)
    geometry = (KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X)
    for t in range(tl.program_id(2) * taps, tl.minimum(tl.program_id(2) * taps + taps, K)):
        pixel, near, ly, lx, factor = load_samples(
            offset, mask, pixels, fractions, p, exists, t, first, count, (height, width), (rows, columns),
            offset_strides, mask_strides, geometry, D, K, MASKED, PLANNED, BLOCK_D, dtype,
        )  # fmt: skip
        by_y, by_x, by_factor = tap_gradients(
            by_columns, image, by_image, out, p, t, exists, pixel, near, ly, lx, factor, count, along, width,
            C, D, G, K, MASKED, ADD, OUT, BLOCK_P, BLOCK_D, BLOCK_C, dtype,
        )  # fmt: skip
        factor = tl.reshape(factor, [BLOCK_P, BLOCK_D])
        unit = (d * K + t).to(tl.int64)
        pointers = by_offset + (offset_index + (unit * 2 * by_offset_c)[None, :])
        tl.store(pointers, (factor * by_y).to(by_offset.dtype.element_ty), mask=stored)
        tl.store(pointers + by_offset_c, (factor * by_x).to(by_offset.dtype.element_ty), mask=stored)
        if MASKED:
            pointers = by_mask + (mask_index + (unit * by_mask_c)[None, :])
            tl.store(pointers, by_factor.to(by_mask.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["count", "first_image", "height", "width"])
def gather(
    by_columns, order, starts, fractions, by_image, count, first_image, height, width,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """by_image[n, y, x, c] += sum of weight * by_columns over the samples that have (y, x) for a corner.

    ``order`` lists the samples by offset group and upper left pixel, those of pixel i of group d from starts[d, i] on,
    in their own order: so the order of the sum is fixed. Samples whose upper left pixel is the left or the right one of
    a pair follow each other, and are walked as one list. by_image is of the image's shape; its border gets nothing.

    Grid: (blocks of pixels of the chunk's images, offset groups, blocks of their channels).
    """
    CD: tl.constexpr = C // D
    CG: tl.constexpr = C // G
    ONE_G: tl.constexpr = G == 1 or (CG % BLOCK_C == 0 and CD % BLOCK_C == 0)
    plane = (D * K) * count.to(tl.int64)
    size = height * width
    n = tl.program_id(0) // tl.cdiv(size, BLOCK_X)
    images = tl.num_programs(0) // tl.cdiv(size, BLOCK_X)
    pixel = (tl.program_id(0) - n * tl.cdiv(size, BLOCK_X)) * BLOCK_X + tl.arange(0, BLOCK_X)
    has_pixel = pixel < size
    y = pixel // width
    x = pixel - y * width
    d = tl.program_id(1)
    of_group = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_channel = of_group < CD
    channels = column_offsets(d * CD + tl.program_id(2) * BLOCK_C, count.to(tl.int64) * (K * CG), 1, CG, ONE_G, BLOCK_C)
    dtype = fractions.dtype.element_ty
    total = tl.zeros([BLOCK_X, BLOCK_C], dtype)
    for a in range(2):  # the pixel is in the upper row of the samples' corners, or in the lower
        cell = ((d * images + n).to(tl.int64) * (height + 2) + y + 1 - a) * (width + 2) + x
        begin = tl.load(starts + cell, mask=has_pixel, other=0)
        middle = tl.load(starts + cell + 1, mask=has_pixel, other=0)
        end = tl.load(starts + cell + 2, mask=has_pixel, other=0)
        for start in range(0, tl.max(end - begin), BLOCK_E):
            rank = begin[:, None] + start + tl.arange(0, BLOCK_E)[None, :]
            exists = rank < end[:, None]
            e = tl.load(order + rank, mask=exists, other=0).to(tl.int64)
            ly = tl.load(fractions + e, mask=exists, other=0)
            lx = tl.load(fractions + plane + e, mask=exists, other=0)
            weight = tl.where(a == 0, 1 - ly, ly) * tl.where(rank < middle[:, None], lx, 1 - lx)
            if MASKED:
                weight *= tl.load(fractions + 2 * plane + e, mask=exists, other=0)
            unit = e // count
            row = (e - unit * count) * K + unit - d * K
            values = tl.load(
                by_columns + ((row * CG)[:, :, None] + channels[None, None, :]),
                mask=exists[:, :, None] & has_channel[None, None, :],
                other=0,
            )
            total += tl.sum(tl.where(exists, weight, 0)[:, :, None] * values.to(dtype), 1)
    row = (first_image + n).to(tl.int64) * (height + 2) + y + 1
    pointers = by_image + ((row * (width + 2) + x + 1) * C)[:, None] + (d * CD + of_group)[None, :]
    exists_in_image = has_pixel[:, None] & has_channel[None, :]
    tl.store(pointers, tl.load(pointers, mask=exists_in_image, other=0) + total, mask=exists_in_image)
