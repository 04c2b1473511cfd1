"""Deformable convolution in Triton: the launches of its kernels for arguments of given shapes and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from omniops.backends import accumulator, memory_format
from omniops.backends.columns import Geometry, chunks, geometry_of
from omniops.backends.cuda import (
    _deform_columns,
    _deform_float16_columns,
    _deform_fused,
    _deform_fused_narrow,
    _deform_prepare,
)
from omniops.backends.cuda._deform_float16_columns import UNIT
from omniops.backends.cuda._deform_prepare import CHANNELS, PIXELS, POSITIONS, ZEROS
from omniops.backends.cuda._grid import cdiv, next_power_of_2
from omniops.backends.cuda._launch import Launch

MOST_BYTES = 3 * 2**28
"""What columns and plan of a chunk of positions take at most, if they are those of more than one position.

Beside it stand the input with a border and the weights by tap; in the backward the gradient in one or two other orders
and, for the gradient of the input, one in float32. The deterministic gradient of the input takes 24 to 32 bytes more
for a sample of the chunk, and 8 to 16 for a pixel of its images and offset group.
"""

MOST_CHUNKS = 8
"""Launches for so many chunks are kept; for more they are made anew each time, beside which a chunk takes long."""


def check_sizes(input: Sequence[int], offset: Sequence[int], geometry: Geometry) -> None:
    """Raise ValueError for sizes that 32 bits or the axes of a grid of programs do not reach."""
    n, c, height, width = input
    for meaning, size, most in (
        ("(H + 2) * (W + 2)", (height + 2) * (width + 2), 2**31 - PIXELS),
        ("C * (W + 2)", c * (width + 2), 2**31),
        ("N * (H + 2)", n * (height + 2), 2**31),
        ("C", c, 2**22 - 63),
    ):
        if size >= most:
            raise ValueError(f"input must have {meaning} below {_power(most)} on CUDA, got shape {tuple(input)}")
    if n * offset[2] * offset[3] >= 2**31 - ZEROS:
        raise ValueError(
            f"offset must have N * H_out * W_out below {_power(2**31 - ZEROS)} on CUDA, got shape {tuple(offset)}"
        )
    if c * geometry.taps >= 2**31:
        raise ValueError(
            f"weight must have C * kh * kw below 2**31 on CUDA, got C = {c} and a kernel of {geometry.kernel_size}"
        )
    # The second and the third axis of a grid.
    if geometry.taps >= 2**16:
        raise ValueError(f"weight must have at most 65535 taps on CUDA, got a kernel of {geometry.kernel_size}")
    if max(geometry.groups, geometry.offset_groups) >= 2**16:
        raise ValueError(
            f"offset and weight must have at most 65535 groups on CUDA, got {geometry.offset_groups} offset groups and "
            f"{geometry.groups} weight groups"
        )


def _power(number: int) -> str:
    """A power of two, or what is less than the next one."""
    bits = (number - 1).bit_length()
    return f"2**{bits}" if number == 2**bits else f"2**{bits} - {2**bits - number}"


def layout_of(tensor: Tensor) -> int:
    """How a map lies: channels_last and dense (2), along its rows (1), otherwise (0)."""
    if memory_format(tensor) == torch.channels_last:
        return 2
    return int(tensor.stride(3) == 1)


def strides_like(tensor: Tensor, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Those of a result of the memory format of ``tensor``."""
    _, c, height, width = shape
    if memory_format(tensor) == torch.channels_last:
        return height * width * c, 1, width * c, c
    return c * height * width, height * width, width, 1


class Remade:
    """An iterable that makes its elements anew each time."""

    def __init__(self, elements: Callable[[], Iterator[Any]]) -> None:
        self._elements = elements

    def __iter__(self) -> Iterator[Any]:
        return self._elements()


class Scratch:
    """Memory of a call that is none of its results: allocated at once, and cut in pieces."""

    def __init__(self, dtype: torch.dtype, pieces: Sequence[tuple[int, torch.dtype]]) -> None:
        """``pieces`` are numbers of elements, and what they are; most of ``dtype``."""
        self._sizes = [cdiv(number * each.itemsize, 512) * 512 // dtype.itemsize for number, each in pieces]
        self._total = sum(self._sizes)
        self._others = [(i, each) for i, (_, each) in enumerate(pieces) if each != dtype]

    def __call__(self, like: Tensor) -> list[Tensor]:
        """The pieces, flat, of the dtype of ``like`` and on its device."""
        pieces = list(like.new_empty(self._total).split_with_sizes(self._sizes))
        for i, dtype in self._others:
            pieces[i] = pieces[i].view(dtype)
        return pieces


def view(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """The tensor's memory from ``offset`` on, of a size and strides."""
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


class Problem:
    """Sizes and layouts of a call, and launches for them. It holds no tensor."""

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        groups = input.shape[1] // weight.shape[1]
        self.geometry = geometry = geometry_of(offset, weight.shape[2:], groups, stride, padding, dilation)
        check_sizes(input.shape, offset.shape, geometry)
        self.n, self.c, self.height, self.width = input.shape
        self.c_out, self.rows, self.columns = weight.shape[0], *offset.shape[2:]
        self.masked = mask is not None
        self.dtype, self.sums = input.dtype, accumulator(input)
        self.half = input.element_size() == 2
        self.taps, self.groups, self.offset_groups = geometry.taps, groups, geometry.offset_groups
        self.per_group, self.out_per_group = weight.shape[1], weight.shape[0] // groups
        """C / G and C_out / G."""
        self.per_offset_group = self.c // self.offset_groups
        # A plan is worth its memory where many channels share a sample.
        self.planned = self.per_offset_group >= 32
        self.positions = self.rows * self.columns
        self.total = self.n * self.positions
        self.units = self.offset_groups * self.taps
        """The samples of a position."""
        self.image = (self.n, self.height + 2, self.width + 2, self.c)
        self.index = torch.int32 if math.prod(self.image[:3]) < 2**31 else torch.int64
        self.kernels = (groups, self.out_per_group, self.taps * self.per_group)
        self.out_strides = strides_like(input, (self.n, self.c_out, self.rows, self.columns))
        self.channels_last = memory_format(input) == torch.channels_last
        self.strides = input.stride(), offset.stride(), (offset if mask is None else mask).stride()
        self._weight_strides = weight.stride()
        self._layout = layout_of(input)
        self.sizes = self.height, self.width, self.rows, self.columns
        self.constants = {"C": self.c, "D": self.offset_groups, "G": groups, "K": self.taps, "MASKED": self.masked}
        self.places = {
            "KW": geometry.kernel_size[1],
            "STRIDE_Y": geometry.stride[0],
            "STRIDE_X": geometry.stride[1],
            "PAD_Y": geometry.padding[0],
            "PAD_X": geometry.padding[1],
            "STEP_Y": geometry.dilation[0],
            "STEP_X": geometry.dilation[1],
        }

    @property
    def bytes_of_plan(self) -> int:
        """What the plan of a position takes."""
        return (self.index.itemsize + (3 if self.masked else 2) * self.sums.itemsize) * self.units

    def most(self, size: int) -> int:
        """The most positions of a chunk, with so many bytes of columns and plan for each."""
        return max(1, MOST_BYTES // size)

    def largest(self, most: int) -> int:
        """The positions of the largest chunk."""
        return next(chunks(self.n, self.positions, most))[1]

    def each_chunk(self, most: int, launches: Callable[[int, int], Any]) -> Iterable[Any]:
        """What ``launches`` gives for the first position and the number of each chunk."""
        found = partial(chunks, self.n, self.positions, most)
        if len(list(islice(found(), MOST_CHUNKS + 1))) <= MOST_CHUNKS:
            return [launches(*chunk) for chunk in found()]
        return Remade(lambda: (launches(*chunk) for chunk in found()))

    def plan(self, count: int) -> list[tuple[int, torch.dtype]]:
        """Pieces of memory for pixels and places of so many positions."""
        samples = self.units * count
        return [(samples, self.index), ((3 if self.masked else 2) * samples, self.sums)]

    def prepare(
        self,
        first: int,
        count: int,
        *,
        plan: bool = False,
        kernels: bool = True,
        grad: tuple[Sequence[int], int] | None = None,
        grads: bool = False,
        along: int = 0,
        zeros: bool = False,
        low: bool = False,
        parts: bool = False,
        sums: bool = False,
    ) -> Launch:
        """What is asked for: the plan of each chunk, the rest with the first, and the input with a border always.
        ``grad`` are strides and layout of the gradient of the result, and tell the backward: its weights lie along the
        output channels. ``low`` and ``parts`` say how weights of float32 are split, for TF32 or float16."""
        programs = [0, self.units * cdiv(count, POSITIONS) if plan else 0, 0, 0, 0, 0, 0]
        if first == 0:
            blocks_out = cdiv(self.c_out, CHANNELS)
            if kernels:
                programs[3] = self.groups * cdiv(self.out_per_group, 16) * self.taps * cdiv(self.per_group, 64)
            if parts:
                programs[3] = self.c_out
            programs[0] = self.c_out if sums else 0
            programs[2] = self.n * cdiv((self.height + 2) * (self.width + 2), PIXELS) * cdiv(self.c, CHANNELS)
            programs[4] = self.n * cdiv(self.positions, PIXELS) * blocks_out if grads else 0
            programs[5] = self.n * cdiv(self.positions + 15, PIXELS) * blocks_out if along else 0
            programs[6] = cdiv(math.prod(self.image), ZEROS) if zeros else 0
        ends = [sum(programs[: i + 1]) for i in range(7)]
        grad_strides, grad_layout = (self.out_strides, 2 if self.channels_last else 1) if grad is None else grad
        by_tap = (1, self.out_per_group) if grad is not None else (self.taps * self.per_group, 1)
        return Launch(
            _deform_prepare.prepare, (ends[6],),
            *ends[:6], first, count, self.n, *self.sizes,
            *self.strides[0], *self.strides[1], *self.strides[2], *self._weight_strides, *grad_strides,
            *by_tap, 2 if parts else int(low), along,
            **self.constants, **self.places, NG=self.out_per_group, LAYOUT=self._layout, LAYOUT_GRAD=grad_layout,
            PIXELS=PIXELS, CHANNELS=CHANNELS, POSITIONS=POSITIONS, ZEROS=ZEROS, num_warps=4,
        )  # fmt: skip

    def fused(self, first: int, count: int, precise: bool, biased: bool) -> Launch:
        """The forward without columns."""
        segment = math.gcd(self.per_offset_group, self.per_group)
        block_n = max(16, _power_of_two(self.out_per_group, 128))
        block_m = 128 if self.half or (precise and block_n <= 64) else 64
        return Launch(
            _deform_fused.forward, (cdiv(count, block_m) * cdiv(self.out_per_group, block_n), self.groups),
            first, count, self.width, self.positions,
            C=self.c, CD=self.per_offset_group, CG=self.per_group, NG=self.out_per_group, SEGMENT=segment, K=self.taps,
            LAST=self.channels_last, MASKED=self.masked, BIASED=biased, PRECISE=precise,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=math.gcd(segment, 64 if self.half else 32),
            num_warps=4, num_stages=3,
        )  # fmt: skip

    def fused_narrow(self, precise: bool, biased: bool) -> Launch:
        """The forward without columns for offset groups of few channels, of all positions."""
        return Launch(
            _deform_fused_narrow.forward, (cdiv(self.total, 64), self.groups),
            self.total, *self.sizes, *self.strides[1], *self.strides[2],
            C=self.c, CD=self.per_offset_group, CG=self.per_group, NG=self.out_per_group, K=self.taps, **self.places,
            LAST=self.channels_last, MASKED=self.masked, BIASED=biased, PRECISE=precise,
            BLOCK_M=64, BLOCK_N=max(16, next_power_of_2(self.out_per_group)), BLOCK_K=math.gcd(self.per_group, 32),
            num_warps=4, num_stages=1,
        )  # fmt: skip

    def sample_float16(self, first: int, count: int, precise: bool) -> Launch:
        """The columns in parts of float16."""
        block_c = math.gcd(self.per_offset_group, self.per_group, 256)
        grid = cdiv(count * block_c, 1024), self.offset_groups, self.per_offset_group // block_c
        return Launch(
            _deform_float16_columns.sample, grid,
            first, count, *self.sizes, *self.strides[1], *self.strides[2],
            **self.constants, **self.places, PRECISE=precise,
            UNIT=UNIT, BLOCK_P=1024 // block_c, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip

    def multiply_float16(self, first: int, count: int, precise: bool, biased: bool) -> Launch:
        """The result from columns in parts of float16."""
        block_m, warps = (128, 8) if precise else (64, 4)
        # With more registers for each, fewer programs run at once.
        limit = {} if precise else {"maxnreg": 168}
        return Launch(
            _deform_float16_columns.product, (cdiv(count, block_m) * cdiv(self.out_per_group, 128), self.groups),
            first, count, self.positions,
            NG=self.out_per_group, ROW=self.kernels[2], LAST=self.channels_last, BIASED=biased, PRECISE=precise,
            UNIT=UNIT, BLOCK_M=block_m, BLOCK_N=128, num_warps=warps, num_stages=3, **limit,
        )  # fmt: skip

    def sample(self, first: int, count: int, along: int = 0) -> Launch:
        """The columns, along the channels, or along so many positions."""
        block_c = _power_of_two(self.per_offset_group, 128 if self.half else 256)
        block_d = _power_of_two(self.offset_groups, max(1, 64 // block_c))
        block_p = max(1, (512 if self.half else 1024) // (block_c * block_d))
        grid = (
            cdiv(along or count, block_p),
            cdiv(self.offset_groups, block_d),
            cdiv(self.per_offset_group, block_c),
        )
        return Launch(
            _deform_columns.sample, grid,
            first, count, *self.sizes, along, *self.strides[1], *self.strides[2],
            **self.constants, **self.places, PLANNED=self.planned, ALONG=along > 0,
            BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_C=block_c, num_warps=1 if self.half else 4,
        )  # fmt: skip

    def gradients(
        self, first: int, count: int, along: int, offset: Sequence[int], mask: Sequence[int], add: bool, out: int
    ) -> Launch:
        """The gradients of offset and mask, of these strides, and what the kernel gives with them."""
        block_c = _power_of_two(self.per_offset_group, 64)
        block_d = _power_of_two(self.offset_groups, 64 // block_c)
        block_p = 8
        blocks = cdiv(along or count, block_p) * cdiv(self.offset_groups, block_d)
        # A program walks all taps of its positions, as they share pixels, where there are programs enough.
        taps = min(self.taps, cdiv(self.taps * blocks, 2048))
        grid = (cdiv(along or count, block_p), cdiv(self.offset_groups, block_d), cdiv(self.taps, taps))
        return Launch(
            _deform_columns.gradients, grid,
            first, count, *self.sizes, along, taps, *self.strides[1], *self.strides[2], *offset, *mask,
            **self.constants, **self.places, PLANNED=self.planned, ADD=add, OUT=out,
            BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_C=block_c, num_warps=2 if self.half else 4,
        )  # fmt: skip

    def gather(self, first: int, count: int) -> Launch:
        """The gradient of the image from sorted samples."""
        block_c = _power_of_two(self.per_offset_group, 512)
        block_x = 1 if block_c >= 256 else min(32, 512 // block_c)
        images = cdiv(count, self.positions)
        pixels = cdiv(self.height * self.width, block_x)
        return Launch(
            _deform_columns.gather,
            (images * pixels, self.offset_groups, cdiv(self.per_offset_group, block_c)),
            count, first // self.positions, self.height, self.width,
            **self.constants,
            BLOCK_X=block_x, BLOCK_E=2 if block_c >= 256 else 8, BLOCK_C=block_c, num_warps=1 if block_c >= 256 else 2,
        )  # fmt: skip

    def finish(self, by_input: Sequence[int] | None, by_weight: Sequence[int] | None, splits: int) -> Launch:
        """The gradients of input and weight, of these strides where they are wanted."""
        pixels = self.n * cdiv(self.height * self.width, PIXELS) * cdiv(self.c, CHANNELS) if by_input else 0
        rest = self.c_out * cdiv(self.taps * self.per_group, 512) if by_weight else 0
        return Launch(
            _deform_prepare.finish, (pixels + rest,),
            pixels, self.height, self.width, *(by_input or self.strides[0]), splits, *(by_weight or (0, 0, 0, 0)),
            C=self.c, G=self.groups, C_OUT=self.c_out, K=self.taps, KW=self.geometry.kernel_size[1],
            LAYOUT=2 if self.channels_last else 1, PIXELS=PIXELS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip

    def sorted(self, first: int, count: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of a chunk by offset group and upper left pixel, and where those of each pixel begin."""
        d = self.offset_groups
        cells_of_image = (self.height + 2) * (self.width + 2)
        cells = cdiv(count, self.positions) * cells_of_image
        # Numbered through the groups; int64 where int32 does not reach.
        index = torch.int32 if d * cells < 2**31 else torch.int64
        keys = pixels[: self.units * count].view(d, -1)
        if first >= self.positions:
            keys = keys - first // self.positions * cells_of_image
        keys = keys.to(index)
        if d > 1:
            keys = keys + torch.arange(0, d * cells, cells, dtype=index, device=keys.device)[:, None]
        in_order, order = torch.sort(keys.flatten(), stable=True)
        every_cell = torch.arange(d * cells + 1, dtype=index, device=keys.device)
        return order, torch.searchsorted(in_order, every_cell, out_int32=len(in_order) < 2**31)


def _power_of_two(size: int, most: int) -> int:
    return min(most, next_power_of_2(size))
