# mypy: ignore-errors
# (Triton's language, not Python's)
"""CARAFE's Triton kernels for any kernel size, scale, stride, groups and memory layout.

Tiles are (C, LANE): channels of a group by pixels. Results that share what they load (the s*s results of a centre, the
taps of a weight gradient) are the elements of a tuple, unrolled at compile time, so that whatever the layout the
compiler gives a tile, they meet in the same thread. Tensors come with their strides and their order, which says which
stride is 1, for the compiler to lay the threads along that axis (``_carafe_launches._order``). No number that
depends on the size of the map is specialised: that would be a kernel for each size with a stride of 1, or of a multiple
of 16. Nor is ``pad`` = k // 2: were some taps known to be better aligned than others, each would be loaded in a layout
of its own and then be rearranged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._carafe_tiles import decode, load, specialized, zeros

# All that depends on the size of the map, and the padding.
_SIZES = ["pad", "height", "width", "rows", "columns", *(f"{t}_s{axis}" for t in "fgmo" for axis in "nchw")]
# Taps of a row are unrolled at compile time up to this kernel size.
_UNROLLED = tl.constexpr(7)


@triton.jit
def _forward_tap(
    acc, features, masks, u, v, pixel, size, exists, f_strides, m_strides,
    K: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, INTERIOR: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what tap (u, v) gives; ``pixel`` is the one under tap (0, 0), ``exists`` is for channels and centres."""
    y, x = pixel
    height, width = size
    has_channel, has_centre = exists
    f_sh, f_sw = f_strides
    m_sc, m_sh, m_sw = m_strides
    inside = (y + u >= 0) & (y + u < height) & (x + v >= 0) & (x + v < width)
    feature = load(features + (u * f_sh + v * f_sw), inside, has_channel, INTERIOR, EVEN_C).to(acc[0].dtype)
    masks += (u * K + v) * m_sc
    sums = ()
    for ab in tl.static_range(ROWS * S):
        weight = tl.load(masks + (ab // S * m_sh + ab % S * m_sw), mask=has_centre, other=0.0)
        sums = sums + (tl.fma(feature, weight.to(feature.dtype), acc[ab]),)
    return sums


@triton.jit
def _forward_taps(
    acc, features, masks, pixel, size, exists, f_strides, m_strides,
    K: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, INTERIOR: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what all taps give."""
    for u in range(K):
        if K <= _UNROLLED:
            for v in tl.static_range(K):
                acc = _forward_tap(
                    acc, features, masks, u, v, pixel, size, exists, f_strides, m_strides, K, S, ROWS, INTERIOR, EVEN_C
                )
        else:
            for v in range(K):
                acc = _forward_tap(
                    acc, features, masks, u, v, pixel, size, exists, f_strides, m_strides, K, S, ROWS, INTERIOR, EVEN_C
                )
    return acc


@triton.jit
def _store_block(
    acc, out, tile_y, tile_x, lane, a, rows, columns, exists, o_sh, o_sw,
    S: tl.constexpr, ROWS: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Store the results of a block of channels, from row a of each centre on; ``out`` points to their first pixels."""
    has_channel, has_centre = exists
    for row in tl.static_range(ROWS):
        if PAIRS:
            # A row's two results are neighbours in memory: store them as one row.
            pair = tl.interleave(acc[row * 2], acc[row * 2 + 1]).to(out.dtype.element_ty)
            lane_j = tl.arange(0, 2 * TILE_Y * TILE_X)[None, :]
            y_j = tile_y * TILE_Y + lane_j // (2 * TILE_X)
            j = tile_x * (2 * TILE_X) + lane_j % (2 * TILE_X)
            stored = (y_j < rows) & (j < 2 * columns) & has_channel
            tl.store(out + ((y_j * S + (a + row)).to(tl.int64) * o_sh + j), pair, mask=stored)
        else:
            for b in tl.static_range(S):
                y = tile_y * TILE_Y + lane // TILE_X
                j = (tile_x * TILE_X + lane % TILE_X) * S + b
                result = acc[row * S + b].to(out.dtype.element_ty)
                pointer = out + ((y * S + (a + row)).to(tl.int64) * o_sh + j * o_sw)
                tl.store(pointer, result, mask=has_centre & has_channel)


@triton.jit(do_not_specialize=_SIZES)
def forward(
    features, masks, out, groups, channels, height, width, rows, columns, pad,
    f_sn, f_sc, f_sh, f_sw, m_sn, m_sc, m_sh, m_sw, o_sn, o_sc, o_sh, o_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, EVEN_C: tl.constexpr, PAIRS: tl.constexpr,
    F_ORDER: tl.constexpr, M_ORDER: tl.constexpr, O_ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program: CHUNK channels of a group at TILE_Y x TILE_X centres, BLOCK_C at a time.

    It computes ROWS of the s rows of results. A feature is loaded once for its centre's ROWS * s results, a weight once
    for the thread's channels.
    """
    f_sn, f_sc, f_sh, f_sw = specialized(f_sn, f_sc, f_sh, f_sw, F_ORDER, WIDE)
    m_sn, m_sc, m_sh, m_sw = specialized(m_sn, m_sc, m_sh, m_sw, M_ORDER, WIDE)
    o_sn, o_sc, o_sh, o_sw = specialized(o_sn, o_sc, o_sh, o_sw, O_ORDER, WIDE)
    TILE: tl.constexpr = TILE_Y * TILE_X
    chunks = tl.cdiv(channels, CHUNK)
    item, tile_y, tile_x, group, n = decode(
        chunks * (S // ROWS), tl.cdiv(rows, TILE_Y), tl.cdiv(columns, TILE_X), groups
    )
    chunk = item % chunks
    a = item // chunks * ROWS
    lane = tl.arange(0, TILE)[None, :]
    y = tile_y * TILE_Y + lane // TILE_X
    x = tile_x * TILE_X + lane % TILE_X
    has_centre = (y < rows) & (x < columns)
    i = (y * S + a).to(tl.int64)
    masks += n * m_sn + (group * K * K).to(tl.int64) * m_sc + (i * m_sh + x * (S * m_sw))
    out += n * o_sn + (group * channels).to(tl.int64) * o_sc
    y = y * T - pad  # the feature under tap (0, 0)
    x = x * T - pad
    features += n * f_sn + (group * channels).to(tl.int64) * f_sc + (y.to(tl.int64) * f_sh + x * f_sw)

    top = tile_y * TILE_Y * T - pad
    left = tile_x * TILE_X * T - pad
    bottom = top + (TILE_Y - 1) * T + K
    right = left + (TILE_X - 1) * T + K
    is_interior = (top >= 0) & (left >= 0) & (bottom <= height) & (right <= width)
    size, f_strides, m_strides = (height, width), (f_sh, f_sw), (m_sc, m_sh, m_sw)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, channels), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[:, None]
        has_channel = c < channels
        pointers = features + c.to(tl.int64) * f_sc
        acc = zeros(ROWS * S, (BLOCK_C, TILE), out.dtype.element_ty)
        exists = (has_channel, has_centre)
        if is_interior:
            acc = _forward_taps(
                acc, pointers, masks, (y, x), size, exists, f_strides, m_strides, K, S, ROWS, True, EVEN_C
            )
        else:
            acc = _forward_taps(
                acc, pointers, masks, (y, x), size, exists, f_strides, m_strides, K, S, ROWS, False, EVEN_C
            )
        _store_block(
            acc, out + c.to(tl.int64) * o_sc, tile_y, tile_x, lane, a, rows, columns, exists, o_sh, o_sw,
            S, ROWS, TILE_Y, TILE_X, PAIRS,
        )  # fmt: skip


@triton.jit
def _features_tap(
    acc, grad, masks, a, u, v, lanes, size, has_channel, g_strides, m_strides,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what tap (u, v) gives from row a of the results of a centre.

    ``lanes`` are the row of a pixel, its column of results, its own column, and which of the s columns of a centre it
    takes, the first three as the last tap has them. ``size`` is in centres.
    """
    y, j, x, b = lanes
    rows, columns = size
    g_sh, g_sw = g_strides
    m_sc, m_sh, m_sw = m_strides
    # The centre that sees row y through tap row u sees row y + r through tap row u + r.
    centre_y = y - u
    inside = centre_y >= 0
    if T == 1 and S == SP:
        source = j - v * S
        inside = inside & (source >= 0) & (source < columns * S)
    else:
        centre_x = x - v
        inside = inside & (centre_x >= 0) & (centre_x % T == 0) & (centre_y % T == 0) & (b < S)
        centre_y = centre_y // T
        centre_x = centre_x // T
        inside = inside & (centre_x < columns)
        source = centre_x * S + b
    inside = inside & (centre_y < rows)
    i = (centre_y * S + a).to(tl.int64)
    value = load(grad + (i * g_sh + source * g_sw), inside, has_channel, False, EVEN_C).to(acc[0].dtype)
    masks += (u * K + v) * m_sc + (i * m_sh + source * m_sw)
    sums = ()
    for r in tl.static_range(R):
        tap = y * 0 + u + r  # lanes, as the interpreter's `&` needs them
        weight = tl.load(masks + r * K * m_sc, mask=inside & (tap >= 0) & (tap < K), other=0.0)
        sums = sums + (tl.fma(value, weight.to(value.dtype), acc[r]),)
    return sums


@triton.jit(do_not_specialize=_SIZES)
def backward_features(
    grad, masks, out, groups, channels, height, width, rows, columns, pad,
    g_sn, g_sc, g_sh, g_sw, m_sn, m_sc, m_sh, m_sw, o_sn, o_sc, o_sh, o_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, EVEN_C: tl.constexpr,
    G_ORDER: tl.constexpr, M_ORDER: tl.constexpr, O_ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program: CHUNK channels of a group at TILE_Y*R x TILE_X pixels, BLOCK_C at a time.

    A lane is a pixel column and one column b of the blocks of results, so that gradients and weights are read in their
    order (SP is s padded to a power of two); b is summed at the end. A gradient is loaded once for the R pixels above
    each other that it reaches, a weight once for the thread's channels.
    """
    g_sn, g_sc, g_sh, g_sw = specialized(g_sn, g_sc, g_sh, g_sw, G_ORDER, WIDE)
    m_sn, m_sc, m_sh, m_sw = specialized(m_sn, m_sc, m_sh, m_sw, M_ORDER, WIDE)
    o_sn, o_sc, o_sh, o_sw = specialized(o_sn, o_sc, o_sh, o_sw, O_ORDER, WIDE)
    LANES: tl.constexpr = TILE_Y * TILE_X * SP
    chunk, tile_y, tile_x, group, n = decode(
        tl.cdiv(channels, CHUNK), tl.cdiv(height, TILE_Y * R), tl.cdiv(width, TILE_X), groups
    )
    lane = tl.arange(0, LANES)[None, :]
    y = (tile_y * TILE_Y + lane // (TILE_X * SP)) * R
    x = tile_x * TILE_X + lane // SP % TILE_X
    b = lane % SP
    j = tile_x * (TILE_X * SP) + lane % (TILE_X * SP)  # x * s + b where s is a power of two
    masks += n * m_sn + (group * K * K).to(tl.int64) * m_sc
    grad += n * g_sn + (group * channels).to(tl.int64) * g_sc
    out += n * o_sn + (group * channels).to(tl.int64) * o_sc
    out_lane = tl.arange(0, TILE_Y * TILE_X)[None, :]
    out_y = (tile_y * TILE_Y + out_lane // TILE_X) * R
    out_x = tile_x * TILE_X + out_lane % TILE_X
    size, g_strides, m_strides = (rows, columns), (g_sh, g_sw), (m_sc, m_sh, m_sw)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, channels), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[:, None]
        has_channel = c < channels
        pointers = grad + c.to(tl.int64) * g_sc
        acc = zeros(R, (BLOCK_C, LANES), out.dtype.element_ty)
        for u in range(1 - R, K):
            for a in range(S):
                lanes = (y + pad, j + pad * S, x + pad, b)
                if K <= _UNROLLED:
                    for v in tl.static_range(K):
                        acc = _features_tap(
                            acc, pointers, masks, a, u, v, lanes, size, has_channel, g_strides, m_strides,
                            K, S, T, SP, R, EVEN_C,
                        )  # fmt: skip
                else:
                    for v in range(K):
                        acc = _features_tap(
                            acc, pointers, masks, a, u, v, lanes, size, has_channel, g_strides, m_strides,
                            K, S, T, SP, R, EVEN_C,
                        )  # fmt: skip
        out_column = out + (c.to(tl.int64) * o_sc + out_x * o_sw)
        for r in tl.static_range(R):
            total = acc[r]
            if SP > 1:
                total = tl.sum(tl.reshape(total, (BLOCK_C, TILE_Y * TILE_X, SP)), axis=2)
            stored = (out_y + r < height) & (out_x < width) & has_channel
            tl.store(out_column + (out_y + r).to(tl.int64) * o_sh, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _masks_channels(
    acc, grad, features, u, v, y, x, height, width, has_result, has_channel, g_sh, f_sh, f_sw,
    K: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what a block of channels gives to TAPS taps from (u, v) on."""
    values = ()
    for a in tl.static_range(ROWS):
        value = load(grad + a * g_sh, has_result, has_channel, False, EVEN_C)
        values = values + (value.to(acc[0].dtype),)
    sums = ()
    for tap in tl.static_range(TAPS):
        tap_u = u + tap // K
        tap_v = v + tap % K
        if TAPS % K != 0:
            tap_u = u + (v + tap) // K
            tap_v = (v + tap) % K
        inside = (y + tap_u >= 0) & (y + tap_u < height) & (x + tap_v >= 0) & (x + tap_v < width)
        feature = load(features + (tap_u * f_sh + tap_v * f_sw), inside, has_channel, False, EVEN_C).to(acc[0].dtype)
        for a in tl.static_range(ROWS):
            sums = sums + (tl.fma(feature, values[a], acc[tap * ROWS + a]),)
    return sums


@triton.jit(do_not_specialize=_SIZES)
def backward_masks(
    grad, features, out, groups, channels, height, width, rows, columns, pad,
    g_sn, g_sc, g_sh, g_sw, f_sn, f_sc, f_sh, f_sw, o_sn, o_sc, o_sh, o_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_J: tl.constexpr, EVEN_C: tl.constexpr,
    G_ORDER: tl.constexpr, F_ORDER: tl.constexpr, O_ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program: TAPS taps at TILE_Y rows of centres x TILE_J columns of results, ROWS of the s rows of results.

    A lane is a column of results. A gradient is loaded once for the taps, a feature once for the ROWS. The channels are
    summed in steps of BLOCK_C, whose own sum comes last.
    """
    g_sn, g_sc, g_sh, g_sw = specialized(g_sn, g_sc, g_sh, g_sw, G_ORDER, WIDE)
    f_sn, f_sc, f_sh, f_sw = specialized(f_sn, f_sc, f_sh, f_sw, F_ORDER, WIDE)
    o_sn, o_sc, o_sh, o_sw = specialized(o_sn, o_sc, o_sh, o_sw, O_ORDER, WIDE)
    LANES: tl.constexpr = TILE_Y * TILE_J
    tap_blocks = tl.cdiv(K * K, TAPS)
    item, tile_y, tile_j, group, n = decode(
        tap_blocks * (S // ROWS), tl.cdiv(rows, TILE_Y), tl.cdiv(columns * S, TILE_J), groups
    )
    first = 0
    if TAPS < K * K:
        first = item % tap_blocks * TAPS
    a = item // tap_blocks * ROWS
    lane = tl.arange(0, LANES)[None, :]
    y = tile_y * TILE_Y + lane // TILE_J
    j = tile_j * TILE_J + lane % TILE_J
    has_result = (y < rows) & (j < columns * S)
    i = (y * S + a).to(tl.int64)
    out += n * o_sn + (group * K * K + first).to(tl.int64) * o_sc + (i * o_sh + j * o_sw)
    y = y * T - pad  # the feature under tap (0, 0)
    x = j // S * T - pad
    grad += n * g_sn + (group * channels).to(tl.int64) * g_sc + (i * g_sh + j * g_sw)
    features += n * f_sn + (group * channels).to(tl.int64) * f_sc + (y.to(tl.int64) * f_sh + x * f_sw)
    acc = zeros(TAPS * ROWS, (BLOCK_C, LANES), out.dtype.element_ty)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[:, None]
        acc = _masks_channels(
            acc, grad + c.to(tl.int64) * g_sc, features + c.to(tl.int64) * f_sc, first // K, first % K,
            y, x, height, width, has_result, c < channels, g_sh, f_sh, f_sw, K, TAPS, ROWS, EVEN_C,
        )  # fmt: skip
    for tap in tl.static_range(TAPS):
        for row in tl.static_range(ROWS):
            result = tl.sum(acc[tap * ROWS + row], axis=0)[None, :].to(out.dtype.element_ty)
            stored = has_result
            if TAPS < K * K:
                stored = has_result & (lane * 0 + first + tap < K * K)  # lanes, as the interpreter's `&` needs them
            tl.store(out + (tap * o_sc + row * o_sh), result, mask=stored)
