# mypy: ignore-errors
# (Triton's language, not Python's)
"""Matrix products of float32 in Triton, on tensor cores: exact enough to be float32, or in TF32.

PRECISE splits a factor in two of the precision of tensor cores (TF32, 11 bits), a = high + low, and a product is high *
high + high * low + low * high: three products on tensor cores, which are still faster than one without them. What is
left out, low * low, is below float32's own rounding. (An infinite factor may give a NaN where an infinity was due.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniops.backends.cuda._grid import cdiv


@triton.jit
def high_part(value):
    """A float32 without the bits that tensor cores drop."""
    return (value.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def low_part(value, high):
    """What high_part dropped."""
    return tl.where(value == high, 0, value - high)


@triton.jit
def multiply_add(a, b_high, b_low, total):
    """total + a @ (b_high + b_low)."""
    a_high = high_part(a)
    # Tensor cores cut what they add to a sum, not round it: a sum of its own for each block of k keeps that small.
    part = tl.dot(low_part(a, a_high), b_high, input_precision="tf32")
    part = tl.dot(a_high, b_low, part, input_precision="tf32")
    part = tl.dot(a_high, b_high, part, input_precision="tf32")
    return total + part


@triton.jit
def product(
    a, b, out, M, N, K, per_split,
    a_batch, a_m, a_k, b_batch, b_k, b_n, out_split, out_batch, out_m, out_n,
    PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, batch, m, n] = sum over the split's k of a[batch, m, k] * b[batch, k, n].

    Grid: (blocks of n * blocks of m, batches, splits); blocks of n vary fastest.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m = tl.program_id(0) // blocks_n
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) - block_m * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    of_block = tl.arange(0, BLOCK_K)
    a_rows = a + (batch * a_batch + tl.where(m < M, m, 0).to(tl.int64) * a_m)[:, None]
    b_columns = b + (batch * b_batch + tl.where(n < N, n, 0).to(tl.int64) * b_n)[None, :]
    end = tl.minimum((split + 1) * per_split, K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * per_split, end, BLOCK_K):
        k = start + of_block
        at = k.to(tl.int64)
        a_block = tl.load(a_rows + (at * a_k)[None, :], mask=(k < end)[None, :], other=0)
        b_block = tl.load(b_columns + (at * b_k)[:, None], mask=(k < end)[:, None], other=0)
        if PRECISE:
            b_high = high_part(b_block)
            total = multiply_add(a_block, b_high, low_part(b_block, b_high), total)
        else:
            total = tl.dot(a_block, b_block, total, input_precision="tf32")
    to = out + split.to(tl.int64) * out_split + batch * out_batch
    to += m.to(tl.int64)[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
    tl.store(to, total, mask=(m < M)[:, None] & (n < N)[None, :])


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """high and low of a float32 tensor."""
    high = (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, torch.where(tensor == high, 0, tensor - high)


def batched(a: Tensor, b: Tensor, out: Tensor, precise: bool) -> None:
    """out = a @ b: (batch, M, K), (batch, K, N) -> (batch, M, N), all float32.

    Fastest where both factors lie along K in memory.
    """
    # Triton makes vector loads only of rows that it knows to begin at multiples of 16, and without them cuBLAS was
    # three times as fast. (Where the product is not precise, PyTorch's may be in TF32 too.)
    if (a.shape[2] | a.stride(1) | b.stride(2)) % 16 != 0:
        torch.bmm(a, b, out=out)
        return
    (batches, m, k), n = a.shape, b.shape[2]
    block_m = 64 if m <= 64 else 128
    tiles = cdiv(m, block_m) * cdiv(n, 128) * batches
    # The GPU wants some hundreds of tiles: smaller ones, or K is cut in parts that are summed afterwards.
    splits = max(1, min(k // 512, 1024 // tiles, 32)) if k > 4096 else 1
    block_n = 128 if tiles * splits >= 200 else 64
    warps = 8 if precise and block_m * block_n == 128 * 128 else 4  # two sums take twice the registers
    partial = out[None] if splits == 1 else out.new_empty((splits, batches, m, n))
    product[(cdiv(m, block_m) * cdiv(n, block_n), batches, splits)](
        a, b, partial, m, n, k, cdiv(cdiv(k, splits), 32) * 32,
        *a.stride(), *b.stride(), *partial.stride(),
        PRECISE=precise, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=32, num_warps=warps, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        torch.sum(partial, 0, out=out)
