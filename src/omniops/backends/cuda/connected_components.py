"""Connected components in Triton: launches the kernels; ``omniops.ops.connected_components`` says what they compute.

Four launches whatever the masks hold, five where their rows have to be padded, and no look at a result in between: the
host never waits, and a CUDA graph can record them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from omniops.backends import as_signed, prepared
from omniops.backends.cuda import _connected_components as kernels
from omniops.backends.cuda._grid import cdiv
from omniops.backends.cuda._launch import Launch, on_device


class _WordsTile(NamedTuple):
    """What a program takes."""

    words: int
    """Of 32 pixels."""
    warps: int


# docs/benchmarks.md has been measured with these: one NVIDIA H200, 2026-11-29, torch 2.11.0+cu130, Triton 3.6.0.
_RUNS = _WordsTile(32, 1)
"""link_runs, merge_runs and count_runs: a lane waits for the longest way of its program, so a warp is best alone."""
_PIXELS = _WordsTile(16, 2)
"""pad_rows and write_result, which see every pixel."""


@prepared
def connected_components(mask: Tensor, connectivity: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    check_sizes(mask.shape)
    shape = mask.shape
    n, _, height, width = shape
    words = height * cdiv(width, 32)
    strides = height * width, height * width, width, 1
    eights = cdiv(width, 8)
    is_in_eights = mask.element_size() == 1 and mask.is_contiguous() and width % 8 == 0 and mask.data_ptr() % 8 == 0
    sizes = height, width, eights, int(connectivity == 8)

    def launch(kernel: object, tile: _WordsTile) -> Launch:
        return Launch(kernel, (n * cdiv(words, tile.words),), *sizes, BLOCK=tile.words, num_warps=tile.warps)

    link, merge, count = (
        launch(kernel, _RUNS) for kernel in (kernels.link_runs, kernels.merge_runs, kernels.count_runs)
    )
    pad, write = (launch(kernel, _PIXELS) for kernel in (kernels.pad_rows, kernels.write_result))

    def run(mask: Tensor, _: int) -> tuple[Tensor, Tensor]:
        mask = mask.view(torch.int8) if is_in_eights else as_signed(mask).contiguous()
        labels = mask.new_empty_strided(shape, strides, dtype=torch.int32)
        counts = torch.empty_like(labels)
        bits = labels.new_empty((n * words,))
        with on_device(labels) as stream:
            if not is_in_eights:
                rows = mask.new_empty((n * height * eights * 8,), dtype=torch.int8)
                pad(stream, mask, rows, labels, counts)
                mask = rows
            link(stream, mask, bits, labels, counts)
            merge(stream, mask, bits, labels, counts)
            count(stream, mask, bits, labels, counts)
            write(stream, mask, bits, labels, counts)
        return labels, counts

    return run


def check_sizes(mask: Sequence[int]) -> None:
    """Raise ValueError for masks that are more programs than a grid has."""
    n, _, height, width = mask
    words = min(_RUNS.words, _PIXELS.words)
    if n * cdiv(height * cdiv(width, 32), words) >= 2**31:
        raise ValueError(
            f"mask must have N * ceil(H * ceil(W / 32) / {words}) below 2**31 on CUDA, got shape {tuple(mask)}: "
            "cut the batch into parts"
        )
