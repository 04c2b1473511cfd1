# mypy: ignore-errors
# (Triton's language, not Python's)
"""Matrix products of float32 in Triton, split into float16, which tensor cores multiply at twice the rate of TF32.

A row of a factor is multiplied by a power of two that brings its largest number between 2**14 and 2**15, and is then
high + low: high is the nearest float16, low that of the rest. The product is high * high + high * low + low * high, and
what is left out is below float32's own rounding. High alone has the 11 bits of TF32. Of a number that is smaller than
the row's largest one 22 bits are kept down to 2**-16 of that, fewer below, none at 2**-39. (An infinite factor may
give a NaN where an infinity was due.)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(value):
    """The bits of float32 numbers without their signs: integers in the order of the numbers, and above them NaN."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


_SCALED = tl.constexpr(2.0**14)
_OF_SUMS = tl.constexpr(2.0**-14)


@triton.jit
def powers(largest):
    """2**-s and 2**s, where the largest number times 2**s is below 2**15, of the bits of the largest numbers."""
    # An exponent of 15 or less would have a 2**s that is infinite or a 2**-s that is zero.
    exponent = tl.maximum(largest >> 23, 15)
    return ((exponent - 14) << 23).to(tl.float32, bitcast=True), ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_of_sums(down):
    """What a product of rows with scaled weights is multiplied by before the weights' scales: 2**-s * 2**-14, the 2**14
    being in those. So the sum over rows is as large as that of the rows' own numbers, and overflows where they do."""
    return down * _OF_SUMS


@triton.jit
def low_half(value, high):
    """What float16 dropped of a float32."""
    return tl.where(value == high.to(tl.float32), 0, value - high.to(tl.float32)).to(tl.float16)


@triton.jit
def multiply_add(a, b_high, b_low, total, PRECISE: tl.constexpr):
    """total + a @ (b_high + b_low), with the rows of a split as they come. Where not PRECISE, b_low is not read."""
    down, up = powers(tl.max(bits_of(a), 1))
    a *= up[:, None]
    a_high = a.to(tl.float16)
    # Tensor cores cut what they add to a sum, not round it: a sum of its own for each block keeps that small.
    if PRECISE:
        partial = tl.dot(low_half(a, a_high), b_high)
        partial = tl.dot(a_high, b_low, partial)
        partial = tl.dot(a_high, b_high, partial)
    else:
        partial = tl.dot(a_high, b_high)
    return total + partial * scales_of_sums(down)[:, None]


@triton.jit
def weights_in(memory, numbers):
    """Pointers to the high and the low halves of so many weights, in memory that is called float32."""
    high = memory.to(tl.pointer_type(tl.float16), bitcast=True)
    return high, high + numbers


@triton.jit
def split_weights(
    weight, scales, halves, o, weight_strides,
    C_OUT: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(high + low)[o, t * CG + c] * scales[o] = 2**14 * weight[o, c, t], whose strides are given, for an o."""
    weight_o, weight_c, weight_v, weight_u = weight_strides
    o = o.to(tl.int64)
    high, low = weights_in(halves, tl.full([], C_OUT, tl.int64) * (K * CG))
    weight += o * weight_o
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K * CG, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = i % K
        address = (
            (i // K).to(tl.int64) * weight_c + (t // KW).to(tl.int64) * weight_v + (t % KW).to(tl.int64) * weight_u
        )
        largest = tl.maximum(largest, bits_of(tl.load(weight + address, mask=i < K * CG, other=0)))
    down, up = powers(tl.max(largest, 0))
    tl.store(scales + o, down * _SCALED)
    for start in range(0, K * CG, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = i // CG
        address = (
            (i % CG).to(tl.int64) * weight_c + (t // KW).to(tl.int64) * weight_v + (t % KW).to(tl.int64) * weight_u
        )
        value = tl.load(weight + address, mask=i < K * CG, other=0) * up
        value_high = value.to(tl.float16)
        tl.store(high + (o * (K * CG) + i), value_high, mask=i < K * CG)
        tl.store(low + (o * (K * CG) + i), low_half(value, value_high), mask=i < K * CG)
