"""Deformable convolution in Triton: launches the kernels; ``omniops.ops.deform_conv2d`` has the formula.

The forward with few output channels is one kernel that makes no columns (``_deform_fused``, and ``_deform_narrow`` for
many offset groups). Elsewhere columns in memory and a matrix product after them were measured to be faster
(docs/benchmarks.md): the weights are then read fewer times. Those of float32 are in parts of float16 where channels
allow it (``_deform_parts``). Positions are taken in chunks, so that the workspace has a bound whatever the batch.

One kernel makes of the gradient of the columns those of offset and mask, adds to the gradient of the input by atomics
in float32, and leaves the columns, which the gradient of the weights is a product with. Under
``torch.use_deterministic_algorithms`` the gradient of the input is a gather: the samples are sorted by the pixels that
they lie between, and each pixel sums what it gave to the samples around it, with the same bits every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops.backends import prepared
from omniops.backends.cuda._deform_forwards import in_parts, is_in_parts, is_narrow, narrow
from omniops.backends.cuda._deform_launches import Problem, Scratch, layout_of, strides_like
from omniops.backends.cuda._float32_products import Product
from omniops.backends.cuda._grid import cdiv
from omniops.backends.cuda._launch import Launch, on_device

# Up to so many output channels of a group, the fused forward kernel is the faster one.
_FUSED_CHANNELS = 128

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@prepared
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Callable[..., Tensor]:
    """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
    problem = Problem(input, offset, weight, mask, stride, padding, dilation)
    has_tf32 = _has_tf32(input)
    if is_in_parts(problem, has_tf32):
        return in_parts(problem, offset, weight, bias, mask, _is_tf32)
    if _is_fused(problem, has_tf32):
        return _fused(problem, bias)
    if is_narrow(problem, has_tf32):
        return narrow(problem, offset, weight, bias, mask, _is_tf32)
    return _with_columns(problem, bias, has_tf32)


def _fused(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    most = problem.most(problem.bytes_of_plan)
    result = (problem.n, problem.c_out, problem.rows, problem.columns)
    is_float32, biased, dense = problem.dtype == torch.float32, bias is not None, bias is None or bias.is_contiguous()
    sizes = [math.prod(problem.image), math.prod(problem.kernels), math.prod(problem.kernels) if is_float32 else 0]
    scratch = Scratch(problem.dtype, [*((size, problem.dtype) for size in sizes), *problem.plan(problem.largest(most))])
    kept: dict[bool, Iterable[tuple[Launch, Launch]]] = {}

    def launches(precise: bool) -> Iterable[tuple[Launch, Launch]]:
        def of_chunk(first: int, count: int) -> tuple[Launch, Launch]:
            prepare = problem.prepare(first, count, plan=True, low=precise)
            return prepare, problem.fused(first, count, precise, biased)

        return kept.setdefault(precise, problem.each_chunk(most, of_chunk))

    def run(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
        precise = is_float32 and not _is_tf32()
        steps = kept.get(precise) or launches(precise)
        out = input.new_empty_strided(result, problem.out_strides)
        with on_device(input) as stream:
            image, kernels, low, pixels, places = scratch(input)
            mask = offset if mask is None else mask
            if bias is None:
                bias = out
            elif not dense:
                bias = bias.contiguous()
            for prepare, forward in steps:
                prepare(
                    stream, input, offset, mask, weight, image, image, pixels, places,
                    image, kernels, low, image, image, places,
                )  # fmt: skip
                forward(stream, image, pixels, places, kernels, low, bias, out)
        return out

    return run


class _Multiply(NamedTuple):
    """A product, and its factors and result as (size, stride, offset) of given tensors; the bias from an offset on."""

    product: Product
    a: tuple[Any, Any, int]
    b: tuple[Any, Any, int]
    out: tuple[Any, Any, int]
    bias: int

    def run(self, stream: int, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Multiply what is in these tensors."""
        if self.bias and bias is not None:
            bias = bias[self.bias :]
        if not self.product.in_one_launch:
            bias = bias if bias is None else bias[: self.a[0][1]]
            a, b, out = _view(a, *self.a), _view(b, *self.b), _view(out, *self.out)
        elif self.a[2] or self.b[2] or self.out[2]:
            a, b, out = (_view(*each) for each in ((a, *self.a), (b, *self.b), (out, *self.out)))
        self.product(stream, a, b, out, bias)


def _view(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _with_columns(problem: Problem, bias: Tensor | None, has_tf32: bool) -> Callable[..., Tensor]:
    size_of_columns = problem.taps * problem.c
    size = size_of_columns * problem.dtype.itemsize
    most = problem.most(size + (problem.bytes_of_plan if problem.planned else 0))
    result = (problem.n, problem.c_out, problem.rows, problem.columns)
    is_float32, biased, dense = problem.dtype == torch.float32, bias is not None, bias is None or bias.is_contiguous()
    sizes = [math.prod(problem.image), math.prod(problem.kernels), size_of_columns * problem.largest(most)]
    plan = problem.plan(problem.largest(most) if problem.planned else 0)
    scratch = Scratch(problem.dtype, [*((size, problem.dtype) for size in sizes), *plan])
    kept: dict[bool, Iterable[tuple[Launch, Launch, list[_Multiply]]]] = {}

    def launches(precise: bool) -> Iterable[tuple[Launch, Launch, list[_Multiply]]]:
        def of_chunk(first: int, count: int) -> tuple[Launch, Launch, list[_Multiply]]:
            products = list(_products_with_columns(problem, first, count, biased, is_float32 and has_tf32, precise))
            return problem.prepare(first, count, plan=problem.planned), problem.sample(first, count), products

        return kept.setdefault(precise, problem.each_chunk(most, of_chunk))

    def run(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
        precise = is_float32 and not _is_tf32()
        steps = kept.get(precise) or launches(precise)
        out = input.new_empty_strided(result, problem.out_strides)
        with on_device(input) as stream:
            image, kernels, columns, pixels, places = scratch(input)
            mask = offset if mask is None else mask
            if not (dense or bias is None):
                bias = bias.contiguous()
            for prepare, sample, products in steps:
                prepare(
                    stream, input, offset, mask, weight, image, image, pixels, places,
                    image, kernels, kernels, image, image, places,
                )  # fmt: skip
                sample(stream, image, offset, mask, pixels, places, columns)
                for multiply in products:
                    multiply.run(stream, kernels, columns, out, bias)
        return out

    return run


def _products_with_columns(
    problem: Problem, first: int, count: int, biased: bool, is_float32: bool, precise: bool
) -> Iterator[_Multiply]:
    """For each weight group, what the chunk makes of (N, C_out, H_out, W_out), as (matrices, C_out / G, positions)."""
    m, k, size = problem.out_per_group, problem.kernels[2], problem.positions
    images, (first_image, start) = cdiv(count, size), divmod(first, size)
    if problem.channels_last:  # the images are one matrix
        batches, n, strides = 1, count, (0, 1, problem.c_out)
    else:
        batches, n, strides = images, count // images, (problem.c_out * size, size, 1)
    # Up to 256 channels ours is the faster product in TF32, too.
    ours = is_float32 and (precise or m <= 256)
    a, b = (0, k, 1), (n * k, 1, k)
    for g in range(problem.groups):
        if problem.channels_last:
            to = first * problem.c_out + g * m
        else:
            to = (first_image * problem.c_out + g * m) * size + start
        yield _Multiply(
            Product(batches, m, k, n, a, b, strides, precise=precise, ours=ours, biased=biased, small=m <= 64),
            ((batches, m, k), a, g * m * k),
            ((batches, k, n), b, g * count * k),
            ((batches, m, n), strides, to),
            g * m,
        )


@prepared
def deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> Callable[..., Gradients]:
    """The gradients of input, offset, weight, bias and mask, of no elements where ``output_mask`` is false."""
    problem = Problem(input, offset, weight, mask, stride, padding, dilation)
    strides = [strides_like(each, each.shape) for each in (input, offset, weight, offset if mask is None else mask)]
    kept: dict[tuple[bool, bool], _Backward] = {}
    is_float32 = input.dtype == torch.float32 and _has_tf32(input)
    layout = tuple(grad.stride()), layout_of(grad)
    wanted = tuple(output_mask)

    def run(grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *_: Any) -> Gradients:
        how = is_float32 and not _is_tf32(), torch.are_deterministic_algorithms_enabled()
        backward = kept.get(how)
        if backward is None:
            backward = kept.setdefault(how, _Backward(problem, wanted, strides, layout, is_float32, *how))
        return backward(grad, input, offset, weight, mask)

    return run


class _OfChunk(NamedTuple):
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


class _Backward:
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
        self.of_samples = wanted[0] or wanted[1] or wanted[4]
        self.gathered = wanted[0] and deterministic
        self.planned = problem.planned or self.gathered
        # Where the gather does not need the gradient of the columns afterwards, these take its place.
        self.by_the_way = self.of_samples and wanted[2] and not self.gathered
        self.along = wanted[2] and ours
        """Whether the product for the gradient of the weights has factors along the positions."""
        self.grad_is_dense = grad[1] == 2
        # The sum alone is not worth the launch that prepares all.
        self.sums = wanted[3] and grad[1] == 1 and (self.of_samples or wanted[2])
        copies = 2 if self.along and self.of_samples else 1
        size = copies * problem.taps * problem.c * problem.dtype.itemsize
        most = problem.most(size + (problem.bytes_of_plan if self.planned else 0))
        count = problem.largest(most)
        self.alone = count == problem.total
        self.stride_along = cdiv(problem.total, 16) * 16 if self.alone else problem.total
        self.length = self.stride_along if self.alone else count
        self.count = count
        self.chunks: Iterable[_OfChunk] = problem.each_chunk(most, self._of_chunk)
        self.splits = self.chunks[0].by_weight.splits if self.alone and isinstance(self.chunks, list) else 1
        self.finish = problem.finish(strides[0] if wanted[0] else None, strides[2] if wanted[2] else None, self.splits)
        self.scratch = self._scratch()

    def _scratch(self) -> Scratch:
        problem, sizes = self.problem, [0] * 8
        groups, m, k = problem.kernels
        pixels = math.prod(problem.image)
        sizes[0] = pixels
        if self.of_samples:
            sizes[1] = groups * m * k
        if not self.grad_is_dense and (self.of_samples or not self.along):
            sizes[2] = problem.total * problem.c_out
        if self.along:
            sizes[3] = self.stride_along * problem.c_out
            sizes[5] = self.length * groups * k
        if self.of_samples or not self.along:
            sizes[4] = self.count * groups * k
        if self.wanted[2]:
            sizes[6] = self.splits * groups * m * k
        sizes[7] = pixels if self.wanted[0] else 0
        dtypes = [problem.dtype] * 6 + [problem.dtype if self.alone else problem.sums, problem.sums]
        return Scratch(
            problem.dtype,
            [*zip(sizes, dtypes, strict=True), *problem.plan(self.count if self.planned else 0)],
        )

    def _of_chunk(self, first: int, count: int) -> _OfChunk:
        problem = self.problem
        groups, m, k = problem.kernels
        length = self.length if self.alone else count
        along = length if self.along else 0
        # The product takes positions in rows that begin at multiples of 16.
        aligned = (first | length | self.stride_along) % 16 == 0
        out = (2 if self.along else 1) if self.by_the_way else 0
        if self.along:
            a, b = (m * self.stride_along, self.stride_along, 1), (k * length, 1, length)
        else:
            a, b = (m, 1, problem.c_out), (count * k, k, 1)
        return _OfChunk(
            first,
            count,
            length,
            problem.prepare(
                first,
                count,
                plan=self.planned,
                kernels=self.of_samples,
                grad=self.grad,
                grads=not self.grad_is_dense and (self.of_samples or not self.along),
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
        nothing = grad if all(wanted) else grad.new_empty(0)
        by_bias = nothing
        if wanted[3]:
            # A gradient that lies channels last is better summed by PyTorch, many channels at once.
            by_bias = new((self.problem.c_out,), (1,)) if self.sums else grad.sum((0, 2, 3))
        if not (self.of_samples or wanted[2]):
            return nothing, nothing, nothing, by_bias, nothing
        by_input = new(input.shape, strides[0]) if wanted[0] else nothing
        by_offset = new(offset.shape, strides[1]) if self.of_samples else nothing
        by_weight = new(weight.shape, strides[2]) if wanted[2] else nothing
        by_mask = by_offset if mask is None or not self.of_samples else new(mask.shape, strides[3])
        mask = offset if mask is None else mask
        with on_device(input) as stream:
            image, kernels, grads, along, columns, samples, total, by_image, pixels, places = self.scratch(input)
            sums = by_bias if self.sums else image
            if self.grad_is_dense:
                grads = grad
            if not self.along:
                samples = columns
            if not self.alone:
                total.zero_()
            for chunk in self.chunks:
                chunk.prepare(
                    stream, input, offset, mask, weight, grad, sums, pixels, places,
                    image, kernels, kernels, grads, along, by_image,
                )  # fmt: skip
                if self.of_samples:
                    self._by_columns(stream, chunk, grads, kernels, columns)
                    chunk.gradients(
                        stream, columns, image, offset, mask, pixels, places, by_offset, by_mask, by_image, samples
                    )
                    if self.gathered:
                        order, starts = self.problem.sorted(chunk.first, chunk.positions, pixels)
                        chunk.gather(stream, columns, order, starts, places, by_image)
                if wanted[2]:
                    if not self.by_the_way:
                        chunk.sample(stream, image, offset, mask, pixels, places, samples)
                    self._by_weight(stream, chunk, grads, along, samples, total)
            if wanted[0] or wanted[2]:
                self.finish(
                    stream, by_image, total, by_input if wanted[0] else image, by_weight if wanted[2] else image
                )
        return (
            by_input,
            by_offset if wanted[1] else nothing,
            by_weight,
            by_bias,
            by_mask if wanted[4] else nothing,
        )

    def _by_columns(self, stream: int, chunk: _OfChunk, grads: Tensor, kernels: Tensor, columns: Tensor) -> None:
        """The gradient of a chunk's columns, (G, P, K * C / G), from that of the result, (G, P, C_out / G)."""
        if not (chunk.by_columns.in_one_launch and chunk.first == 0):
            groups, m, k = self.problem.kernels
            shape, c_out = (groups, chunk.positions, m), self.problem.c_out
            grads = _view(grads, shape, (m, c_out, 1), chunk.first * c_out)
            kernels = _view(kernels, (groups, m, k), (m * k, 1, m), 0)
            columns = _view(columns, (groups, chunk.positions, k), (chunk.positions * k, k, 1), 0)
        chunk.by_columns(stream, grads, kernels, columns)

    def _by_weight(
        self, stream: int, chunk: _OfChunk, grads: Tensor, along: Tensor, columns: Tensor, total: Tensor
    ) -> None:
        """The gradient of the weights by tap, in parts, of the only chunk, or added to that of the others."""
        a = along if self.along else grads
        if not (self.alone and chunk.by_weight.in_one_launch):
            groups, m, k = self.problem.kernels
            first, count, length, stride = chunk.first, chunk.positions, chunk.length, self.stride_along
            if self.along:
                a = _view(a, (groups, m, length), (m * stride, stride, 1), first)
                columns = _view(columns, (groups, length, k), (length * k, 1, length), 0)
            else:
                c_out = self.problem.c_out
                a = _view(a, (groups, m, count), (m, 1, c_out), first * c_out)
                columns = _view(columns, (groups, count, k), (count * k, k, 1), 0)
            shape = (groups, m, k) if self.splits == 1 else (self.splits, groups, m, k)
            total = total[: math.prod(shape)].view(shape)
        if self.alone:
            chunk.by_weight(stream, a, columns, total)
        else:
            part = a.new_empty(self.problem.kernels)
            chunk.by_weight(stream, a, columns, part)
            total += part


def _is_fused(problem: Problem, has_tf32: bool) -> bool:
    """Whether the fused kernel serves, and is the faster: tensor cores take 16 channels of one offset group at a time,
    and its offsets within the weights of a group are 32 bits."""
    return (
        math.gcd(problem.per_offset_group, problem.per_group) % 16 == 0
        and problem.out_per_group <= _FUSED_CHANNELS
        and problem.out_per_group * problem.taps * problem.per_group < 2**31
        and problem.dtype != torch.float64
        and (problem.dtype != torch.float32 or has_tf32)
    )


def _has_tf32(tensor: Tensor) -> bool:
    # A tensor that is on no GPU is one for Triton's interpreter.
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _is_tf32() -> bool:
    """Whether PyTorch's matrix products of float32 may round their factors to TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9
    return bool(torch.backends.cuda.matmul.allow_tf32) if precision is None else precision == "tf32"
