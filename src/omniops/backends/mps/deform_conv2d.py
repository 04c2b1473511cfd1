"""Deformable convolution in Metal: launches the kernels of deform_conv2d.metal; the matrix products are PyTorch's.

``omniops.ops.deform_conv2d`` has the formula and ``omniops.backends.columns`` the order of the work and the copies that
it takes. The workspace beside these is MAX_BYTES for the columns, and in the backward 20 bytes a sample for at most
MAX_SAMPLES samples and 8 bytes a cell for at most MAX_CELLS cells; where a single position, or two images, have more,
what these have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, isqrt, prod
from typing import Any

import torch
from torch import Tensor

from omniops.backends import prepared
from omniops.backends.columns import Columns, Geometry
from omniops.backends.mps._library import library
from omniops.backends.mps._segments import allocate_segments, empty_cells

# The last-level caches of Apple's larger chips hold 24 MB and more: what one kernel or product writes, the next finds
# there. Much smaller chunks would leave the largest GPUs idle between launches.
MAX_BYTES = 2**25
MAX_SAMPLES = 2**20
MAX_CELLS = 2**23

# Comparisons of a launch where all samples of an offset group lie in one cell: each of n goes through all n then.
MAX_COMPARISONS = 2**36

# From sums of 32767 terms on, the matrix products of PyTorch to 2.14 read past their operands on M1 and M2, and
# those of macOS 14.0 to 14.3 are wrong with more than 32768 rows. A multiple of a simdgroup's 32, and no more than the
# positions of a 3x3 kernel that MAX_COMPARISONS leaves to one launch, so that a chunk is one.
LONGEST_SUM = 32 * 910

# These stand in deform_conv2d.metal too, which says what they are.
WIDTHS = (1, 4, 8)
TILE_PAIRS = 9
TILE_POSITIONS = 32
GATHER_THREADS = 256
SIMD = 32

# So few lanes that they load whole cache lines, and that there is little left to sum by shuffles.
SAMPLE_LANES = 16
GATHER_LANES = 4

# So many threadgroups keep the largest GPUs busy.
GROUPS = 1024


def _sample(
    image: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry, first: int, columns: Tensor
) -> None:
    """Fill ``columns`` with the samples of the positions from ``first`` on."""
    # Loading more than 16 bytes of each of the four pixels takes registers, and so leaves fewer threads resident.
    widest = 16 // image.element_size()
    batch = _Batch(geometry, image, offset, first, 0, columns.shape[1], columns.shape[1], widest)
    tiles = _Tiles.of(batch)
    batch_offset = batch.of(offset)
    _kernel("sample", image, batch.width)(
        batch.of(image),
        batch_offset,
        batch_offset if mask is None else batch.of(mask),
        columns,
        batch.sizes(tiles, tiles.lanes, mask is not None),
        threads=tiles.threads,
        group_size=tiles.group_size,
        arg_casts={4: "int32"},
    )


def _gradients(
    by_columns: Tensor,
    image: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    first: int,
    by_image: Tensor,
    by_offset: Tensor,
    by_mask: Tensor | None,
) -> None:
    """Write by_offset and by_mask of the positions from ``first`` on, and add to by_image."""
    for batch in _batches(geometry, image, offset, first, by_columns.shape[1]):
        tiles = _Tiles.of(batch)
        images, batch_offset, batch_by_offset = batch.of(image), batch.of(offset), batch.of(by_offset)
        sizes = batch.sizes(tiles, tiles.lanes, mask is not None)
        cells, rows, records = _cells(batch, batch_offset, sizes)
        _kernel("backward_samples", image, batch.width)(
            by_columns,
            images,
            batch_offset,
            batch_offset if mask is None else batch.of(mask),
            batch_by_offset,
            batch_by_offset if by_mask is None else batch.of(by_mask),
            cells,
            rows,
            records,
            sizes,
            threads=tiles.threads,
            group_size=tiles.group_size,
            arg_casts={9: "int32"},
        )
        h, w = image.shape[1:3]
        lanes = _lanes(batch.vectors, GATHER_LANES)
        across, along = SIMD // lanes, min(GATHER_THREADS // SIMD, h + 1)
        _kernel("backward_image", image, batch.width)(
            by_columns,
            cells,
            records,
            batch.of(by_image),
            batch.sizes(tiles, lanes, mask is not None),
            threads=(
                SIMD * along * -(-w // (across - 1)),
                -(-h // (along - 1)),
                batch.images * geometry.offset_groups * -(-batch.vectors // lanes),
            ),
            group_size=(SIMD * along, 1, 1),
            arg_casts={4: "int32"},
        )


def _cells(batch: _Batch, batch_offset: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The cells, each with the number of its samples and the end of its segment; the segments; memory for records."""
    kernels, pairs = library("deform_conv2d", batch_offset.dtype), batch.geometry.offset_groups * batch.geometry.taps
    cells, used = empty_cells(batch.cells, batch_offset.device)
    rows = torch.empty(pairs * batch.positions, dtype=torch.int32, device=batch_offset.device)
    records = torch.empty((len(rows), 4), dtype=torch.int32, device=batch_offset.device)
    grid = {"threads": (batch.positions, pairs), "group_size": (64, 4)}
    kernels.deform_conv2d_count(batch_offset, cells, sizes, **grid, arg_casts={2: "int32"})
    allocate_segments(cells, used)
    kernels.deform_conv2d_collect(batch_offset, cells, rows, sizes, **grid, arg_casts={3: "int32"})
    return cells, rows, records


def check_sizes(input: Sequence[int], offset: Sequence[int], out_channels: int, geometry: Geometry) -> None:
    """Raise ValueError for tensors that PyTorch's operators, or the kernels, cannot index on MPS.

    The operators, matrix products among them, take tensors of less than 2**31 elements, and zeros of less than 4 GiB
    (pytorch issue 161265), which the gradient of the input and the cells begin as; offsets in the kernels have 32 bits.
    """
    n, c, h, w = input
    out = (n, out_channels, *offset[2:])
    for name, shape, bits in (("input", input, 30), ("offset", offset, 31), ("the result", out, 31)):
        if prod(shape) >= 2**bits:
            raise ValueError(f"{name} must have fewer than 2**{bits} elements on MPS, got shape {tuple(shape)}")
    if geometry.offset_groups * (h + 1) * (w + 1) >= 2**29:
        raise ValueError(
            "input must have offset groups * (H + 1) * (W + 1) below 2**29 on MPS, got shape "
            f"{(n, c, h, w)} and {geometry.offset_groups} offset groups"
        )
    if c * geometry.taps >= 2**29 or out_channels * c // geometry.groups * geometry.taps >= 2**31:
        raise ValueError(
            "weight must have C * kh * kw below 2**29, and fewer than 2**31 elements, on MPS, got "
            f"C = {c} and shape {(out_channels, c // geometry.groups, *geometry.kernel_size)}"
        )
    if max(h + 2 * geometry.padding[0], w + 2 * geometry.padding[1]) >= 2**31:
        raise ValueError(
            "padding must leave H + 2 * padding and W + 2 * padding below 2**31 on MPS, got "
            f"{geometry.padding} for an input of {(h, w)}"
        )


_COLUMNS = Columns(
    sample=_sample,
    gradients=_gradients,
    max_bytes=MAX_BYTES,
    check=check_sizes,
    longest_sum=LONGEST_SUM,
    products_of_views=False,
)

deform_conv2d = prepared(_COLUMNS.forward)
deform_conv2d_backward = prepared(_COLUMNS.backward)


@dataclass(frozen=True)
class _Batch:
    """The positions of one launch."""

    geometry: Geometry
    image: Tensor
    offset: Tensor
    first: int
    """The position of the first row of the columns."""
    start: int
    """The row of the columns that the batch begins with."""
    positions: int
    column_positions: int
    widest: int = max(WIDTHS)
    """The most channels that a thread may take at a time."""

    @property
    def images(self) -> int:
        """How many images it touches."""
        first, end = self._range()
        return end - first

    @property
    def cells(self) -> int:
        """How many cells these have."""
        h, w = self.image.shape[1:3]
        return self.images * self.geometry.offset_groups * (h + 1) * (w + 1)

    @property
    def width(self) -> int:
        """How many channels a thread takes at a time."""
        c, g = self.image.shape[3], self.geometry
        divisor = gcd(self.widest, c // g.groups, c // g.offset_groups, self.image.storage_offset())
        return max(width for width in WIDTHS if divisor % width == 0)

    @property
    def vectors(self) -> int:
        """How many vectors of so many channels an offset group has."""
        return self.image.shape[3] // self.geometry.offset_groups // self.width

    def of(self, tensor: Tensor) -> Tensor:
        """The images that it touches, of a tensor that has the batch for its first axis."""
        first, end = self._range()
        return tensor[first:end]

    def sizes(self, tiles: _Tiles, lanes: int, masked: bool) -> list[int]:
        """Sizes in deform_conv2d.metal. What no result can tell from a smaller number is made smaller."""
        g, (h, w, c), area = self.geometry, self.image.shape[1:], self._area()
        padded = (h + 2 * g.padding[0], w + 2 * g.padding[1])
        return [
            *(h, w, c),
            *self.offset.shape[2:],
            *g.kernel_size,
            *(min(stride, size) for stride, size in zip(g.stride, padded, strict=True)),
            *g.padding,
            *(min(dilation, size) for dilation, size in zip(g.dilation, padded, strict=True)),
            *(g.offset_groups, c // g.offset_groups, c // g.groups),
            *((self.first + self.start) % area, self.positions, self.start, self.column_positions),
            *(tiles.positions.bit_length() - 1, tiles.pairs, tiles.rounds, 65536 // tiles.pairs + 1),
            *(lanes.bit_length() - 1, int(masked)),
        ]

    def _range(self) -> tuple[int, int]:
        first = self.first + self.start
        return first // self._area(), (first + self.positions - 1) // self._area() + 1

    def _area(self) -> int:
        return self.offset.shape[2] * self.offset.shape[3]


@dataclass(frozen=True)
class _Tiles:
    """How the samples of a launch are dealt out to threadgroups."""

    positions: int
    """Of one tile; a power of two."""
    pairs: int
    rounds: int
    """How many tiles of the same positions a threadgroup takes, one after another."""
    lanes: int
    threads: tuple[int, int]
    group_size: tuple[int, int]

    @classmethod
    def of(cls, batch: _Batch) -> _Tiles:
        """Tiles of samples that are more the fewer channels they have, and a thread for each."""
        all_pairs = batch.geometry.taps * batch.geometry.offset_groups
        tiles = -(-all_pairs // TILE_PAIRS)
        pairs = -(-all_pairs // tiles)
        positions = TILE_POSITIONS // (1 if batch.vectors < 8 else 2 if batch.vectors < 32 else 4)
        across = -(-batch.positions // positions)
        # Neighbouring taps find each other's pixels in the cache, if enough threadgroups are left.
        rounds = max(1, min(tiles, across * tiles // GROUPS))
        size = TILE_POSITIONS * pairs if batch.vectors < 8 else min(256, TILE_POSITIONS * pairs)
        threads = size * across, -(-tiles // rounds)
        return cls(positions, pairs, rounds, _lanes(batch.vectors, SAMPLE_LANES), threads, (size, 1))


def _batches(geometry: Geometry, image: Tensor, offset: Tensor, first: int, positions: int) -> Iterator[_Batch]:
    """The positions of the columns, in batches of at most MAX_SAMPLES, MAX_COMPARISONS and MAX_CELLS."""
    h, w = image.shape[1:3]
    # The positions of so many images can touch one more.
    images = max(1, MAX_CELLS // (geometry.offset_groups * (h + 1) * (w + 1)) - 1)
    groups = geometry.offset_groups
    max_positions = min(MAX_SAMPLES // groups, isqrt(MAX_COMPARISONS // groups)) // geometry.taps
    batch_positions = max(1, min(max_positions, images * offset.shape[2] * offset.shape[3]))
    for start in range(0, positions, batch_positions):
        yield _Batch(geometry, image, offset, first, start, min(batch_positions, positions - start), positions)


def _lanes(vectors: int, limit: int) -> int:
    """How many lanes share the channels of an offset group: a power of two."""
    return min(limit, 1 << (vectors.bit_length() - 1))


def _kernel(name: str, image: Tensor, width: int) -> Any:
    return getattr(library("deform_conv2d", image.dtype), f"deform_conv2d_{name}{width}")
