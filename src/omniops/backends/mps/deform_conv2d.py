"""Deformable convolution in Metal: launches the kernels of deform_conv2d.metal; the matrix products are PyTorch's.

``omniops.ops.deform_conv2d`` has the formula and ``omniops.backends.columns`` the order of the work and the copies that
it takes. The workspace beside these is MOST_BYTES for the columns, and in the backward 16 bytes a sample for at most
MOST_SAMPLES samples and 4 bytes a cell for at most MOST_CELLS cells; where a single position, or two images, have more,
what these have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from omniops.backends.columns import Columns, Geometry
from omniops.backends.mps._library import METAL_TYPES, library

# The last-level caches of Apple's larger chips hold 24 MB and more: what one kernel or product writes, the next finds
# there. Much smaller chunks would leave the largest GPUs idle between launches.
MOST_BYTES = 2**25
MOST_SAMPLES = 2**22
MOST_CELLS = 2**24

# From sums of 32767 terms on, the matrix products of PyTorch to 2.14 read past their operands on M1 and M2, and
# those of macOS 14.0 to 14.3 are wrong with more than 32768 rows. A multiple of a simdgroup's 32.
LONGEST_SUM = 32 * 1023

# This stands in deform_conv2d.metal too, which says what it is.
QUADS = 4

# So few lanes for a sample that they load whole cache lines, and that there is little left to sum by shuffles.
MAX_LANES = 8


def _sample(
    image: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry, first: int, columns: Tensor
) -> None:
    """Fill ``columns`` with the samples of the positions from ``first`` on."""
    part = _Part(geometry, image, offset, first, 0, columns.shape[1], columns.shape[1])
    width = _width(geometry, image)
    quads = image.shape[3] // width
    across = min(quads, 64)
    moves = part.of(offset)
    _kernel("sample", image, width)(
        part.of(image),
        moves,
        moves if mask is None else part.of(mask),
        columns,
        part.sizes(lanes=1, masked=mask is not None),
        threads=(quads, part.positions),
        group_size=(across, 256 // across),
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
    width = _width(geometry, image)
    c, d, taps = image.shape[3], geometry.offset_groups, geometry.taps
    quads = c // d // width
    lanes = min(MAX_LANES, 1 << (quads.bit_length() - 1))
    tap_rows = -(-taps // -(-taps // 16))
    for part in _parts(geometry, image, offset, first, by_columns.shape[1]):
        h, w = image.shape[1:3]
        images, moves, moves_gradient = part.of(image), part.of(offset), part.of(by_offset)
        heads = torch.full((part.images * d * (h + 1) * (w + 1),), -1, dtype=torch.int32, device=image.device)
        links = torch.empty((d * part.positions * taps, 4), dtype=torch.int32, device=image.device)
        sizes = part.sizes(lanes, masked=mask is not None)
        _kernel("backward_samples", image, width)(
            by_columns,
            images,
            moves,
            moves if mask is None else part.of(mask),
            moves_gradient,
            moves_gradient if by_mask is None else part.of(by_mask),
            heads,
            links,
            sizes,
            threads=(lanes * part.positions, taps, d),
            group_size=(32, tap_rows, 1),
            arg_casts={8: "int32"},
        )
        library("deform_conv2d").deform_conv2d_sort(heads, links, threads=heads.numel(), group_size=256)
        _kernel("backward_image", image, width)(
            by_columns,
            heads,
            links,
            part.of(by_image),
            sizes,
            threads=(lanes * w, h, part.images * d * -(-quads // (lanes * QUADS))),
            group_size=(64, 4, 1),
            arg_casts={4: "int32"},
        )


def check_sizes(input: Sequence[int], offset: Sequence[int], out_channels: int, geometry: Geometry) -> None:
    """Raise ValueError for tensors that PyTorch's operators, or the kernels, cannot index on MPS.

    The operators, matrix products among them, take tensors of less than 2**31 elements; offsets in the kernels have 32
    bits.
    """
    n, c, h, w = input
    out = (n, out_channels, *offset[2:])
    for name, shape in (("input", input), ("offset", offset), ("the result", out)):
        if prod(shape) >= 2**31:
            raise ValueError(f"{name} must have fewer than 2**31 elements on MPS, got shape {tuple(shape)}")
    if c * h * w >= 2**30 or geometry.offset_groups * (h + 1) * (w + 1) >= 2**30:
        raise ValueError(
            "input must have C * H * W, and offset groups * (H + 1) * (W + 1), below 2**30 on MPS, got shape "
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
    most_bytes=MOST_BYTES,
    check=check_sizes,
    longest_sum=LONGEST_SUM,
    products_into_views=False,
)

deform_conv2d = _COLUMNS.forward
deform_conv2d_backward_data = _COLUMNS.backward_data
deform_conv2d_backward_weight = _COLUMNS.backward_weight


@dataclass(frozen=True)
class _Part:
    """The positions of one launch."""

    geometry: Geometry
    image: Tensor
    offset: Tensor
    first: int
    """The position of the first row of the columns."""
    start: int
    """The row of the columns that the part begins with."""
    positions: int
    column_positions: int

    @property
    def images(self) -> int:
        """How many images it touches."""
        first, end = self._range()
        return end - first

    def of(self, tensor: Tensor) -> Tensor:
        """The images that it touches, of a tensor that has the batch for its first axis."""
        first, end = self._range()
        return tensor[first:end]

    def sizes(self, lanes: int, masked: bool) -> list[int]:
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
            lanes.bit_length() - 1,
            int(masked),
        ]

    def _range(self) -> tuple[int, int]:
        first = self.first + self.start
        return first // self._area(), (first + self.positions - 1) // self._area() + 1

    def _area(self) -> int:
        return self.offset.shape[2] * self.offset.shape[3]


def _parts(geometry: Geometry, image: Tensor, offset: Tensor, first: int, positions: int) -> Iterator[_Part]:
    """The positions of the columns, in parts of at most MOST_SAMPLES and MOST_CELLS."""
    h, w = image.shape[1:3]
    # The positions of so many images can touch one more.
    images = max(1, MOST_CELLS // (geometry.offset_groups * (h + 1) * (w + 1)) - 1)
    by_samples = MOST_SAMPLES // (geometry.offset_groups * geometry.taps)
    at_once = max(1, min(by_samples, images * offset.shape[2] * offset.shape[3]))
    for start in range(0, positions, at_once):
        yield _Part(geometry, image, offset, first, start, min(at_once, positions - start), positions)


def _width(geometry: Geometry, image: Tensor) -> int:
    """How many channels a thread can take at a time."""
    c = image.shape[3]
    fours = c // geometry.groups % 4 == 0 and c // geometry.offset_groups % 4 == 0
    return 4 if fours and image.storage_offset() % 4 == 0 else 1


def _kernel(name: str, image: Tensor, width: int) -> Any:
    return getattr(library("deform_conv2d"), f"deform_conv2d_{name}_{METAL_TYPES[image.dtype]}{width}")
