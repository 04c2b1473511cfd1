"""The sizes and settings of a call of an operator: for the tests of its kernels on any backend, and of run_nvcc.py."""

from __future__ import annotations

from typing import NamedTuple


class DeformConv2d(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    c_out: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        spans = (d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        sizes = zip((self.h, self.w), self.padding, spans, self.stride, strict=True)
        height, width = ((size + 2 * padding - span) // stride + 1 for size, padding, span, stride in sizes)
        return height, width

    @property
    def numbers(self) -> tuple[tuple[int, int], ...]:
        """What the kernels take after the tensors."""
        return self.stride, self.padding, self.dilation
