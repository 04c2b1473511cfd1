"""Deformable convolution in Triton: the forwards, each from what is prepared once to what runs at each call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops.backends.cuda._deform_float16_columns import UNIT
from omniops.backends.cuda._deform_launches import Problem, Scratch, view
from omniops.backends.cuda._float32_products import Product, is_tf32
from omniops.backends.cuda._grid import cdiv
from omniops.backends.cuda._launch import Launch, on_device

# Up to so many output channels of a group ``fused`` is faster than columns; ``narrow`` makes them all in a program.
_FUSED_CHANNELS = 128

# Up to so many output channels of a group, columns split into float16 take longer than one kernel without columns.
_FEW_CHANNELS = 64


def is_fused(problem: Problem, has_tf32: bool) -> bool:
    """Whether ``fused`` serves, and is the faster: tensor cores take 16 channels of one offset group at a time."""
    return (
        math.gcd(problem.per_offset_group, problem.per_group) % 16 == 0
        and problem.out_per_group <= _FUSED_CHANNELS
        and _indexed(problem)
        and problem.dtype != torch.float64
        and (problem.dtype != torch.float32 or has_tf32)
    )


def is_narrow(problem: Problem, has_tf32: bool) -> bool:
    """Whether ``narrow`` serves, and is faster than columns: a block of channels, as many as tensor cores take, is of
    whole offset groups of one weight group."""
    return (
        problem.per_offset_group in (1, 2, 4, 8)
        and problem.per_group % 16 == 0
        and problem.out_per_group <= _FUSED_CHANNELS
        and _indexed(problem)
        and problem.dtype != torch.float64
        and has_tf32
    )


def is_split(problem: Problem, has_tf32: bool) -> bool:
    """Whether ``split_columns`` serves, and is the faster one: a unit is of one weight group and one offset group."""
    return (
        problem.out_per_group > _FEW_CHANNELS
        and math.gcd(problem.per_offset_group, problem.per_group) % UNIT == 0
        and _indexed(problem)
        and problem.dtype == torch.float32
        and has_tf32
    )


def _indexed(problem: Problem) -> bool:
    """Whether 32 bits number the weights of a group."""
    return problem.out_per_group * problem.taps * problem.per_group < 2**31


_Step = Callable[[int, "list[Tensor]", Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""What is done with a chunk of positions, called with the stream, the call's pieces of memory, input, offset, mask,
weight, bias and result. Where there is no mask the offsets are in its place, and where there is no bias the result: no
kernel reads them there."""


def _in_steps(
    problem: Problem,
    bias: Tensor | None,
    pieces: Sequence[tuple[int, torch.dtype]],
    max_positions: int,
    step_of: Callable[[bool, int, int], _Step],
) -> Callable[..., Tensor]:
    """A forward that takes the steps of its chunks, which are kept for each state of PyTorch's switch of TF32.

    Args:
        problem: the call's sizes.
        bias: the call's.
        pieces: of memory, as ``Scratch`` takes them.
        max_positions: of a chunk.
        step_of: called with whether products of float32 are to be exact, the first position of a chunk and its number
            of positions.
    """
    shape = (problem.n, problem.c_out, problem.rows, problem.columns)
    is_float32, is_dense = problem.dtype == torch.float32, bias is None or bias.is_contiguous()
    scratch = Scratch(problem.dtype, pieces)
    kept: dict[bool, Iterable[_Step]] = {}

    def run(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
        precise = is_float32 and not is_tf32()
        steps = kept.get(precise)
        if steps is None:
            steps = kept.setdefault(precise, problem.for_chunks(max_positions, partial(step_of, precise)))
        out = input.new_empty_strided(shape, problem.out_strides)
        with on_device(input) as stream:
            if mask is None:
                mask = offset
            if bias is None:
                bias = out
            elif not is_dense:
                bias = bias.contiguous()
            memory = scratch(input)
            for step in steps:
                step(stream, memory, input, offset, mask, weight, bias, out)
        return out

    return run


def _prepare(
    launch: Launch, stream: int,
    input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
    pixels: Tensor, fractions: Tensor, image: Tensor, kernels: Tensor, kernels_low: Tensor,
) -> None:  # fmt: skip
    """Make plan, image and kernels of input, offset, mask and weight.

    Other tensors stand for what only the backward makes.
    """
    launch(
        stream, input, offset, mask, weight, image, image, pixels, fractions,
        image, kernels, kernels_low, image, image, fractions,
    )  # fmt: skip


def fused(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    """In one kernel, from a plan of the samples."""
    max_positions = problem.max_positions(problem.bytes_of_plan)
    weights, biased = math.prod(problem.kernels), bias is not None
    sizes = [math.prod(problem.image), weights, weights if problem.dtype == torch.float32 else 0]
    plan = problem.plan(problem.largest_chunk(max_positions))

    def step_of(precise: bool, first: int, count: int) -> _Step:
        prepare = problem.prepare(first, count, plan=True, split_tf32=precise)
        forward = problem.fused(first, count, precise, biased)

        def step(
            stream: int, memory: list[Tensor],
            input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, out: Tensor,
        ) -> None:  # fmt: skip
            image, kernels, low, pixels, fractions = memory
            _prepare(prepare, stream, input, offset, mask, weight, pixels, fractions, image, kernels, low)
            forward(stream, image, pixels, fractions, kernels, low, bias, out)

        return step

    return _in_steps(problem, bias, [*((size, problem.dtype) for size in sizes), *plan], max_positions, step_of)


def narrow(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    """In one kernel that makes no plan."""
    is_float32, biased = problem.dtype == torch.float32, bias is not None
    pieces = [
        (math.prod(problem.image), problem.dtype), *problem.plan(0),
        (math.prod(problem.kernels), problem.dtype), (problem.c_out if is_float32 else 0, problem.dtype),
    ]  # fmt: skip

    def step_of(precise: bool, first: int, count: int) -> _Step:
        prepare = problem.prepare(first, count, split_float16=is_float32)
        forward = problem.fused_narrow(precise, biased)

        def step(
            stream: int, memory: list[Tensor],
            input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, out: Tensor,
        ) -> None:  # fmt: skip
            image, pixels, fractions, kernels, scales = memory
            _prepare(
                prepare, stream, input, offset, mask, weight, pixels, fractions,
                image, scales if is_float32 else kernels, kernels,
            )  # fmt: skip
            forward(stream, image, offset, mask, kernels, scales, bias, out)

        return step

    return _in_steps(problem, bias, pieces, problem.total, step_of)


def split_columns(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    """Of float32, with columns split into float16."""
    row, biased = problem.taps * problem.c, bias is not None
    max_positions = problem.max_positions(2 * row * 2 + row // UNIT * 4)
    count = problem.largest_chunk(max_positions)
    pieces = [
        (math.prod(problem.image), torch.float32), *problem.plan(0),
        (math.prod(problem.kernels), torch.float32), (problem.c_out, torch.float32),
        (count * row, torch.float16), (count * row, torch.float16), (count * row // UNIT, torch.float32),
    ]  # fmt: skip

    def step_of(precise: bool, first: int, count: int) -> _Step:
        prepare = problem.prepare(first, count, split_float16=True)
        sample = problem.sample_float16(first, count, precise)
        product = problem.multiply_float16(first, count, precise, biased)

        def step(
            stream: int, memory: list[Tensor],
            input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, out: Tensor,
        ) -> None:  # fmt: skip
            image, pixels, fractions, weights, weight_scales, high, low, scales = memory
            _prepare(prepare, stream, input, offset, mask, weight, pixels, fractions, image, weight_scales, weights)
            sample(stream, image, offset, mask, high, low, scales)
            product(stream, high, low, scales, weights, weight_scales, bias, out)

        return step

    return _in_steps(problem, bias, pieces, max_positions, step_of)


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
            a, b, out = view(a, *self.a), view(b, *self.b), view(out, *self.out)
        elif self.a[2] or self.b[2] or self.out[2]:
            a, b, out = (view(*element) for element in ((a, *self.a), (b, *self.b), (out, *self.out)))
        self.product(stream, a, b, out, bias)


def with_columns(problem: Problem, bias: Tensor | None, has_tf32: bool) -> Callable[..., Tensor]:
    """With columns in memory, in the dtype of the input."""
    size_of_columns, biased = problem.taps * problem.c, bias is not None
    is_float32 = problem.dtype == torch.float32 and has_tf32
    max_positions = problem.max_positions(
        size_of_columns * problem.dtype.itemsize + (problem.bytes_of_plan if problem.planned else 0)
    )
    count = problem.largest_chunk(max_positions)
    sizes = [math.prod(problem.image), math.prod(problem.kernels), size_of_columns * count]
    plan = problem.plan(count if problem.planned else 0)

    def step_of(precise: bool, first: int, count: int) -> _Step:
        prepare, sample = problem.prepare(first, count, plan=problem.planned), problem.sample(first, count)
        products = list(_products_with_columns(problem, first, count, biased, is_float32, precise))

        def step(
            stream: int, memory: list[Tensor],
            input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, out: Tensor,
        ) -> None:  # fmt: skip
            image, kernels, columns, pixels, fractions = memory
            _prepare(prepare, stream, input, offset, mask, weight, pixels, fractions, image, kernels, kernels)
            sample(stream, image, offset, mask, pixels, fractions, columns)
            for multiply in products:
                multiply.run(stream, kernels, columns, out, bias if biased else None)

        return step

    return _in_steps(problem, bias, [*((size, problem.dtype) for size in sizes), *plan], max_positions, step_of)


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
