# mypy: ignore-errors
# (Triton's language, not Python's)
"""Matrix products of float32 in Triton, on tensor cores: exact enough to be float32, or in TF32.

PRECISE splits a factor in two of the precision of tensor cores (TF32, 11 bits), a = high + low, and a product is high *
high + high * low + low * high: three products on tensor cores, which are still faster than one without them. What is
left out, low * low, is below float32's own rounding. (An infinite factor may give a NaN where an infinity was due.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniops.backends.cuda._grid import cdiv
from omniops.backends.cuda._launch import Launch


@triton.jit
def high_half(value):
    """A float32 without the bits that tensor cores drop."""
    return (value.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def low_half(value, high):
    """What high_half dropped."""
    return tl.where(value == high, 0, value - high)


@triton.jit
def multiply_add(a, b_high, b_low, total):
    """total + a @ (b_high + b_low)."""
    a_high = high_half(a)
    # Tensor cores cut what they add to a sum, not round it: a sum of its own for each block of k keeps that small.
    partial = tl.dot(low_half(a, a_high), b_high, input_precision="tf32")
    partial = tl.dot(a_high, b_low, partial, input_precision="tf32")
    partial = tl.dot(a_high, b_high, partial, input_precision="tf32")
    return total + partial


@triton.jit(
    do_not_specialize=[
        "M", "N", "K_16", "per_split", "a_batch", "a_m_16", "b_batch", "b_n_16",
        "out_split", "out_batch", "out_m", "out_n",
    ]
)  # fmt: skip
def product(
    a, b, bias, out, M, N, K_16, per_split,
    a_batch, a_m_16, b_batch, b_n_16, out_split, out_batch, out_m, out_n,
    PRECISE: tl.constexpr, BIASED: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, batch, m, n] = sum over the split's k of a[batch, m, k] * b[batch, k, n]; bias[m] is added to that
    of the first split.

    Both factors lie along k, in rows of multiples of 16, so that loads are wide: *_16 are sixteenths. Sizes are no
    constants, as they change with the map. OUT says how the result lies: along m (0), along n (1), or along n in rows
    of multiples of 16 (16), where its strides are sixteenths too.

    Grid: (blocks of n * blocks of m, batches, splits); blocks of n vary fastest.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m = tl.program_id(0) // blocks_n
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) - block_m * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    k_offsets = tl.arange(0, BLOCK_K)
    # The factor 16 stands last, for the compiler to see it.
    a_rows = a + ((batch * a_batch + tl.where(m < M, m, 0).to(tl.int64) * a_m_16) * 16)[:, None]
    b_columns = b + ((batch * b_batch + tl.where(n < N, n, 0).to(tl.int64) * b_n_16) * 16)[None, :]
    end = tl.minimum((split + 1) * per_split * BLOCK_K, K_16 * 16)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * per_split * BLOCK_K, end, BLOCK_K):
        k = start + k_offsets
        a_block = tl.load(a_rows + k[None, :], mask=(k < end)[None, :], other=0)
        b_block = tl.load(b_columns + k[:, None], mask=(k < end)[:, None], other=0)
        if PRECISE:
            b_high = high_half(b_block)
            total = multiply_add(a_block, b_high, low_half(b_block, b_high), total)
        else:
            total = tl.dot(a_block, b_block, total, input_precision="tf32")
    if BIASED:
        total += tl.where(split == 0, tl.load(bias + m, mask=m < M, other=0), 0)[:, None]
    out_index = split.to(tl.int64) * out_split + batch * out_batch
    if OUT == 0:
        out_index = (out_index + m)[:, None] + (n.to(tl.int64) * out_n)[None, :]
    elif OUT == 1:
        out_index = (out_index + m.to(tl.int64) * out_m)[:, None] + n[None, :]
    else:
        out_index = ((out_index + m.to(tl.int64) * out_m) * 16)[:, None] + n[None, :]
    end_n = N // 16 * 16 if OUT == 16 else N
    tl.store(out + out_index, total, mask=(m < M)[:, None] & (n < end_n)[None, :])


def has_tf32(tensor: Tensor) -> bool:
    """Whether the tensor's GPU has tensor cores that take TF32."""
    # A tensor that is on no GPU is one for Triton's interpreter.
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def is_tf32() -> bool:
    """Whether PyTorch's matrix products of float32 may round their factors to TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9
    return bool(torch.backends.cuda.matmul.allow_tf32) if precision is None else precision == "tf32"


class ProductTile(NamedTuple):
    """What a program of ``product`` takes."""

    m: int
    """Rows of the result."""
    n: int
    """Columns of it: of a precise product half as many, as two sums take twice the registers."""
    k: int
    """Terms of a step."""
    warps: int
    stages: int
    """Of the pipeline that loads blocks while others are multiplied."""


TILES = {
    # (precise, small): tile
    (True, True): ProductTile(64, 64, 32, 4, 3),
    (True, False): ProductTile(128, 64, 32, 4, 3),
    (False, True): ProductTile(64, 128, 32, 4, 3),
    (False, False): ProductTile(128, 128, 32, 4, 3),
}
"""Of one size for maps of any size, so that none is compiled for. docs/benchmarks.md has been measured with them, in
deform_conv2d: one NVIDIA H200, 2026-11-29, torch 2.11.0+cu130, Triton 3.6.0."""

MIN_PROGRAMS, MAX_SPLITS, MIN_TERMS, LONG_SUM = 512, 32, 512, 4096
"""The GPU wants some hundreds of programs: sums of more than LONG_SUM terms are split into up to MAX_SPLITS of at least
MIN_TERMS, until there are MIN_PROGRAMS."""


class Product:
    """out = a @ b for float32 tensors of given sizes and strides: (batch, M, K), (batch, K, N) -> (batch, M, N).

    Fastest where both factors lie along K in memory.
    """

    def __init__(
        self,
        batches: int,
        m: int,
        k: int,
        n: int,
        a: Sequence[int],
        b: Sequence[int],
        out: Sequence[int],
        *,
        precise: bool,
        ours: bool = True,
        biased: bool = False,
        aligned: bool = False,
        small: bool = False,
    ) -> None:
        """``a``, ``b`` and ``out`` are strides. Where not ``ours``, PyTorch's product serves, and any dtype does.
        ``biased``: bias[m] is added. ``aligned``: the strides of out, along n, are multiples of 16 whatever the size of
        a map; ``small``: M is so at most 64.
        """
        self._launch: Launch | None = None
        # Triton makes vector loads only of rows that it knows to begin at multiples of 16, and without them cuBLAS was
        # three times as fast. (Where the product is not precise, PyTorch's may be in TF32 too.)
        if not ours or a[2] != 1 or b[1] != 1 or (k | a[0] | a[1] | b[0] | b[2]) % 16 != 0 or 1 not in out[1:]:
            return
        tile = TILES[precise, small]
        tiles = cdiv(m, tile.m) * cdiv(n, tile.n)
        splits = max(1, min(k // MIN_TERMS, MIN_PROGRAMS // (tiles * batches), MAX_SPLITS)) if k > LONG_SUM else 1
        layout = 16 if aligned else int(out[2] == 1)
        self._partial = (splits, batches, m, n)
        strides = (0, *out) if splits == 1 else (batches * m * n, m * n, n, 1)
        if splits > 1:
            layout = 16 if m * n % 16 == 0 and n % 16 == 0 else 1
        self._launch = Launch(
            product, (tiles, batches, splits),
            m, n, k // 16, cdiv(cdiv(k, splits), tile.k),
            a[0] // 16, a[1] // 16, b[0] // 16, b[2] // 16,
            *(stride // 16 if layout == 16 else stride for stride in strides[:3]), strides[3],
            PRECISE=precise, BIASED=biased, OUT=layout,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    @property
    def splits(self) -> int:
        """In how many splits of K the product is made: more than 1 need a sum afterwards."""
        return 1 if self._launch is None else self._partial[0]

    @property
    def in_one_launch(self) -> bool:
        """Whether the tensors may be of any shape, as only where they begin is looked at."""
        return self._launch is not None and self._partial[0] == 1

    def __call__(self, stream: int, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """``out`` may be (splits, batch, M, N), contiguous: the splits are then left in it."""
        if self._launch is None:
            if bias is None:
                torch.bmm(a, b, out=out)
            else:
                torch.baddbmm(bias[:, None], a, b, out=out)
        elif self._partial[0] == 1 or out.dim() == 4:
            self._launch(stream, a, b, a if bias is None else bias, out)
        else:
            partial = out.new_empty(self._partial)
            self._launch(stream, a, b, a if bias is None else bias, partial)
            torch.sum(partial, 0, out=out)
