# mypy: ignore-errors
# (Triton's language, not Python's)
"""CARAFE's Triton kernels for twofold upsampling of maps of even width, stored row by row: the common case, and faster.

What bounds CARAFE on these GPUs is the traffic between the L1 cache and the registers. Here a thread owns two
neighbouring centres (or pixels), so that whatever it reads lies in aligned pairs of features and quads of results or
weights, one wide load each, and a column read once serves both. Per row of taps (k = 5) and channel that is 3 loads for
40 products, where a centre a thread takes 5 loads for 20. The other conventions are those of ``carafe.py``.

A tile is (WARPS, TILE): a warp a row, a pair of pixels a thread (TILE = TILE_Y * TILE_X = 32), so that pairs and quads
are split within a thread. The warps of a program work on the same pixels, for different channels or taps, and so find
in the L1 cache what the first of them read; a thread's channels and results are the elements of a tuple. What must be
known to be even is passed halved, what must be a multiple of four is passed quartered. ``left`` and ``zero`` hide
better alignment than that from the compiler, which would else lay out some loads differently from others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._carafe_tiles import decode, load, wide, zeros


@triton.jit
def _times(FACTOR: tl.constexpr, first, second, third, WIDE: tl.constexpr):
    """Three strides that were passed divided by FACTOR; WIDE says that 32 bits do not hold what they will point to."""
    if WIDE:
        return wide(first) * FACTOR, wide(second) * FACTOR, wide(third) * FACTOR
    else:  # noqa: RET505 - only so is the other branch, of other types, left out
        return first * FACTOR, second * FACTOR, third * FACTOR


@triton.jit
def _split_pair(pair, WARPS: tl.constexpr, TILE: tl.constexpr):
    return tl.split(tl.reshape(pair, (WARPS, TILE, 2)))


@triton.jit
def _split_quad(quad, WARPS: tl.constexpr, TILE: tl.constexpr):
    """(WARPS, 4 * TILE) to four (WARPS, TILE): centre 0 b 0, centre 0 b 1, centre 1 b 0, centre 1 b 1."""
    even, odd = tl.split(tl.reshape(quad, (WARPS, TILE, 2, 2)))
    first_even, second_even = tl.split(even)
    first_odd, second_odd = tl.split(odd)
    return first_even, first_odd, second_even, second_odd


@triton.jit
def _join_quad(first_even, first_odd, second_even, second_odd, WARPS: tl.constexpr, TILE: tl.constexpr):
    even = tl.join(first_even, second_even)
    odd = tl.join(first_odd, second_odd)
    return tl.reshape(tl.join(even, odd), (WARPS, 4 * TILE))


@triton.jit
def _columns(
    features, y, x, height, width, has_channel, dtype: tl.constexpr,
    K: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """The features of one row under the taps of a pair of centres: element v + p + SKIP is tap v's of centre p."""
    PAD: tl.constexpr = K // 2
    columns = ()
    for d in tl.static_range((PAD + PAD % 2 + PAD + 3) // 2):
        inside = (y >= 0) & (y < height) & (x + 2 * d >= 0) & (x + 2 * d < width)
        pair = load(features + 2 * d, inside, has_channel, WHOLE, EVEN_C).to(dtype)
        even, odd = _split_pair(pair, WARPS, TILE)
        columns = columns + (even, odd)
    return columns


@triton.jit
def _forward_taps(
    acc, features, masks, y, x, first, channels, height, width, has_result, f_sc, f_sh, m_sc, m_sh,
    K: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
    EVEN_C: tl.constexpr,
):  # fmt: skip
    SKIP: tl.constexpr = K // 2 % 2
    for u in range(K):
        weights = ()
        for v in tl.static_range(K):
            for a in tl.static_range(2):
                quad = tl.load(masks + ((u * K + v) * m_sc + a * m_sh), mask=has_result, other=0.0).to(acc[0].dtype)
                weights = weights + _split_quad(quad, WARPS, TILE)
        sums = ()
        for i in tl.static_range(BLOCK_C):
            columns = _columns(
                features + (i * WARPS * f_sc + u * f_sh), y + u, x, height, width, first + i * WARPS < channels,
                acc[0].dtype, K, WARPS, TILE, WHOLE, EVEN_C,
            )  # fmt: skip
            for a in tl.static_range(2):
                for pb in tl.static_range(4):
                    total = acc[(i * 2 + a) * 4 + pb]
                    for v in tl.static_range(K):
                        total = tl.fma(columns[v + SKIP + pb // 2], weights[(v * 2 + a) * 4 + pb], total)
                    sums = sums + (total,)
        acc = sums
    return acc


@triton.jit(do_not_specialize=["left", "zero"])
def forward(
    features, masks, out, groups, channels, height, width, left, zero, f_sn, f_sc, f_sh, m_sn, m_sc, m_sh,
    o_sn, o_sc, o_sh,
    K: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_C * WARPS channels of a group at TILE_Y x TILE_X pairs of centres."""
    TILE: tl.constexpr = TILE_Y * TILE_X
    width = width * 2
    f_sn, f_sc, f_sh = _times(2, f_sn, f_sc, f_sh, WIDE)
    m_sn, m_sc, m_sh = _times(4, m_sn, m_sc, m_sh, WIDE)
    o_sn, o_sc, o_sh = _times(4, o_sn, o_sc, o_sh, WIDE)
    chunk, tile_y, tile_x, group, n = decode(
        tl.cdiv(channels, CHUNK), tl.cdiv(height, TILE_Y), tl.cdiv(width, 2 * TILE_X), groups
    )
    top = tile_y * TILE_Y - K // 2  # where tap (0, 0) of the tile's corner falls, the column rounded down to even
    start_x = tile_x * (2 * TILE_X) - left * 2
    lane = tl.arange(0, 2 * TILE)[None, :]
    y = top + lane // (2 * TILE_X)
    x = start_x + lane % (2 * TILE_X)
    lane = tl.arange(0, 4 * TILE)[None, :]
    row = tile_y * TILE_Y + lane // (4 * TILE_X)
    j = tile_x * (4 * TILE_X) + lane % (4 * TILE_X) + zero * 4
    has_result = (row < height) & (j < 2 * width)
    i = (2 * row).to(tl.int64)
    warp = tl.arange(0, WARPS)[:, None]
    masks += n * m_sn + (group * K * K).to(tl.int64) * m_sc + (i * m_sh + j + warp * 0)
    features += n * f_sn + (group * channels).to(tl.int64) * f_sc + (y.to(tl.int64) * f_sh + x)
    out += n * o_sn + (group * channels).to(tl.int64) * o_sc + (i * o_sh + j)
    bottom = top + TILE_Y + K - 1
    whole = (top >= 0) & (start_x >= 0) & (bottom <= height) & (start_x + 2 * TILE_X + K + 1 <= width)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, channels), BLOCK_C * WARPS):
        first = start + warp
        pointers = features + first.to(tl.int64) * f_sc
        acc = zeros(8 * BLOCK_C, (WARPS, TILE), out.dtype.element_ty)
        if whole:
            acc = _forward_taps(
                acc, pointers, masks, y, x, first, channels, height, width, has_result, f_sc, f_sh, m_sc, m_sh,
                K, WARPS, TILE, BLOCK_C, True, EVEN_C,
            )  # fmt: skip
        else:
            acc = _forward_taps(
                acc, pointers, masks, y, x, first, channels, height, width, has_result, f_sc, f_sh, m_sc, m_sh,
                K, WARPS, TILE, BLOCK_C, False, EVEN_C,
            )  # fmt: skip
        for c in tl.static_range(BLOCK_C):
            for a in tl.static_range(2):
                quad = _join_quad(
                    acc[(c * 2 + a) * 4], acc[(c * 2 + a) * 4 + 1], acc[(c * 2 + a) * 4 + 2], acc[(c * 2 + a) * 4 + 3],
                    WARPS, TILE,
                )  # fmt: skip
                target = out + ((first + c * WARPS).to(tl.int64) * o_sc + a * o_sh)
                tl.store(target, quad.to(out.dtype.element_ty), mask=has_result & (first + c * WARPS < channels))


@triton.jit
def _features_row(
    acc, grad, masks, u, row, j, first, channels, height, width, g_sc, m_sc,
    K: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
):  # fmt: skip
    """What one row of results gives to R x 2 pixels; element 2 * (R * c + r) + p of ``acc`` is row r, pixel p."""
    PAD: tl.constexpr = K // 2
    REACH: tl.constexpr = (PAD + 1) // 2  # pairs of centres to either side
    for step in tl.static_range(2 * REACH + 1):
        q = 4 * (step - REACH)
        inside = (row >= 0) & (row < height) & (j + q >= 0) & (j + q < 2 * width)
        # The centre at 2 * (step - REACH) + h beside the pixel pair sees pixel p through tap v = p - that + PAD: for
        # each p and h, elements (p, h, b) of row r are the weights of that tap, or nothing where there is none.
        weights = ()
        for r in tl.static_range(R):
            tap = row * 0 + (u + r)  # lanes, as the interpreter's `&` needs them
            seen = inside & (tap >= 0) & (tap < K)
            for p in tl.static_range(2):
                for h in tl.static_range(2):
                    v = p - 2 * (step - REACH) - h + PAD
                    quad = tl.zeros((WARPS, 4 * TILE), masks.dtype.element_ty)
                    if v >= 0 and v < K:
                        quad = tl.load(masks + (((u + r) * K + v) * m_sc + q), mask=seen, other=0.0)
                    b0b1 = _split_quad(quad.to(acc[0].dtype), WARPS, TILE)
                    weights = weights + (b0b1[2 * h], b0b1[2 * h + 1])
        sums = ()
        for c in tl.static_range(BLOCK_C):
            has_channel = first + c * WARPS < channels
            quad = load(grad + (c * WARPS * g_sc + q), inside, has_channel, False, EVEN_C)
            values = _split_quad(quad.to(acc[0].dtype), WARPS, TILE)
            for r in tl.static_range(R):
                for p in tl.static_range(2):
                    total = acc[2 * (R * c + r) + p]
                    for h in tl.static_range(2):
                        v = p - 2 * (step - REACH) - h + PAD
                        if v >= 0 and v < K:
                            for b in tl.static_range(2):
                                total = tl.fma(values[2 * h + b], weights[8 * r + 4 * p + 2 * h + b], total)
                    sums = sums + (total,)
        acc = sums
    return acc


@triton.jit(do_not_specialize=["zero"])
def backward_features(
    grad, masks, out, groups, channels, height, width, zero, g_sn, g_sc, g_sh, m_sn, m_sc, m_sh, o_sn, o_sc, o_sh,
    K: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_C * WARPS channels of a group at TILE_Y * R rows of TILE_X pairs of pixels.

    A thread owns R pairs above each other, and a gradient is loaded once for all that it reaches of them.
    """
    TILE: tl.constexpr = TILE_Y * TILE_X
    width = width * 2
    g_sn, g_sc, g_sh = _times(4, g_sn, g_sc, g_sh, WIDE)
    m_sn, m_sc, m_sh = _times(4, m_sn, m_sc, m_sh, WIDE)
    o_sn, o_sc, o_sh = _times(2, o_sn, o_sc, o_sh, WIDE)
    chunk, tile_y, tile_x, group, n = decode(
        tl.cdiv(channels, BLOCK_C * WARPS), tl.cdiv(height, TILE_Y * R), tl.cdiv(width, 2 * TILE_X), groups
    )
    lane = tl.arange(0, 4 * TILE)[None, :]
    centre = (tile_y * TILE_Y + lane // (4 * TILE_X)) * R + K // 2
    j = tile_x * (4 * TILE_X) + lane % (4 * TILE_X) + zero * 4
    lane = tl.arange(0, 2 * TILE)[None, :]
    y = (tile_y * TILE_Y + lane // (2 * TILE_X)) * R
    x = tile_x * (2 * TILE_X) + lane % (2 * TILE_X) + zero * 2
    first = chunk * (BLOCK_C * WARPS) + tl.arange(0, WARPS)[:, None]
    channel = (group * channels + first).to(tl.int64)
    masks += n * m_sn + (group * K * K).to(tl.int64) * m_sc + (j + first * 0)
    grad += n * g_sn + channel * g_sc + j
    out += n * o_sn + channel * o_sc + (y.to(tl.int64) * o_sh + x)
    acc = zeros(2 * R * BLOCK_C, (WARPS, TILE), out.dtype.element_ty)
    for ua in range(2 * (K + R - 1)):
        # The centre row that sees row y through tap row u sees row y + r through tap row u + r.
        u = ua // 2 + 1 - R
        i = (2 * (centre - u) + ua % 2).to(tl.int64)
        acc = _features_row(
            acc, grad + i * g_sh, masks + i * m_sh, u, centre - u, j, first, channels, height, width, g_sc, m_sc,
            K, R, WARPS, TILE, BLOCK_C, EVEN_C,
        )  # fmt: skip
    for c in tl.static_range(BLOCK_C):
        for r in tl.static_range(R):
            pair = tl.reshape(tl.join(acc[2 * (R * c + r)], acc[2 * (R * c + r) + 1]), (WARPS, 2 * TILE))
            stored = (y + r < height) & (x < width) & (first + c * WARPS < channels)
            tl.store(out + (c * WARPS * o_sc + r * o_sh), pair.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["left", "zero"])
def backward_masks(
    grad, features, out, batches, groups, channels, height, width, left, zero, g_sn, g_sc, g_sh, f_sn, f_sc, f_sh,
    o_sn, o_sc, o_sh,
    K: tl.constexpr, WARPS: tl.constexpr, BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A program: WARPS units of work; a unit is a row of taps and a row of results at a tile of pairs of centres.

    The units of a tile are neighbours and read the same gradients. BLOCK_C, a divisor of the channels, are unrolled, to
    have their loads in flight together.
    """
    TILE: tl.constexpr = TILE_Y * TILE_X
    SKIP: tl.constexpr = K // 2 % 2
    width = width * 2
    f_sn, f_sc, f_sh = _times(2, f_sn, f_sc, f_sh, WIDE)
    g_sn, g_sc, g_sh = _times(4, g_sn, g_sc, g_sh, WIDE)
    o_sn, o_sc, o_sh = _times(4, o_sn, o_sc, o_sh, WIDE)
    tiles_y = tl.cdiv(height, TILE_Y)
    tiles_x = tl.cdiv(width, 2 * TILE_X)
    unit = tl.program_id(0) * WARPS + tl.arange(0, WARPS)[:, None]
    tile = unit // (2 * K)
    a = unit // K % 2
    u = unit % K
    tile_x = tile % tiles_x
    tile_y = tile // tiles_x % tiles_y
    group = tile // tiles_x // tiles_y % groups
    n = (tile // tiles_x // tiles_y // groups).to(tl.int64)
    in_use = n < batches
    lane = tl.arange(0, 2 * TILE)[None, :]
    y = tile_y * TILE_Y + lane // (2 * TILE_X) + u - K // 2
    x = tile_x * (2 * TILE_X) + lane % (2 * TILE_X) - left * 2
    lane = tl.arange(0, 4 * TILE)[None, :]
    row = tile_y * TILE_Y + lane // (4 * TILE_X)
    j = tile_x * (4 * TILE_X) + lane % (4 * TILE_X) + zero * 4
    has_result = (row < height) & (j < 2 * width) & in_use
    i = (2 * row + a).to(tl.int64)
    grad += n * g_sn + (group * channels).to(tl.int64) * g_sc + (i * g_sh + j)
    features += n * f_sn + (group * channels).to(tl.int64) * f_sc + (y.to(tl.int64) * f_sh + x)
    out += n * o_sn + (group * K * K + u * K).to(tl.int64) * o_sc + (i * o_sh + j)
    acc = zeros(4 * K, (WARPS, TILE), out.dtype.element_ty)
    for _start in range(0, channels, BLOCK_C):
        for _step in tl.static_range(BLOCK_C):
            columns = _columns(features, y, x, height, width, in_use, acc[0].dtype, K, WARPS, TILE, False, False)
            quad = tl.load(grad, mask=has_result, other=0.0).to(acc[0].dtype)
            values = _split_quad(quad, WARPS, TILE)
            sums = ()
            for v in tl.static_range(K):
                for pb in tl.static_range(4):
                    sums = sums + (tl.fma(columns[v + SKIP + pb // 2], values[pb], acc[4 * v + pb]),)
            acc = sums
            features += f_sc
            grad += g_sc
    for v in tl.static_range(K):
        quad = _join_quad(acc[4 * v], acc[4 * v + 1], acc[4 * v + 2], acc[4 * v + 3], WARPS, TILE)
        tl.store(out + v * o_sc, quad.to(out.dtype.element_ty), mask=has_result)
