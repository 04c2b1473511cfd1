"""Multi-scale deformable attention in Metal: launches the kernels of multi_scale_deform_attn.metal.

``omniops.ops.multi_scale_deform_attn`` has the formula. The kernels read and write contiguous tensors; inputs of
another layout are copied. The workspace of value's gradient is 24 bytes a sample, for at most MAX_SAMPLES samples at a
time, and 8 bytes a cell, for at most MAX_CELLS cells; where one query of a head, or the levels of one head, have more,
what these have. In half precision a float32 tensor like value comes on top, where a head has too many samples to be
summed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, isqrt, prod
from typing import Any

import torch
from torch import Tensor

from omniops.backends import prepared
from omniops.backends.mps._library import library
from omniops.backends.mps._segments import allocate_segments, collect_segments, empty_cells

MAX_SAMPLES = 2**20
MAX_CELLS = 2**23

# Comparisons of a launch where all samples of a level lie in one cell: each of n goes through all n then.
MAX_COMPARISONS = 2**36

# These stand in multi_scale_deform_attn.metal too, which says what they are.
WIDTHS = (1, 4, 8)
SIMD = 32
ROWS = 8

# So few lanes that tiles are wide, and that there is little left to sum by shuffles.
GATHER_LANES = 4
GROUP = 256

# Their numbers are arguments of the kernels.
MAX_LEVELS = 32


@prepared
def multi_scale_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
) -> Callable[..., Tensor]:
    """(N, S, M, D), (N, Q, M, K, 2), (N, Q, M, K) -> (N, Q, M * D); K may be two axes, L and P."""
    problem = _Problem.of(value, spatial_shapes, sampling_locations, attention_weights, points_per_level, discrete)

    def run(value: Tensor, _: Any, locations: Tensor, weights: Tensor, *__: Any) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        out = value.new_empty((problem.images, problem.queries, problem.heads * problem.channels))
        width = _width(problem.channels, 16 // value.element_size(), value)
        lanes = problem.lanes(width)
        blocks = -(-problem.channels // (width * lanes))
        _kernel("forward", value.dtype, width)(
            value,
            _as(value.dtype, locations),
            _as(value.dtype, weights),
            out,
            problem.sizes(lanes=lanes),
            problem.levels(),
            arg_casts={4: "int32", 5: "int32"},
            **problem.grid(lanes, blocks),
        )
        return out

    return run


@prepared
def multi_scale_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
    discrete: bool,
    output_mask: Sequence[bool],
) -> Callable[..., tuple[Tensor, ...]]:
    """(N, Q, M * D) -> the gradients of value, sampling_locations and attention_weights that ``output_mask`` names."""
    problem = _Problem.of(value, spatial_shapes, sampling_locations, attention_weights, points_per_level, discrete)
    needs_value, needs_locations, needs_weights = output_mask

    def run(grad: Tensor, value: Tensor, _: Any, locations: Tensor, weights: Tensor, *__: Any) -> tuple[Tensor, ...]:
        none = grad.new_empty(0)
        grad, locations, weights = grad.contiguous(), locations.contiguous(), weights.contiguous()
        by_locations = locations.new_empty(locations.shape) if needs_locations else none
        by_weights = weights.new_empty(weights.shape) if needs_weights else none
        if needs_locations or needs_weights:
            _by_points(problem, grad, value.contiguous(), locations, weights, by_locations, by_weights)
        by_value = _by_value(problem, grad, locations, weights) if needs_value else none
        return by_value, by_locations, by_weights

    return run


def _by_points(
    problem: _Problem,
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    by_locations: Tensor,
    by_weights: Tensor,
) -> None:
    """Write the gradients of locations and weights that have elements."""
    width = _width(problem.channels, 16 // value.element_size(), value, grad)
    lanes = problem.lanes(width)
    wanted = by_locations if by_locations.numel() else by_weights
    _kernel("by_points", value.dtype, width)(
        grad,
        value,
        _as(value.dtype, locations),
        _as(value.dtype, weights),
        _as(value.dtype, by_locations if by_locations.numel() else wanted),
        _as(value.dtype, by_weights if by_weights.numel() else wanted),
        problem.sizes(
            lanes=lanes, wanted_locations=int(by_locations.numel() > 0), wanted_weights=int(by_weights.numel() > 0)
        ),
        problem.levels(),
        arg_casts={6: "int32", 7: "int32"},
        **problem.grid(lanes, 1),
    )


def _by_value(problem: _Problem, grad: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The gradient of value, summed batch by batch."""
    shape = (problem.images, problem.pixels, problem.heads, problem.channels)
    batches = list(problem.batches())
    # What later batches add to is kept in float32.
    dtype = torch.float32 if any(batch.first_query for batch in batches) else grad.dtype
    by_value = torch.empty(shape, dtype=dtype, device=grad.device)
    points = _as(grad.dtype, locations), _as(grad.dtype, weights)
    width = _width(problem.channels, max(WIDTHS), grad)
    lanes = _lanes(problem.channels, width, GATHER_LANES)
    tiles = problem.levels(SIMD // lanes)[-1]
    for batch in batches:
        sizes = problem.sizes(lanes=lanes, batch=batch, tiles=tiles, wide_value=int(dtype != grad.dtype))
        cells, records = _records(problem, batch, *points, sizes)
        blocks = -(-problem.channels // (width * lanes))
        _kernel("by_value", grad.dtype, width)(
            grad,
            cells,
            records,
            _as(grad.dtype, by_value),
            sizes,
            problem.levels(SIMD // lanes),
            threads=(SIMD * ROWS * tiles, batch.heads * blocks),
            group_size=(SIMD * ROWS, 1),
            arg_casts={4: "int32", 5: "int32"},
        )
    return by_value.to(grad.dtype)


def _records(
    problem: _Problem, batch: _Batch, locations: Tensor, weights: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The cells of a batch, each with the number of its samples and the end of its segment; the samples' records."""
    kernels, device, levels = library("multi_scale_deform_attn", locations.dtype), locations.device, problem.levels()
    cells, used = empty_cells(batch.heads * problem.cells, device)
    cell_of = torch.empty(batch.heads * batch.queries * problem.points, dtype=torch.int32, device=device)
    records = torch.empty((len(cell_of), 4), dtype=torch.int32, device=device)
    kernels.multi_scale_deform_attn_count(
        locations,
        weights,
        cells,
        cell_of,
        sizes,
        levels,
        threads=(batch.queries * problem.points, batch.heads),
        group_size=(GROUP, 1),
        arg_casts={4: "int32", 5: "int32"},
    )
    allocate_segments(cells, used)
    samples = collect_segments(cell_of, cells)
    kernels.multi_scale_deform_attn_order(
        locations,
        weights,
        cells,
        used,
        cell_of,
        samples,
        records,
        sizes,
        levels,
        threads=len(cell_of),
        group_size=GROUP,
        arg_casts={7: "int32", 8: "int32"},
    )
    return cells, records


@dataclass(frozen=True)
class _Batch:
    """Some queries of some heads, which are counted over the images."""

    first_head: int
    heads: int
    first_query: int
    queries: int


@dataclass(frozen=True)
class _Problem:
    """The sizes of a call."""

    images: int
    queries: int
    heads: int
    pixels: int
    channels: int
    shapes: tuple[tuple[int, int], ...]
    """Height and width of each level; 0 and 0 where it has no pixels."""
    points_per_level: tuple[int, ...]
    discrete: bool
    wide_locations: bool
    wide_weights: bool

    @classmethod
    def of(
        cls,
        value: Tensor,
        spatial_shapes: Sequence[int],
        locations: Tensor,
        weights: Tensor,
        points_per_level: Sequence[int],
        discrete: bool,
    ) -> _Problem:
        """Raises ValueError for what the kernels cannot index."""
        pairs = zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)
        images, pixels, heads, channels = value.shape
        problem = cls(
            images,
            weights.shape[1],
            heads,
            pixels,
            channels,
            tuple((height, width) if height * width else (0, 0) for height, width in pairs),
            tuple(points_per_level),
            discrete,
            locations.dtype != value.dtype,
            weights.dtype != value.dtype,
        )
        check_sizes(problem)
        return problem

    @property
    def points(self) -> int:
        return sum(self.points_per_level)

    @property
    def cells(self) -> int:
        """Of one head."""
        return sum((height + 1) * (width + 1) for height, width in self.shapes if height)

    def levels(self, across: int = SIMD) -> list[int]:
        """Levels in multi_scale_deform_attn.metal, with tiles of so many cells across."""
        numbers, pixel, point, cell, tile = [], 0, 0, 0, 0
        for (height, width), points in zip(self.shapes, self.points_per_level, strict=True):
            point += points
            tile += -(-height // (ROWS - 1)) * -(-width // (across - 1))
            numbers += [height, width, pixel, point, cell, tile]
            pixel += height * width
            cell += (height + 1) * (width + 1) if height else 0
        return numbers

    def sizes(
        self,
        lanes: int,
        batch: _Batch | None = None,
        tiles: int = 0,
        wide_value: int = 0,
        wanted_locations: int = 0,
        wanted_weights: int = 0,
    ) -> list[int]:
        """Sizes in multi_scale_deform_attn.metal."""
        batch = batch or _Batch(0, self.images * self.heads, 0, self.queries)
        return [
            *(self.queries, self.heads, self.pixels, self.points, self.channels),
            *(batch.first_head, batch.first_query, batch.heads, batch.queries),
            *(self.cells, tiles, lanes.bit_length() - 1, int(self.discrete)),
            *(int(self.wide_locations), int(self.wide_weights), wide_value),
            *(wanted_locations, wanted_weights, int(batch.first_query > 0)),
        ]

    def lanes(self, width: int) -> int:
        """How many share the channels of a query: so few that 31 bits count those of all."""
        lanes = _lanes(self.channels, width, SIMD)
        while self.queries * lanes > 2**31 - GROUP:
            lanes //= 2
        return lanes

    def grid(self, lanes: int, blocks: int) -> dict[str, tuple[int, int]]:
        """The threads that take the queries of each head."""
        size = min(GROUP, -(-self.queries * lanes // SIMD) * SIMD)
        threads = -(-self.queries * lanes // size) * size, self.images * self.heads * blocks
        return {"threads": threads, "group_size": (size, 1)}

    def batches(self) -> Iterator[_Batch]:
        """Batches of at most MAX_SAMPLES, MAX_COMPARISONS and MAX_CELLS: whole heads, or queries of one head."""
        squares = sum(points**2 for points in self.points_per_level)
        all_heads = self.images * self.heads
        heads = min(
            all_heads,
            MAX_SAMPLES // (self.queries * self.points),
            MAX_COMPARISONS // (self.queries**2 * squares),
            MAX_CELLS // self.cells,
        )
        queries = self.queries
        if heads < 1:
            heads, queries = 1, min(queries, MAX_SAMPLES // self.points, isqrt(MAX_COMPARISONS // squares))
        queries = max(1, queries)
        for head in range(0, all_heads, heads):
            for query in range(0, self.queries, queries):
                yield _Batch(head, min(heads, all_heads - head), query, min(queries, self.queries - query))


def check_sizes(problem: _Problem) -> None:
    """Raise ValueError for sizes that the kernels cannot index: offsets have 32 bits, and the levels are arguments."""
    p = problem
    shapes = {
        "value": (p.images, p.pixels, p.heads, p.channels),
        "sampling_locations": (p.images, p.queries, p.heads, p.points, 2),
        "the result": (p.images, p.queries, p.heads * p.channels),
    }
    for name, shape in shapes.items():
        if prod(shape) >= 2**31:
            raise ValueError(f"{name} must have fewer than 2**31 elements on MPS, got shape {shape}")
    if p.points >= 2**29:  # a record of four numbers for each
        raise ValueError(f"points_per_level must have a sum below 2**29 on MPS, got {list(p.points_per_level)}")
    if len(p.shapes) > MAX_LEVELS:
        raise ValueError(f"spatial_shapes must have at most {MAX_LEVELS} levels on MPS, got {len(p.shapes)}")
    if p.cells >= 2**26:  # a threadgroup for every 14 of a map one pixel wide
        raise ValueError(
            f"spatial_shapes must have the sum of (H + 1) * (W + 1) below 2**26 on MPS, got {list(p.shapes)}"
        )


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """A float32 tensor as the kernels take it, which know that it is one: as pairs of what they have beside it."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _width(channels: int, widest: int, *tensors: Tensor) -> int:
    """How many channels a thread takes at a time."""
    divisor = gcd(widest, channels, *(tensor.storage_offset() for tensor in tensors))
    return max(width for width in WIDTHS if divisor % width == 0)


def _lanes(channels: int, width: int, limit: int) -> int:
    """How many lanes share the channels of a head: a power of two."""
    return min(limit, 1 << (-(-channels // width) - 1).bit_length())


def _kernel(name: str, dtype: torch.dtype, width: int) -> Any:
    return getattr(library("multi_scale_deform_attn", dtype), f"multi_scale_deform_attn_{name}{width}")
