"""Cells that have a segment of memory each: launches the kernels of segments.metal."""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.backends.mps._library import library

# That a thread takes, in segments.metal too.
CELLS = 4


def empty_cells(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """So many cells of two numbers, which are 0, and the number of elements that their segments have in all."""
    numbers = torch.zeros(2 * count + 1, dtype=torch.int32, device=device)
    return numbers[:-1], numbers[-1:]


def allocate_segments(cells: Tensor, used: Tensor) -> None:
    """Make the second number of each cell the beginning of a segment as long as its first says."""
    count = len(cells) // 2
    threads = -(-count // (256 * CELLS)) * 256
    library("segments").allocate_segments(cells, used, count, threads=threads, group_size=256, arg_casts={2: "int32"})


def collect_segments(cell_of: Tensor, cells: Tensor) -> Tensor:
    """The segments, each with the indices in ``cell_of`` that name its cell, in any order; -1 names none.

    After it the second number of a cell is the end of its segment. What no segment has is not written.
    """
    segments = torch.empty_like(cell_of)
    library("segments").collect_segments(cell_of, cells, segments, threads=len(cell_of), group_size=256)
    return segments
