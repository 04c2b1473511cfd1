"""Deformable convolution in Triton: the forwards, each from what is prepared once to what runs at each call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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

# Up to so many output channels of a group, columns in parts of float16 take longer than one kernel without columns.
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


def is_in_parts(problem: Problem, has_tf32: bool) -> bool:
    """Whether ``in_parts`` serves, and is the faster one: a unit is of one weight group and one offset group."""
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


def fused(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    """In one kernel, from a plan of the samples."""
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
        precise = is_float32 and not is_tf32()
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


def narrow(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    """In one kernel that makes no plan."""
    is_float32, result = problem.dtype == torch.float32, (problem.n, problem.c_out, problem.rows, problem.columns)
    biased, dense = bias is not None, bias is None or bias.is_contiguous()
    scratch = Scratch(
        problem.dtype,
        [
            (math.prod(problem.image), problem.dtype), *problem.plan(0),
            (math.prod(problem.kernels), problem.dtype), (problem.c_out if is_float32 else 0, problem.dtype),
        ],
    )  # fmt: skip
    prepare = problem.prepare(0, problem.total, parts=is_float32)
    forwards = problem.fused_narrow(False, biased), problem.fused_narrow(True, biased)

    def run(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
        forward = forwards[is_float32 and not is_tf32()]
        out = input.new_empty_strided(result, problem.out_strides)
        with on_device(input) as stream:
            image, pixels, places, kernels, scales = scratch(input)
            mask = offset if mask is None else mask
            if bias is None:
                bias = out
            elif not dense:
                bias = bias.contiguous()
            prepare(
                stream, input, offset, mask, weight, image, image, pixels, places,
                image, scales if is_float32 else kernels, kernels, image, image, places,
            )  # fmt: skip
            forward(stream, image, offset, mask, kernels, scales, bias, out)
        return out

    return run


def in_parts(problem: Problem, bias: Tensor | None) -> Callable[..., Tensor]:
    """Of float32, with columns in parts of float16."""
    row = problem.taps * problem.c
    most = problem.most(2 * row * 2 + row // UNIT * 4)
    count, result = problem.largest(most), (problem.n, problem.c_out, problem.rows, problem.columns)
    biased, dense = bias is not None, bias is None or bias.is_contiguous()
    sizes = math.prod(problem.image), math.prod(problem.kernels)
    scratch = Scratch(
        torch.float32,
        [
            (sizes[0], torch.float32), *problem.plan(0), (sizes[1], torch.float32), (problem.c_out, torch.float32),
            (count * row, torch.float16), (count * row, torch.float16), (count * row // UNIT, torch.float32),
        ],
    )  # fmt: skip
    kept: dict[bool, Iterable[tuple[Launch, Launch, Launch]]] = {}

    def launches(precise: bool) -> Iterable[tuple[Launch, Launch, Launch]]:
        def of_chunk(first: int, count: int) -> tuple[Launch, Launch, Launch]:
            return (
                problem.prepare(first, count, parts=True),
                problem.sample_float16(first, count, precise),
                problem.multiply_float16(first, count, precise, biased),
            )

        return kept.setdefault(precise, problem.each_chunk(most, of_chunk))

    def run(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
        precise = not is_tf32()
        steps = kept.get(precise) or launches(precise)
        out = input.new_empty_strided(result, problem.out_strides)
        with on_device(input) as stream:
            image, pixels, places, weights, weight_scales, high, low, scales = scratch(input)
            mask = offset if mask is None else mask
            if bias is None:
                bias = out
            elif not dense:
                bias = bias.contiguous()
            for prepare, sample, product in steps:
                prepare(
                    stream, input, offset, mask, weight, image, image, pixels, places,
                    image, weight_scales, weights, image, image, places,
                )  # fmt: skip
                sample(stream, image, offset, mask, high, low, scales)
                product(stream, high, low, scales, weights, weight_scales, bias, out)
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
            a, b, out = view(a, *self.a), view(b, *self.b), view(out, *self.out)
        elif self.a[2] or self.b[2] or self.out[2]:
            a, b, out = (view(*each) for each in ((a, *self.a), (b, *self.b), (out, *self.out)))
        self.product(stream, a, b, out, bias)


def with_columns(problem: Problem, bias: Tensor | None, has_tf32: bool) -> Callable[..., Tensor]:
    """With columns in memory, in the dtype of the input."""
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
        precise = is_float32 and not is_tf32()
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
