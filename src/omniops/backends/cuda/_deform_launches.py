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
    _deform_tuning,
)
from omniops.backends.cuda._deform_float16_columns import UNIT
from omniops.backends.cuda._deform_prepare import CHANNELS, PIXELS, POSITIONS, ZEROS
from omniops.backends.cuda._deform_tuning import GROUP_CHANNELS, LEAST_N, PREPARE_WARPS
from omniops.backends.cuda._grid import cdiv, next_power_of_2
from omniops.backends.cuda._launch import Launch

MAX_CHUNK_BYTES = 3 * 2**28
"""What columns and plan of a chunk of positions take at most, if they are those of more than one position.

Beside it stand the input with a border and the weights by tap; in the backward the gradient in one or two other orders
and, for the gradient of the input, one in float32. The deterministic gradient of the input takes 24 to 32 bytes more
for a sample of the chunk, and 8 to 16 for a pixel of its images and offset group.
"""

MAX_KEPT_CHUNKS = 8
"""Launches for so many chunks are kept; for more they are made anew each time, beside which a chunk takes long."""


def check_sizes(input: Sequence[int], offset: Sequence[int], geometry: Geometry) -> None:
    """Raise ValueError for sizes that 32 bits or the axes of a grid of programs do not reach."""
    n, c, height, width = input
    for meaning, size, limit in (
        ("(H + 2) * (W + 2)", (height + 2) * (width + 2), 2**31 - PIXELS),
        ("C * (W + 2)", c * (width + 2), 2**31),
        ("N * (H + 2)", n * (height + 2), 2**31),
        ("C", c, 2**22 - 63),
    ):
        if size >= limit:
            raise ValueError(f"input must have {meaning} below {_power(limit)} on CUDA, got shape {tuple(input)}")
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
        self._sizes = [cdiv(number * other.itemsize, 512) * 512 // dtype.itemsize for number, other in pieces]
        self._total = sum(self._sizes)
        self._others = [(i, other) for i, (_, other) in enumerate(pieces) if other != dtype]

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
        self.placement = {
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

    def max_positions(self, size: int) -> int:
        """Those of a chunk, with so many bytes of columns and plan for each."""
        return max(1, MAX_CHUNK_BYTES // size)

    def largest_chunk(self, max_positions: int) -> int:
        """Its number of positions."""
        return next(chunks(self.n, self.positions, max_positions))[1]

    def for_chunks(self, max_positions: int, launches: Callable[[int, int], Any]) -> Iterable[Any]:
        """What ``launches`` gives for the first position and the number of positions of each chunk."""
        bounds = partial(chunks, self.n, self.positions, max_positions)
        if len(list(islice(bounds(), MAX_KEPT_CHUNKS + 1))) <= MAX_KEPT_CHUNKS:
            return [launches(*chunk) for chunk in bounds()]
        return Remade(lambda: (launches(*chunk) for chunk in bounds()))

    def plan(self, count: int) -> list[tuple[int, torch.dtype]]:
        """Pieces of memory for pixels and fractions of so many positions."""
        sample_count = self.units * count
        return [(sample_count, self.index), ((3 if self.masked else 2) * sample_count, self.sums)]

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
        split_tf32: bool = False,
        split_float16: bool = False,
        sums: bool = False,
    ) -> Launch:
        """What is asked for: the plan of each chunk, the rest with the first, and the input with a border always.
        ``grad``, strides and layout of the gradient of the result, is for the backward: its weights lie along the
        output channels. ``split_tf32`` and ``split_float16`` say how weights of float32 are split."""
        programs = [0, self.units * cdiv(count, POSITIONS) if plan else 0, 0, 0, 0, 0, 0]
        if first == 0:
            blocks_out = cdiv(self.c_out, CHANNELS)
            if kernels:
                programs[3] = self.groups * cdiv(self.out_per_group, 16) * self.taps * cdiv(self.per_group, 64)
            if split_float16:
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
            *by_tap, 2 if split_float16 else int(split_tf32), along,
            **self.constants, **self.placement, NG=self.out_per_group, LAYOUT=self._layout, LAYOUT_GRAD=grad_layout,
            PIXELS=PIXELS, CHANNELS=CHANNELS, POSITIONS=POSITIONS, ZEROS=ZEROS, num_warps=PREPARE_WARPS,
        )  # fmt: skip

    def fused(self, first: int, count: int, precise: bool, biased: bool) -> Launch:
        """The forward without columns."""
        segment = math.gcd(self.per_offset_group, self.per_group)
        tile = _deform_tuning.FUSED[self.half]
        block_n = max(LEAST_N, _power_of_two(self.out_per_group, tile.n))
        if precise and block_n <= _deform_tuning.FUSED_PRECISE_NARROW.n:
            tile = _deform_tuning.FUSED_PRECISE_NARROW
        return Launch(
            _deform_fused.forward, (cdiv(count, tile.m) * cdiv(self.out_per_group, block_n), self.groups),
            first, count, self.width, self.positions,
            C=self.c, CD=self.per_offset_group, CG=self.per_group, NG=self.out_per_group, SEGMENT=segment, K=self.taps,
            LAST=self.channels_last, MASKED=self.masked, BIASED=biased, PRECISE=precise,
            BLOCK_M=tile.m, BLOCK_N=block_n, BLOCK_K=math.gcd(segment, tile.k),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def fused_narrow(self, precise: bool, biased: bool) -> Launch:
        """The forward without columns for offset groups of few channels, of all positions."""
        tile = _deform_tuning.FUSED_NARROW
        return Launch(
            _deform_fused_narrow.forward, (cdiv(self.total, tile.m), self.groups),
            self.total, *self.sizes, *self.strides[1], *self.strides[2],
            C=self.c, CD=self.per_offset_group, CG=self.per_group, NG=self.out_per_group, K=self.taps, **self.placement,
            LAST=self.channels_last, MASKED=self.masked, BIASED=biased, PRECISE=precise,
            BLOCK_M=tile.m, BLOCK_N=max(LEAST_N, next_power_of_2(self.out_per_group)),
            BLOCK_K=math.gcd(self.per_group, tile.k), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def sample_float16(self, first: int, count: int, precise: bool) -> Launch:
        """The columns split into float16."""
        tile = _deform_tuning.SAMPLE_FLOAT16
        block_c = math.gcd(self.per_offset_group, self.per_group, tile.channels)
        grid = cdiv(count * block_c, tile.elements), self.offset_groups, self.per_offset_group // block_c
        return Launch(
            _deform_float16_columns.sample, grid,
            first, count, *self.sizes, *self.strides[1], *self.strides[2],
            **self.constants, **self.placement, PRECISE=precise,
            UNIT=UNIT, BLOCK_P=tile.elements // block_c, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip

    def multiply_float16(self, first: int, count: int, precise: bool, biased: bool) -> Launch:
        """The result from columns split into float16."""
        tile = _deform_tuning.PRODUCT_FLOAT16[precise]
        limit = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
        return Launch(
            _deform_float16_columns.product, (cdiv(count, tile.m) * cdiv(self.out_per_group, tile.n), self.groups),
            first, count, self.positions,
            NG=self.out_per_group, ROW=self.kernels[2], LAST=self.channels_last, BIASED=biased, PRECISE=precise,
            UNIT=tile.k, BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **limit,
        )  # fmt: skip

    def sample(self, first: int, count: int, along: int = 0) -> Launch:
        """The columns, along the channels, or along so many positions."""
        tile = _deform_tuning.SAMPLE[self.half]
        block_c, block_d = self._blocks(tile.channels)
        block_p = max(1, tile.elements // (block_c * block_d))
        grid = (
            cdiv(along or count, block_p),
            cdiv(self.offset_groups, block_d),
            cdiv(self.per_offset_group, block_c),
        )
        return Launch(
            _deform_columns.sample, grid,
            first, count, *self.sizes, along, *self.strides[1], *self.strides[2],
            **self.constants, **self.placement, PLANNED=self.planned, ALONG=along > 0,
            BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip

    def _blocks(self, max_channels: int) -> tuple[int, int]:
        """The channels of a block, and its offset groups."""
        block_c = _power_of_two(self.per_offset_group, max_channels)
        return block_c, _power_of_two(self.offset_groups, max(1, GROUP_CHANNELS // block_c))

    def gradients(
        self, first: int, count: int, along: int, offset: Sequence[int], mask: Sequence[int], add: bool, out: int
    ) -> Launch:
        """The gradients of offset and mask, of these strides, and what the kernel gives with them."""
        tile = _deform_tuning.GRADIENTS[self.half]
        block_c, block_d = self._blocks(tile.channels)
        blocks = cdiv(along or count, tile.positions) * cdiv(self.offset_groups, block_d)
        taps = min(self.taps, cdiv(self.taps * blocks, _deform_tuning.GRADIENTS_PROGRAMS))
        grid = (cdiv(along or count, tile.positions), cdiv(self.offset_groups, block_d), cdiv(self.taps, taps))
        return Launch(
            _deform_columns.gradients, grid,
            first, count, *self.sizes, along, taps, *self.strides[1], *self.strides[2], *offset, *mask,
            **self.constants, **self.placement, PLANNED=self.planned, ADD=add, OUT=out,
            BLOCK_P=tile.positions, BLOCK_D=block_d, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip

    def gather(self, first: int, count: int) -> Launch:
        """The gradient of the image from sorted samples."""
        block_c = _power_of_two(self.per_offset_group, _deform_tuning.GATHER_CHANNELS)
        is_wide = block_c >= _deform_tuning.GATHER_WIDE
        block_x = 1 if is_wide else min(_deform_tuning.GATHER_PIXELS, _deform_tuning.GATHER_CHANNELS // block_c)
        tile = _deform_tuning.GATHER[is_wide]
        images = cdiv(count, self.positions)
        pixels = cdiv(self.height * self.width, block_x)
        return Launch(
            _deform_columns.gather,
            (images * pixels, self.offset_groups, cdiv(self.per_offset_group, block_c)),
            count, first // self.positions, self.height, self.width,
            **self.constants, BLOCK_X=block_x, BLOCK_E=tile.samples, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip

    def finish(self, by_input: Sequence[int] | None, by_weight: Sequence[int] | None, splits: int) -> Launch:
        """The gradients of input and weight, of these strides where they are wanted."""
        pixels = self.n * cdiv(self.height * self.width, PIXELS) * cdiv(self.c, CHANNELS) if by_input else 0
        rest = self.c_out * cdiv(self.taps * self.per_group, 512) if by_weight else 0
        return Launch(
            _deform_prepare.finish, (pixels + rest,),
            pixels, self.height, self.width, *(by_input or self.strides[0]), splits, *(by_weight or (0, 0, 0, 0)),
            C=self.c, G=self.groups, C_OUT=self.c_out, K=self.taps, KW=self.geometry.kernel_size[1],
            LAYOUT=2 if self.channels_last else 1, PIXELS=PIXELS, CHANNELS=CHANNELS, num_warps=PREPARE_WARPS,
        )  # fmt: skip

    def sort_samples(self, first: int, count: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
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


def _power_of_two(size: int, limit: int) -> int:
    return min(limit, next_power_of_2(size))
