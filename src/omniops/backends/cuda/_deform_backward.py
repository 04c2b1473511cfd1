"""Deformable convolution in Triton: the backward, from what is prepared once to what runs at each call.

One kernel makes of the gradient of the columns those of offset and mask, adds to the gradient of the input by atomics
in float32, and leaves the columns, which the gradient of the weights is a product with. Under
``torch.use_deterministic_algorithms`` the gradient of the input is a gather: the samples are sorted by the pixels that
they lie between, and each pixel sums what it gave to the samples around it, with the same bits every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from omniops.backends.cuda._deform_launches import Problem, Scratch, view
from omniops.backends.cuda._float32_products import Product
from omniops.backends.cuda._grid import cdiv
from omniops.backends.cuda._launch import Launch, on_device

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of input, offset, weight, bias and mask."""


class _ChunkLaunches(NamedTuple):
    """What the backward does with a chunk of positions."""

    first: int
    positions: int
    length: int
    """How many positions the columns along the positions are of; those behind the last are zeros."""
    prepare: Launch
    by_columns: Product
    gradients: Launch
    gather: Launch
    sample: Launch
    by_weight: Product


class Backward:
    """The backward for arguments of one kind, in one state of PyTorch's switches."""

    def __init__(
        self,
        problem: Problem,
        wanted: tuple[bool, ...],
        strides: list[tuple[int, int, int, int]],
        grad: tuple[Sequence[int], int],
        ours: bool,
        precise: bool,
        deterministic: bool,
    ) -> None:
        self.problem, self.wanted, self.strides, self.grad = problem, wanted, strides, grad
        self.ours, self.precise = ours, precise
        self.needs_samples = wanted[0] or wanted[1] or wanted[4]
        self.gathered = wanted[0] and deterministic
        self.planned = problem.planned or self.gathered
        # Where the gather does not need the gradient of the columns afterwards, these take its place.
        self.columns_by_gradients = self.needs_samples and wanted[2] and not self.gathered
        self.along = wanted[2] and ours
        """Whether the product for the gradient of the weights has factors along the positions."""
        self.grad_is_dense = grad[1] == 2
        # The sum alone is not worth the launch that prepares all.
        self.sums = wanted[3] and grad[1] == 1 and (self.needs_samples or wanted[2])
        copies = 2 if self.along and self.needs_samples else 1
        size = copies * problem.taps * problem.c * problem.dtype.itemsize
        max_positions = problem.max_positions(size + (problem.bytes_of_plan if self.planned else 0))
        count = problem.largest_chunk(max_positions)
        self.alone = count == problem.total
        self.stride_along = cdiv(problem.total, 16) * 16 if self.alone else problem.total
        self.length = self.stride_along if self.alone else count
        self.count = count
        self.chunks: Iterable[_ChunkLaunches] = problem.for_chunks(max_positions, self._chunk_launches)
        self.splits = self.chunks[0].by_weight.splits if self.alone and isinstance(self.chunks, list) else 1
        self.finish = problem.finish(strides[0] if wanted[0] else None, strides[2] if wanted[2] else None, self.splits)
        self.scratch = self._scratch()

    def _scratch(self) -> Scratch:
        problem, sizes = self.problem, [0] * 8
        groups, m, k = problem.kernels
        pixels = math.prod(problem.image)
        sizes[0] = pixels
        if self.needs_samples:
            sizes[1] = groups * m * k
        if not self.grad_is_dense and (self.needs_samples or not self.along):
            sizes[2] = problem.total * problem.c_out
        if self.along:
            sizes[3] = self.stride_along * problem.c_out
            sizes[5] = self.length * groups * k
        if self.needs_samples or not self.along:
            sizes[4] = self.count * groups * k
        if self.wanted[2]:
            sizes[6] = self.splits * groups * m * k
        sizes[7] = pixels if self.wanted[0] else 0
        dtypes = [problem.dtype] * 6 + [problem.dtype if self.alone else problem.sums, problem.sums]
        return Scratch(
            problem.dtype,
            [*zip(sizes, dtypes, strict=True), *problem.plan(self.count if self.planned else 0)],
        )

    def _chunk_launches(self, first: int, count: int) -> _ChunkLaunches:
        problem = self.problem
        groups, m, k = problem.kernels
        length = self.length if self.alone else count
        along = length if self.along else 0
        # The product takes positions in rows that begin at multiples of 16.
        aligned = (first | length | self.stride_along) % 16 == 0
        out = (2 if self.along else 1) if self.columns_by_gradients else 0
        if self.along:
            a, b = (m * self.stride_along, self.stride_along, 1), (k * length, 1, length)
        else:
            a, b = (m, 1, problem.c_out), (count * k, k, 1)
        return _ChunkLaunches(
            first,
            count,
            length,
            problem.prepare(
                first,
                count,
                plan=self.planned,
                kernels=self.needs_samples,
                grad=self.grad,
                grads=not self.grad_is_dense and (self.needs_samples or not self.along),
                along=self.stride_along if self.along else 0,
                zeros=self.wanted[0],
                sums=self.sums,
            ),
            Product(
                groups, count, m, k, (m, problem.c_out, 1), (m * k, 1, m), (count * k, k, 1),
                precise=self.precise, ours=self.ours, aligned=k % 16 == 0,
            ),
            problem.gradients(
                first, count, along if out == 2 else 0, self.strides[1], self.strides[3],
                add=self.wanted[0] and not self.gathered, out=out,
            ),
            problem.gather(first, count),
            problem.sample(first, count, along),
            Product(
                groups, m, length if self.along else count, k, a, b, (m * k, k, 1),
                precise=self.precise, ours=self.along and aligned, aligned=k % 16 == 0, small=m <= 64,
            ),
        )  # fmt: skip

    def __call__(self, grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> Gradients:
        wanted, new, strides = self.wanted, input.new_empty_strided, self.strides
        nothing = [grad if want else grad.new_empty(0) for want in wanted]
        by_bias = nothing[3]
        if wanted[3]:
            # A gradient that lies channels last is better summed by PyTorch, many channels at once.
            by_bias = new((self.problem.c_out,), (1,)) if self.sums else grad.sum((0, 2, 3))
        if not (self.needs_samples or wanted[2]):
            return nothing[0], nothing[1], nothing[2], by_bias, nothing[4]
        by_input = new(input.shape, strides[0]) if wanted[0] else nothing[0]
        by_offset = new(offset.shape, strides[1]) if self.needs_samples else nothing[1]
        by_weight = new(weight.shape, strides[2]) if wanted[2] else nothing[2]
        by_mask = by_offset if mask is None or not self.needs_samples else new(mask.shape, strides[3])
        mask = offset if mask is None else mask
        with on_device(input) as stream:
            image, kernels, grads, along, columns, samples, total, by_image, pixels, fractions = self.scratch(input)
            sums = by_bias if self.sums else image
            if self.grad_is_dense:
                grads = grad
            if not self.along:
                samples = columns
            if not self.alone:
                total.zero_()
            for chunk in self.chunks:
                chunk.prepare(
                    stream, input, offset, mask, weight, grad, sums, pixels, fractions,
                    image, kernels, kernels, grads, along, by_image,
                )  # fmt: skip
                if self.needs_samples:
                    self._by_columns(stream, chunk, grads, kernels, columns)
                    chunk.gradients(
                        stream, columns, image, offset, mask, pixels, fractions, by_offset, by_mask, by_image, samples
                    )
                    if self.gathered:
                        order, starts = self.problem.sort_samples(chunk.first, chunk.positions, pixels)
                        chunk.gather(stream, columns, order, starts, fractions, by_image)
                if wanted[2]:
                    if not self.columns_by_gradients:
                        chunk.sample(stream, image, offset, mask, pixels, fractions, samples)
                    self._by_weight(stream, chunk, grads, along, samples, total)
            if wanted[0] or wanted[2]:
                self.finish(
                    stream, by_image, total, by_input if wanted[0] else image, by_weight if wanted[2] else image
                )
        return (
            by_input,
            by_offset if wanted[1] else nothing[1],
            by_weight,
            by_bias,
            by_mask if wanted[4] else nothing[4],
        )

    def _by_columns(self, stream: int, chunk: _ChunkLaunches, grads: Tensor, kernels: Tensor, columns: Tensor) -> None:
        """The gradient of a chunk's columns, (G, P, K * C / G), from that of the result, (G, P, C_out / G)."""
        if not (chunk.by_columns.in_one_launch and chunk.first == 0):
            groups, m, k = self.problem.kernels
            shape, c_out = (groups, chunk.positions, m), self.problem.c_out
            grads = view(grads, shape, (m, c_out, 1), chunk.first * c_out)
            kernels = view(kernels, (groups, m, k), (m * k, 1, m), 0)
            columns = view(columns, (groups, chunk.positions, k), (chunk.positions * k, k, 1), 0)
        chunk.by_columns(stream, grads, kernels, columns)

    def _by_weight(
        self, stream: int, chunk: _ChunkLaunches, grads: Tensor, along: Tensor, columns: Tensor, total: Tensor
    ) -> None:
        """The gradient of the weights by tap, in splits, of the only chunk, or added to that of the others."""
        a = along if self.along else grads
        if not (self.alone and chunk.by_weight.in_one_launch):
            groups, m, k = self.problem.kernels
            first, count, length, stride = chunk.first, chunk.positions, chunk.length, self.stride_along
            if self.along:
                a = view(a, (groups, m, length), (m * stride, stride, 1), first)
                columns = view(columns, (groups, length, k), (length * k, 1, length), 0)
            else:
                c_out = self.problem.c_out
                a = view(a, (groups, m, count), (m, 1, c_out), first * c_out)
                columns = view(columns, (groups, count, k), (count * k, k, 1), 0)
            shape = (groups, m, k) if self.splits == 1 else (self.splits, groups, m, k)
            total = total[: math.prod(shape)].view(shape)
        if self.alone:
            chunk.by_weight(stream, a, columns, total)
        else:
            product = a.new_empty(self.problem.kernels)
            chunk.by_weight(stream, a, columns, product)
            total += product
