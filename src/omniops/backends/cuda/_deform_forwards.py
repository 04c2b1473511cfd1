"""Deformable convolution in Triton: forwards for few channels an offset group, and with columns in parts of float16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from omniops.backends.cuda import _deform_narrow, _deform_parts
from omniops.backends.cuda._deform_launches import Problem, Scratch
from omniops.backends.cuda._grid import cdiv, next_power_of_2
from omniops.backends.cuda._launch import Launch, on_device

UNIT = 64
"""So many channels have a scale in columns in parts of float16."""

_FEW_CHANNELS = 64
"""Up to so many output channels of a group, columns in parts of float16 take longer than one kernel without columns."""

_NARROW_CHANNELS = 128
"""Up to so many output channels of a group, one program makes them all."""


def is_narrow(problem: Problem, has_tensor_cores: bool) -> bool:
    """Whether ``narrow`` serves, and is faster than columns: a block of channels, as many as tensor cores take, is of
    whole offset groups of one weight group."""
    return (
        problem.per_offset_group in (1, 2, 4, 8)
        and problem.per_group % 16 == 0
        and problem.out_per_group <= _NARROW_CHANNELS
        and _indexed(problem)
        and problem.dtype != torch.float64
        and has_tensor_cores
    )


def is_in_parts(problem: Problem, has_tensor_cores: bool) -> bool:
    """Whether ``in_parts`` serves, and is the faster one: a unit is of one weight group and one offset group."""
    return (
        problem.out_per_group > _FEW_CHANNELS
        and math.gcd(problem.per_offset_group, problem.per_group) % UNIT == 0
        and _indexed(problem)
        and problem.dtype == torch.float32
        and has_tensor_cores
    )


def _indexed(problem: Problem) -> bool:
    """Whether 32 bits number the weights of a group."""
    return problem.out_per_group * problem.taps * problem.per_group < 2**31


def _places(problem: Problem) -> dict[str, int]:
    """Where the samples of a position lie before they move, as the kernels have it."""
    geometry = problem.geometry
    names = "STRIDE", "PAD", "STEP"
    numbers = geometry.stride, geometry.padding, geometry.dilation
    places = {
        f"{name}_{axis}": each[i] for name, each in zip(names, numbers, strict=True) for i, axis in enumerate("YX")
    }
    return {"K": problem.taps, "KW": geometry.kernel_size[1], **places}


def _strides(offset: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    return *offset.stride(), *(offset if mask is None else mask).stride()


def _no_plan(problem: Problem) -> list[tuple[int, torch.dtype]]:
    """Pieces of memory of no plan, for a kernel that wants two of these dtypes."""
    return [(0, problem.index), (0, problem.sums)]


def narrow(
    problem: Problem,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_tf32: Callable[[], bool],
) -> Callable[..., Tensor]:
    """The forward in one kernel that makes no plan. ``is_tf32`` says whether products of float32 may be in TF32."""
    is_float32, result = problem.dtype == torch.float32, (problem.n, problem.c_out, problem.rows, problem.columns)
    biased, dense = bias is not None, bias is None or bias.is_contiguous()
    weights, strides = math.prod(problem.kernels), _strides(offset, mask)
    scratch = Scratch(
        problem.dtype,
        [
            (math.prod(problem.image), problem.dtype), *_no_plan(problem),
            (weights, problem.dtype), (problem.c_out if is_float32 else 0, problem.dtype),
        ],
    )  # fmt: skip
    prepare = problem.prepare(0, problem.total, parts=is_float32)

    def launch(precise: bool) -> Launch:
        return Launch(
            _deform_narrow.forward, (cdiv(problem.total, 64), problem.groups),
            problem.total, problem.height, problem.width, problem.rows, problem.columns, *strides,
            C=problem.c, CD=problem.per_offset_group, CG=problem.per_group, NG=problem.out_per_group,
            **_places(problem), LAST=problem.channels_last, MASKED=problem.masked, BIASED=biased, PRECISE=precise,
            BLOCK_M=64, BLOCK_N=max(16, next_power_of_2(problem.out_per_group)),
            BLOCK_K=math.gcd(problem.per_group, 32), num_warps=4, num_stages=1,
        )  # fmt: skip

    forwards = launch(False), launch(True)

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


def in_parts(
    problem: Problem,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_tf32: Callable[[], bool],
) -> Callable[..., Tensor]:
    """The forward of float32 with columns in parts of float16."""
    row = problem.taps * problem.c
    most = problem.most(2 * row * 2 + row // UNIT * 4)
    count, result = problem.largest(most), (problem.n, problem.c_out, problem.rows, problem.columns)
    biased, dense = bias is not None, bias is None or bias.is_contiguous()
    half, strides = torch.float16, _strides(offset, mask)
    sizes = math.prod(problem.image), math.prod(problem.kernels)
    scratch = Scratch(
        torch.float32,
        [
            (sizes[0], torch.float32), *_no_plan(problem),
            (sizes[1], torch.float32), (problem.c_out, torch.float32),
            (count * row, half), (count * row, half), (count * row // UNIT, torch.float32),
        ],
    )  # fmt: skip
    block_c = math.gcd(problem.per_offset_group, problem.per_group, 256)
    kept: dict[bool, Iterable[tuple[Launch, Launch, Launch]]] = {}

    def launches(precise: bool) -> Iterable[tuple[Launch, Launch, Launch]]:
        block_m, warps = (128, 8) if precise else (64, 4)
        # Without a limit fewer programs run at once.
        fewer = {} if precise else {"maxnreg": 168}

        def of_chunk(first: int, count: int) -> tuple[Launch, Launch, Launch]:
            sizes = problem.height, problem.width, problem.rows, problem.columns
            sample = Launch(
                _deform_parts.sample,
                (cdiv(count * block_c, 1024), problem.offset_groups, problem.per_offset_group // block_c),
                first, count, *sizes, *strides,
                C=problem.c, D=problem.offset_groups, G=problem.groups, **_places(problem),
                MASKED=problem.masked, PRECISE=precise,
                UNIT=UNIT, BLOCK_P=1024 // block_c, BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
            product = Launch(
                _deform_parts.product, (cdiv(count, block_m) * cdiv(problem.out_per_group, 128), problem.groups),
                first, count, problem.positions,
                NG=problem.out_per_group, ROW=problem.kernels[2], LAST=problem.channels_last, BIASED=biased,
                PRECISE=precise, UNIT=UNIT, BLOCK_M=block_m, BLOCK_N=128, num_warps=warps, num_stages=3, **fewer,
            )  # fmt: skip
            return problem.prepare(first, count, parts=True), sample, product

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
