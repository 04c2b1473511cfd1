# mypy: ignore-errors
# (Triton's language, not Python's)
"""CARAFE's Triton kernels for twofold upsampling of maps stored row by row: the common case, and faster.

What bounds CARAFE on these GPUs is the traffic between the L1 cache and the registers. Here a thread owns two
neighbouring centres (or pixels), and whatever it reads lies in pairs of features and quads of results or weights, so
that a column read once serves both. Per row of taps (k = 5) and channel that is 3 loads for 40 products, where a centre
a thread takes 5 loads for 20. The other conventions are those of ``carafe.py``.

A tile is (CHANNELS, LANE): a row of lanes to a warp, a pair of pixels to a thread, so that pairs and quads are split
within a thread. The warps of a program work on the same pixels, for different channels or taps, and so find in the L1
cache what the first of them read.

Triton's time grows with the operations of a kernel, and faster than they do. So a thread's channels are rows of the
same tensor, and what the size of the map decides is no constant: a kernel is compiled once for all of them.
Where ``vectors`` is given, what is read lies aligned in memory, and each pair or quad is one load; elsewhere (maps of
odd width) the taps are a loop with a small body. Sizes and strides are not specialised, as one that happened to be 1 or
a multiple of 16 would be a compilation of its own. Channels and groups are: they are the same for all maps of a model.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._carafe_tiles import decode, to_int64, zeros

# All that depends on the size of the map.
_SIZES = ["height", "width", "shift", "vectors", *(f"{t}_s{axis}" for t in "fgmo" for axis in "nch")]


# Blocks of channels of a program in forward, one after the other: the second finds its weights in the cache.
BLOCKS = tl.constexpr(2)
# Rows of pixels of a thread in backward_features.
ROWS = tl.constexpr(2)


@triton.jit
def _split_pairs(pairs, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """(CHANNELS, 2 * TILE) to the first and the second of each pair, (CHANNELS, TILE)."""
    return tl.split(tl.reshape(pairs, (CHANNELS, TILE, 2)))


@triton.jit
def _split_quads(quads, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """(CHANNELS, 4 * TILE) to four (CHANNELS, TILE): centre 0 b 0, centre 0 b 1, centre 1 b 0, centre 1 b 1."""
    even, odd = tl.split(tl.reshape(quads, (CHANNELS, TILE, 2, 2)))
    first_even, second_even = tl.split(even)
    first_odd, second_odd = tl.split(odd)
    return first_even, first_odd, second_even, second_odd


@triton.jit
def _repeat_interleave(first, second, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """(CHANNELS, TILE) twice to (CHANNELS, 4 * TILE): the first twice, then the second twice."""
    pairs = tl.join(first, second)
    return tl.reshape(tl.join(pairs, pairs), (CHANNELS, 4 * TILE))


@triton.jit
def _expand_channels(weights, CHANNELS: tl.constexpr, WARPS: tl.constexpr, SIZE: tl.constexpr, dtype: tl.constexpr):
    """(1, WARPS, SIZE), whose rows are equal, to (CHANNELS, SIZE): the channels of a warp take what it loaded."""
    weights = tl.broadcast_to(weights.to(dtype), (CHANNELS // WARPS, WARPS, SIZE))
    return tl.reshape(weights, (CHANNELS, SIZE))


@triton.jit
def _load(pointers, inside, has_channel, EVEN_C: tl.constexpr, dtype: tl.constexpr):
    """Zero outside the map; EVEN_C says that every channel of the tile exists."""
    if EVEN_C:
        return tl.load(pointers, mask=inside, other=0.0).to(dtype)
    else:  # noqa: RET505 - only so is the other branch left out
        return tl.load(pointers, mask=inside & has_channel, other=0.0).to(dtype)


@triton.jit
def _multiples(FACTOR: tl.constexpr, first, second, WIDE: tl.constexpr):
    """Two strides as what they are, multiples of FACTOR, for the compiler to know it; WIDE: offsets need 64 bits."""
    if WIDE:
        return to_int64(first) // FACTOR * FACTOR, to_int64(second) // FACTOR * FACTOR
    else:  # noqa: RET505 - only so is the other branch, of other types, left out
        return first // FACTOR * FACTOR, second // FACTOR * FACTOR


@triton.jit
def _pixels_of_lanes(top, left, shift, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Row and column of the COUNT elements of each thread, where a tile begins at row ``top``, column left * COUNT."""
    lane = tl.arange(0, COUNT * TILE)[None, :]
    thread = lane // COUNT
    row = thread >> shift
    return top + row, (left + thread - (row << shift)) * COUNT + lane % COUNT


@triton.jit
def _expand_warps(offsets, WARPS: tl.constexpr):
    """(1, LANE) to (1, WARPS, LANE)."""
    return offsets[None, :, :] + tl.arange(0, WARPS)[None, :, None] * 0


@triton.jit
def _forward_row(
    first, second, features, masks, y, x, height, width, has_channel, m_sc, m_sh,
    K: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what a row of taps gives to both rows of results."""
    SKIP: tl.constexpr = K // 2 % 2
    columns = ()  # element v + p + SKIP is what tap v sees from centre p
    for d in tl.static_range((K // 2 + SKIP + K // 2 + 3) // 2):
        inside = (y >= 0) & (y < height) & (x + 2 * d >= 0) & (x + 2 * d < width)
        pairs = _load(features + 2 * d, inside, has_channel, EVEN_C, first.dtype)
        columns = columns + _split_pairs(pairs, CHANNELS, TILE)
    for v in tl.static_range(K):
        values = _repeat_interleave(columns[v + SKIP], columns[v + SKIP + 1], CHANNELS, TILE)
        weights = tl.load(masks + v * m_sc)
        first = tl.fma(values, _expand_channels(weights, CHANNELS, WARPS, 4 * TILE, first.dtype), first)
        weights = tl.load(masks + (v * m_sc + m_sh))
        second = tl.fma(values, _expand_channels(weights, CHANNELS, WARPS, 4 * TILE, first.dtype), second)
    return first, second


@triton.jit
def _forward_tap(
    first, second, features, masks, inside, has_channel, m_sh,
    CHANNELS: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what one tap gives to both rows of results."""
    pairs = _load(features, inside, has_channel, EVEN_C, first.dtype)
    even, odd = _split_pairs(pairs, CHANNELS, TILE)
    values = _repeat_interleave(even, odd, CHANNELS, TILE)
    weights = tl.load(masks)
    first = tl.fma(values, _expand_channels(weights, CHANNELS, WARPS, 4 * TILE, first.dtype), first)
    weights = tl.load(masks + m_sh)
    second = tl.fma(values, _expand_channels(weights, CHANNELS, WARPS, 4 * TILE, first.dtype), second)
    return first, second


@triton.jit
def _forward(
    features, masks, out, sizes, f_strides, m_strides, o_strides,
    K: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    groups, channels, height, width, shift = sizes
    f_sn, f_sc, f_sh = f_strides
    m_sn, m_sc, m_sh = m_strides
    o_sn, o_sc, o_sh = o_strides
    PAD: tl.constexpr = K // 2
    PAIR: tl.constexpr = 2 if VECTORS else 1
    QUAD: tl.constexpr = 4 if VECTORS else 2
    f_sc, f_sh = _multiples(PAIR, f_sc, f_sh, WIDE)
    m_sc, m_sh = _multiples(QUAD, m_sc, m_sh, WIDE)
    o_sc, o_sh = _multiples(QUAD, o_sc, o_sh, WIDE)
    width = width // PAIR * PAIR
    tile_x, tile_y = 1 << shift, TILE >> shift  # powers of two
    chunk, top, left, group, n = decode(
        tl.cdiv(channels, BLOCKS * CHANNELS), tl.cdiv(height, tile_y), tl.cdiv(width, 2 * tile_x), groups
    )
    # The feature under tap (0, 0) of the first centre of a pair, or the column before it where that is even.
    y, x = _pixels_of_lanes(top * tile_y - PAD, left * tile_x - (PAD + 1) // 2, shift, 2, TILE)
    row, j = _pixels_of_lanes(top * tile_y, left * tile_x, shift, 4, TILE)
    i = (2 * row).to(tl.int64)
    has_result = (row < height) & (j < 2 * width)
    channel = tl.arange(0, CHANNELS)[:, None]
    of_warp = channel % WARPS
    block = channel - of_warp  # the same in all threads: no addresses of their own
    c = (group * channels).to(tl.int64)
    features += (n * f_sn + c * f_sc) // PAIR * PAIR + (y.to(tl.int64) * f_sh + x + of_warp * f_sc)
    # What is no result is computed from the first weights, as many as any row has, and not stored: so no load of
    # weights needs a mask.
    mask_index = tl.where(has_result, i * m_sh + j, tl.arange(0, 4 * TILE)[None, :] % QUAD)
    masks += (n * m_sn + (group * K * K).to(tl.int64) * m_sc) // QUAD * QUAD + _expand_warps(mask_index, WARPS)
    out += (n * o_sn + c * o_sc) // QUAD * QUAD + (i * o_sh + j + of_warp * o_sc)
    first_channel = chunk * (BLOCKS * CHANNELS)
    for start in range(first_channel, tl.minimum(first_channel + BLOCKS * CHANNELS, channels), CHANNELS):
        has_channel = start + channel < channels
        first, second = zeros(2, (CHANNELS, 4 * TILE), out.dtype.element_ty)
        if VECTORS:
            for u in range(K):
                first, second = _forward_row(
                    first, second, features + ((start + block) * f_sc + u * f_sh), masks + u * K * m_sc, y + u, x,
                    height, width, has_channel, m_sc, m_sh, K, CHANNELS, WARPS, TILE, EVEN_C,
                )  # fmt: skip
        else:
            for u in range(K):
                for tap in range(K):  # unrolled later, by LLVM
                    v = tap + PAD % 2
                    inside = (y + u >= 0) & (y + u < height) & (x + v >= 0) & (x + v < width)
                    first, second = _forward_tap(
                        first, second, features + ((start + block) * f_sc + (u * f_sh + v)),
                        masks + (u * K + tap) * m_sc, inside, has_channel, m_sh, CHANNELS, WARPS, TILE, EVEN_C,
                    )  # fmt: skip
        stored = has_result
        if not EVEN_C:
            stored = has_result & has_channel
        pointers = out + (start + block) * o_sc
        tl.store(pointers, first.to(out.dtype.element_ty), mask=stored)
        tl.store(pointers + o_sh, second.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_SIZES)
def forward(
    features, masks, out, groups, channels, height, width, shift, vectors, f_sn, f_sc, f_sh, m_sn, m_sc, m_sh,
    o_sn, o_sc, o_sh,
    K: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A program: BLOCKS * CHANNELS of a group at TILE pairs of centres, 2**shift of them beside each other."""
    sizes = (groups, channels, height, width, shift)
    f_strides, m_strides, o_strides = (f_sn, f_sc, f_sh), (m_sn, m_sc, m_sh), (o_sn, o_sc, o_sh)
    if vectors != 0:
        _forward(
            features, masks, out, sizes, f_strides, m_strides, o_strides, K, WARPS, CHANNELS, TILE, EVEN_C, WIDE, True
        )
    else:
        _forward(
            features, masks, out, sizes, f_strides, m_strides, o_strides, K, WARPS, CHANNELS, TILE, EVEN_C, WIDE, False
        )


@triton.jit
def _features_step(
    acc, grad, masks, step: tl.constexpr, tap, row, j, height, width, has_channel, m_sc,
    K: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what a row of results gives to ROWS rows of pixels, from the pairs of centres ``step`` beside them.

    Of these pairs centre h sees pixel p through tap v = p - h + K // 2 - 2 * step, which are three taps where all are.
    """
    dtype: tl.constexpr = acc[0].dtype
    inside = (row >= 0) & (row < height) & (j + 4 * step >= 0) & (j + 4 * step < 2 * width)
    loaded = ()  # weights before gradients: in the other order the kernel is a tenth slower
    for r in tl.static_range(ROWS):
        has_tap = inside & (tap + r >= 0) & (tap + r < K)
        for d in tl.static_range(3):
            if K // 2 - 2 * step + d > 0 and K // 2 - 2 * step + d <= K:
                pointers = masks + ((r * K + K // 2 - 2 * step + d - 1) * m_sc + 4 * step)
                weights = tl.load(pointers, mask=has_tap[None, :, :], other=0.0)
                loaded = loaded + (_expand_channels(weights, CHANNELS, WARPS, 4 * TILE, dtype),)
            else:
                loaded = loaded + (acc[0],)  # never used
    values = _split_quads(_load(grad + 4 * step, inside, has_channel, EVEN_C, dtype), CHANNELS, TILE)
    sums = ()
    for r in tl.static_range(ROWS):
        first = acc[2 * r]
        second = acc[2 * r + 1]
        for d in tl.static_range(3):
            if K // 2 - 2 * step + d > 0 and K // 2 - 2 * step + d <= K:
                weights = _split_quads(loaded[3 * r + d], CHANNELS, TILE)
                for b in tl.static_range(2):
                    if d == 0:
                        first = tl.fma(values[2 + b], weights[2 + b], first)
                    if d == 1:
                        first = tl.fma(values[b], weights[b], first)
                        second = tl.fma(values[2 + b], weights[2 + b], second)
                    if d == 2:
                        second = tl.fma(values[b], weights[b], second)
        sums = sums + (first, second)
    return sums


@triton.jit
def _features_tap(
    acc, grad, masks, u, v, inside, has_channel, m_sc,
    K: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Add what one tap of a row of results gives to ROWS rows of pixels, for each column of results apart."""
    dtype: tl.constexpr = acc[0].dtype
    value = _load(grad, inside, has_channel, EVEN_C, dtype)
    sums = ()
    for r in tl.static_range(ROWS):
        tap = inside.to(tl.int32) * 0 + (u + r)  # lanes, as the interpreter's `&` needs them
        has_tap = inside & (tap >= 0) & (tap < K)
        weights = tl.load(masks + ((u + r) * K + v) * m_sc, mask=has_tap[None, :, :], other=0.0)
        sums = sums + (tl.fma(value, _expand_channels(weights, CHANNELS, WARPS, 4 * TILE, dtype), acc[r]),)
    return sums


@triton.jit
def _store_features(
    acc, out, y, x, height, width, has_channel, o_sh,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Store ROWS rows of pixels, of which ``out`` points to the first; (y, x) are that one's, (1, 2 * TILE)."""
    for r in tl.static_range(ROWS):
        if VECTORS:
            pairs = tl.join(acc[2 * r], acc[2 * r + 1])
        else:
            even, odd = tl.split(tl.reshape(acc[r], (CHANNELS, TILE, 2, 2)))
            pairs = even + odd
        stored = (y + r < height) & (x < width)
        if not EVEN_C:
            stored = stored & has_channel
        tl.store(out + r * o_sh, tl.reshape(pairs, (CHANNELS, 2 * TILE)).to(out.dtype.element_ty), mask=stored)


@triton.jit
def _backward_features(
    grad, masks, out, sizes, g_strides, m_strides, o_strides,
    K: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    groups, channels, height, width, shift = sizes
    g_sn, g_sc, g_sh = g_strides
    m_sn, m_sc, m_sh = m_strides
    o_sn, o_sc, o_sh = o_strides
    PAIR: tl.constexpr = 2 if VECTORS else 1
    QUAD: tl.constexpr = 4 if VECTORS else 2
    REACH: tl.constexpr = (K // 2 + 1) // 2  # pairs of centres to either side
    g_sc, g_sh = _multiples(QUAD, g_sc, g_sh, WIDE)
    m_sc, m_sh = _multiples(QUAD, m_sc, m_sh, WIDE)
    o_sc, o_sh = _multiples(PAIR, o_sc, o_sh, WIDE)
    width = width // PAIR * PAIR
    tile_x, tile_y = 1 << shift, TILE >> shift  # powers of two
    chunk, top, left, group, n = decode(
        tl.cdiv(channels, CHANNELS), tl.cdiv(height, tile_y * ROWS), tl.cdiv(width, 2 * tile_x), groups
    )
    row, j = _pixels_of_lanes(top * tile_y, left * tile_x, shift, 4, TILE)
    row = row * ROWS + K // 2
    channel = tl.arange(0, CHANNELS)[:, None]
    has_channel = chunk * CHANNELS + channel < channels
    of_warp = channel % WARPS
    block = channel - of_warp
    c = (group * channels + chunk * CHANNELS).to(tl.int64)
    grad += (n * g_sn + c * g_sc) // QUAD * QUAD + (j + of_warp * g_sc)
    masks += (n * m_sn + (group * K * K).to(tl.int64) * m_sc) // QUAD * QUAD + _expand_warps(j, WARPS)
    # The centre row that sees row y through tap row u sees row y + r through tap row u + r.
    if VECTORS:
        acc = zeros(2 * ROWS, (CHANNELS, TILE), out.dtype.element_ty)
        for index in range(2 * (K + ROWS - 1)):
            u = index // 2 + 1 - ROWS
            i = (2 * (row - u) + index % 2).to(tl.int64)
            grads = grad + i * g_sh + block * g_sc
            weights = masks + (i * m_sh + u * K * m_sc)[None, :, :]
            for step in tl.static_range(2 * REACH + 1):
                acc = _features_step(
                    acc, grads, weights, step - REACH, row * 0 + u, row - u, j, height, width, has_channel, m_sc,
                    K, CHANNELS, WARPS, TILE, EVEN_C,
                )  # fmt: skip
    else:
        acc = zeros(ROWS, (CHANNELS, 4 * TILE), out.dtype.element_ty)
        for index in range(2 * (K + ROWS - 1) * K):
            u = index // (2 * K) + 1 - ROWS
            v = index % K
            shift_j = 2 * (K // 2 - v)  # from the pixels' own columns of results
            i = (2 * (row - u) + index // K % 2).to(tl.int64)
            inside = (row - u >= 0) & (row - u < height) & (j + shift_j >= 0) & (j + shift_j < 2 * width)
            acc = _features_tap(
                acc, grad + (i * g_sh + shift_j) + block * g_sc, masks + (i * m_sh + shift_j)[None, :, :], u, v, inside,
                has_channel, m_sc, K, CHANNELS, WARPS, TILE, EVEN_C,
            )  # fmt: skip
    y, x = _pixels_of_lanes(top * tile_y, left * tile_x, shift, 2, TILE)
    y = y * ROWS
    out += (n * o_sn + c * o_sc) // PAIR * PAIR + (y.to(tl.int64) * o_sh + x + of_warp * o_sc) + block * o_sc
    _store_features(acc, out, y, x, height, width, has_channel, o_sh, CHANNELS, TILE, EVEN_C, VECTORS)


@triton.jit(do_not_specialize=_SIZES)
def backward_features(
    grad, masks, out, groups, channels, height, width, shift, vectors, g_sn, g_sc, g_sh, m_sn, m_sc, m_sh,
    o_sn, o_sc, o_sh,
    K: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A program: CHANNELS of a group at TILE pairs of pixels in each of ROWS rows below each other.

    A thread owns the pairs below each other, and a gradient is loaded once for all that it reaches of them.
    """
    sizes = (groups, channels, height, width, shift)
    g_strides, m_strides, o_strides = (g_sn, g_sc, g_sh), (m_sn, m_sc, m_sh), (o_sn, o_sc, o_sh)
    if vectors != 0:
        _backward_features(
            grad, masks, out, sizes, g_strides, m_strides, o_strides, K, WARPS, CHANNELS, TILE, EVEN_C, WIDE, True
        )
    else:
        _backward_features(
            grad, masks, out, sizes, g_strides, m_strides, o_strides, K, WARPS, CHANNELS, TILE, EVEN_C, WIDE, False
        )


@triton.jit
def _masks_channel(
    acc, grad, features, y, x, height, width, has_result, has_channel,
    K: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    SKIP: tl.constexpr = K // 2 % 2
    columns = ()
    for d in tl.static_range((K // 2 + SKIP + K // 2 + 3) // 2):
        inside = (y >= 0) & (y < height) & (x + 2 * d >= 0) & (x + 2 * d < width)
        pairs = _load(features + 2 * d, inside, has_channel, EVEN_C, acc[0].dtype)
        columns = columns + _split_pairs(pairs, WARPS, TILE)
    value = _load(grad, has_result, has_channel, EVEN_C, acc[0].dtype)
    sums = ()
    for v in tl.static_range(K):
        values = _repeat_interleave(columns[v + SKIP], columns[v + SKIP + 1], WARPS, TILE)
        sums = sums + (tl.fma(values, value, acc[v]),)
    return sums


@triton.jit
def _backward_masks(
    grad, features, out, sizes, g_strides, f_strides, o_strides,
    K: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    groups, channels, height, width, shift = sizes
    g_sn, g_sc, g_sh = g_strides
    f_sn, f_sc, f_sh = f_strides
    o_sn, o_sc, o_sh = o_strides
    PAIR: tl.constexpr = 2 if VECTORS else 1
    QUAD: tl.constexpr = 4 if VECTORS else 2
    g_sc, g_sh = _multiples(QUAD, g_sc, g_sh, WIDE)
    f_sc, f_sh = _multiples(PAIR, f_sc, f_sh, WIDE)
    o_sc, o_sh = _multiples(QUAD, o_sc, o_sh, WIDE)
    width = width // PAIR * PAIR
    tile_x, tile_y = 1 << shift, TILE >> shift  # powers of two
    tiles_y = tl.cdiv(height, tile_y)
    tiles_x = tl.cdiv(width, 2 * tile_x)
    unit = tl.program_id(0) * WARPS + tl.arange(0, WARPS)[:, None]
    u = unit % K
    a = unit // K % 2
    tile = unit // (2 * K)
    top = tile // tiles_x % tiles_y * tile_y
    left = tile % tiles_x * tile_x
    group = tile // tiles_x // tiles_y % groups
    n = (tile // tiles_x // tiles_y // groups).to(tl.int64)
    y, x = _pixels_of_lanes(top - K // 2, left - (K // 2 + 1) // 2, shift, 2, TILE)
    y += u
    row, j = _pixels_of_lanes(top, left, shift, 4, TILE)
    i = (2 * row + a).to(tl.int64)
    has_result = (row < height) & (j < 2 * width)
    c = (group * channels).to(tl.int64)
    grad += (n * g_sn + c * g_sc) // QUAD * QUAD + (i * g_sh + j)
    features += (n * f_sn + c * f_sc) // PAIR * PAIR + (y.to(tl.int64) * f_sh + x)
    acc = zeros(K, (WARPS, 4 * TILE), out.dtype.element_ty)
    for start in range(0, channels, CHANNELS):
        if VECTORS and K > 5:  # more than LLVM unrolls
            for step in tl.static_range(CHANNELS):
                acc = _masks_channel(
                    acc, grad + (start + step) * g_sc, features + (start + step) * f_sc, y, x, height, width,
                    has_result, u * 0 + (start + step) < channels, K, WARPS, TILE, EVEN_C,
                )  # fmt: skip
        else:
            for step in range(CHANNELS):  # unrolled later, by LLVM, which takes a third of the time
                acc = _masks_channel(
                    acc, grad + (start + step) * g_sc, features + (start + step) * f_sc, y, x, height, width,
                    has_result, u * 0 + (start + step) < channels, K, WARPS, TILE, EVEN_C,
                )  # fmt: skip
    out += (n * o_sn + (group * K * K + u * K).to(tl.int64) * o_sc) // QUAD * QUAD + (i * o_sh + j)
    for v in tl.static_range(K):
        tl.store(out + v * o_sc, acc[v].to(out.dtype.element_ty), mask=has_result)


@triton.jit(do_not_specialize=_SIZES)
def backward_masks(
    grad, features, out, groups, channels, height, width, shift, vectors, g_sn, g_sc, g_sh, f_sn, f_sc, f_sh,
    o_sn, o_sc, o_sh,
    K: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A program: WARPS units of work; a unit is a row of taps and one of results at TILE pairs of centres.

    The units of a tile, 2 * K, are neighbours and read the same gradients; WARPS divides their number. CHANNELS are
    unrolled, to have their loads in flight together.
    """
    sizes = (groups, channels, height, width, shift)
    g_strides, f_strides, o_strides = (g_sn, g_sc, g_sh), (f_sn, f_sc, f_sh), (o_sn, o_sc, o_sh)
    if vectors != 0:
        _backward_masks(
            grad, features, out, sizes, g_strides, f_strides, o_strides, K, WARPS, CHANNELS, TILE, EVEN_C, WIDE, True
        )
    else:
        _backward_masks(
            grad, features, out, sizes, g_strides, f_strides, o_strides, K, WARPS, CHANNELS, TILE, EVEN_C, WIDE, False
        )
