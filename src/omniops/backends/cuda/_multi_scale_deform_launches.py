"""Multi-scale deformable attention in Triton: the launches of its kernels for arguments of given shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniops.backends import accumulator
from omniops.backends.cuda import (
    _multi_scale_deform_backward,
    _multi_scale_deform_forward,
    _multi_scale_deform_gather,
)
from omniops.backends.cuda import _multi_scale_deform_tuning as tuning
from omniops.backends.cuda._grid import cdiv, next_power_of_2
from omniops.backends.cuda._launch import Launch

MAX_LEVELS = 8
"""The levels that a kernel knows."""

FEW = 2**15
"""Rows, which are the heads of queries: fewer are served in other tiles."""

SMALL, COPIES = 512, 4
"""A level of so many pixels is summed in copies, where the sums are not the result and samples are many."""


class Problem:
    """Sizes of a call, and launches for it. It holds no tensor."""

    def __init__(
        self,
        value: Tensor,
        spatial_shapes: Sequence[int],
        attention_weights: Tensor,
        points_per_level: Sequence[int],
        discrete: bool,
    ) -> None:
        check_sizes(value.shape, spatial_shapes, attention_weights.shape, points_per_level)
        self.n, self.pixels, self.m, self.d = value.shape
        self.queries, self.points = attention_weights.shape[1], sum(points_per_level)
        self.shapes = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
        self.sums = accumulator(value)
        self.dtype = value.dtype
        self.levels = *spatial_shapes, *(0,) * (2 * MAX_LEVELS - len(spatial_shapes))
        self.discrete = discrete
        self.constants = {
            "M": self.m,
            "L": len(points_per_level),
            "K": self.points,
            "POINTS": sum(points << (16 * level) for level, points in enumerate(points_per_level)),
            "DISCRETE": discrete,
        }
        self.max_points = max(points_per_level)
        # The last corner of a sample is a row and a pixel from its first one.
        self.wide = (self.pixels + 1) * self.m * self.d >= 2**31
        self.few = self.n * self.queries * self.m < FEW
        self.first_small, self.copies = self.pixels, 1
        if self.dtype != self.sums and not self.few:
            self._copy_small_levels()

    def _copy_small_levels(self) -> None:
        """Find the last levels, as far as they are small, also beside the others, and have them summed in copies."""
        for height, width in reversed(self.shapes):
            if height * width > SMALL or 32 * (self.pixels - self.first_small + height * width) > self.pixels:
                break
            self.first_small -= height * width
        if self.first_small < self.pixels:
            self.copies = COPIES

    @property
    def sum_shape(self) -> tuple[int, int]:
        """Of the sums for the gradient of value, (N, elements of an image)."""
        return self.n, (self.pixels + (self.copies - 1) * (self.pixels - self.first_small)) * self.m * self.d

    def _blocks(self, vector: int, tile: tuning.VectorsTile) -> tuple[dict[str, int], int]:
        """Sizes of tiles for vectors of so many channels, and the blocks of queries."""
        block_d = min(tuning.MAX_CHANNELS, next_power_of_2(self.d))
        lanes = max(1, min(32, block_d // vector))
        block_p = min(next_power_of_2(self.max_points), 32 // lanes)
        block_q = tile.warps * (32 // (lanes * block_p)) * tile.vectors
        blocks = {"BLOCK_Q": block_q, "BLOCK_P": block_p, "BLOCK_D": block_d, "num_warps": tile.warps}
        return blocks, self.n * self.m * cdiv(self.queries, block_q)

    def forward(self) -> Launch:
        """The forward."""
        blocks, programs = self._blocks(
            16 // self.dtype.itemsize, tuning.FORWARD_OF_FEW if self.few else tuning.FORWARD
        )
        return Launch(
            _multi_scale_deform_forward.forward, (programs, cdiv(self.d, blocks["BLOCK_D"])),
            self.queries, self.pixels, *self.levels,
            **self.constants, D=self.d, WIDE=self.wide, **blocks,
        )  # fmt: skip

    def backward(self, by_value: bool, by_samples: bool) -> Launch:
        """The gradient of value by atomics, and those of locations and weights."""
        blocks, programs = self._blocks(
            16 // self.sums.itemsize, tuning.BACKWARD_OF_FEW if self.few else tuning.BACKWARD
        )
        blocks["CHANNEL_BLOCKS"] = cdiv(self.d, blocks["BLOCK_D"])
        return Launch(
            _multi_scale_deform_backward.backward, (programs,),
            self.queries, self.pixels, self.first_small, self.copies, *self.levels,
            **self.constants, D=self.d, WIDE=self.wide, BY_VALUE=by_value, BY_SAMPLES=by_samples, **blocks,
        )  # fmt: skip

    def finish(self) -> Launch:
        """The gradient of value in its dtype, from sums in float32."""
        return Launch(
            _multi_scale_deform_backward.finish,
            (cdiv(self.pixels * self.m * self.d, tuning.FINISH.elements) * self.n,),
            self.pixels, self.first_small, self.copies,
            PITCH=self.m * self.d, BLOCK=tuning.FINISH.elements, num_warps=tuning.FINISH.warps,
        )  # fmt: skip

    def gathered(self) -> Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The gradient of value from sorted samples."""
        rows = self.n * self.queries * self.m
        cells_of_levels = [(height + 1) * (width + 1) if height * width > 0 else 0 for height, width in self.shapes]
        cells = sum(cells_of_levels)
        key_count = self.n * self.m * cells
        index = torch.int32 if key_count + 1 < 2**31 else torch.int64
        block_p = min(tuning.MAX_POINTS, next_power_of_2(self.max_points))
        block = tuning.CELLS.elements // block_p
        find_cells = Launch(
            _multi_scale_deform_gather.cells_of, (cdiv(rows, block),),
            rows, self.queries, cells, *self.levels,
            **self.constants, BLOCK=block, BLOCK_P=block_p, num_warps=tuning.CELLS.warps,
        )  # fmt: skip
        gathers, start, start_of_cells = [], 0, 0
        for (height, width), level_cells in zip(self.shapes, cells_of_levels, strict=True):
            if height * width > 0:
                gathers.append(self._gather(cells, height, width, start, start_of_cells))
            start += height * width
            start_of_cells += level_cells

        def run(stream: int, grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            if rows * self.points >= 2**31:
                raise ValueError(
                    f"attention_weights must have fewer than 2**31 elements on CUDA under "
                    f"torch.use_deterministic_algorithms, got shape {tuple(weights.shape)}"
                )
            by_value = value.new_empty(value.shape)
            keys = torch.empty(weights.shape, dtype=index, device=weights.device)
            find_cells(stream, locations, keys)
            in_order, order = torch.sort(keys.flatten(), stable=True)
            all_keys = torch.arange(key_count + 1, dtype=index, device=weights.device)
            starts = torch.searchsorted(in_order, all_keys, out_int32=True)
            for gather in gathers:
                gather(stream, grad, locations, weights, order, starts, by_value)
            return by_value

        return run

    def _gather(self, cells: int, height: int, width: int, start: int, start_of_cells: int) -> Launch:
        """The gradient of a level's pixels."""
        block_d = min(tuning.MAX_CHANNELS, next_power_of_2(self.d))
        block_x = max(1, tuning.GATHER.elements // block_d)
        return Launch(
            _multi_scale_deform_gather.gather,
            (self.n * self.m * cdiv(height * width, block_x), cdiv(self.d, block_d)),
            self.pixels, cells, height, width, start, start_of_cells,
            M=self.m, D=self.d, K=self.points, DISCRETE=self.discrete,
            BLOCK_X=block_x, BLOCK_E=tuning.GATHER.samples, BLOCK_D=block_d, num_warps=tuning.GATHER.warps,
        )  # fmt: skip


def check_sizes(
    value: Sequence[int], spatial_shapes: Sequence[int], weights: Sequence[int], points_per_level: Sequence[int]
) -> None:
    """Raise ValueError for sizes that 32 bits or the axes of a grid of programs do not reach."""
    n, pixels, m, d = value
    # 32 bits count pixels with their copies, and in whole blocks; the second axis of a grid has blocks of D.
    if pixels >= 2**31 - 2**14 or d >= 2**22 or m * d >= 2**31:
        raise ValueError(
            f"value must have S below 2**31 - 2**14, M * D below 2**31 and D below 2**22 on CUDA, "
            f"got shape {tuple(value)}"
        )
    if max(spatial_shapes) >= 2**30:
        raise ValueError(f"spatial_shapes must have sides below 2**30 on CUDA, got {list(spatial_shapes)}")
    if n * weights[1] * m >= 2**31 - 128 * n * m:
        raise ValueError(
            f"attention_weights must have N * (Q + 128) * M below 2**31 on CUDA, got shape {tuple(weights)}"
        )
    if max(points_per_level) >= 2**16:
        raise ValueError(f"points_per_level must be below 2**16 on CUDA, got {list(points_per_level)}")
