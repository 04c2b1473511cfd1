# mypy: ignore-errors
# (Triton's language, not Python's)
"""What CARAFE's Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(pointers, inside, has_channel, INTERIOR: tl.constexpr, EVEN_C: tl.constexpr):
    """Load with zero outside; WHOLE says that nothing is outside, EVEN_C that every channel of the tile exists."""
    if INTERIOR and EVEN_C:
        return tl.load(pointers)
    if INTERIOR:
        return tl.load(pointers, mask=has_channel, other=0.0)
    if EVEN_C:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers, mask=inside & has_channel, other=0.0)


@triton.jit
def to_int64(stride):
    """A stride in 64 bits, as what it is multiplied with may exceed 32."""
    return stride * tl.full((), 1, tl.int64)


@triton.jit
def specialized(sn, sc, sh, sw, ORDER: tl.constexpr, WIDE: tl.constexpr):
    """The strides, as multiples or constants that the compiler sees: ``_carafe_launches._order`` explains ORDER.

    WIDE: offsets need 64 bits. Those along a row do not, nor do those of an image's channels where the channels are
    the neighbours.
    """
    if WIDE:
        sc, sh = to_int64(sc), to_int64(sh)
    if ORDER == -1:
        return sn, sc, sh, tl.full((), 1, tl.int32)
    elif ORDER > 0:  # noqa: RET505 - only so are the other branches, of other types, left out
        return sn // ORDER * ORDER, tl.full((), 1, tl.int32), sh // ORDER * ORDER, sw // ORDER * ORDER
    else:
        return sn, sc, sh, sw


@triton.jit
def zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr, dtype: tl.constexpr):
    """COUNT tiles of zeros, in float64 for float64 and else in float32."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(SHAPE, tl.float64 if dtype == tl.float64 else tl.float32),)
    return tiles


@triton.jit
def decode(items, tiles_y, tiles_x, groups):
    """This program's item, tile row, tile column, group and batch; the items of a tile are neighbours, for L2."""
    program = tl.program_id(0)
    tile = program // items
    batch = tile // tiles_x // tiles_y
    return program % items, tile // tiles_x % tiles_y, tile % tiles_x, batch % groups, (batch // groups).to(tl.int64)
