"""Multi-scale deformable attention for selftest and bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends.reference import multi_scale_deform_attn as kernels
from omniops.benchmarking.contenders import BOTH, FORWARD, OURS, Contender, Shape, contender
from omniops.benchmarking.goals import Goal, TimeGoal
from omniops.benchmarking.timing import GRAPH, HOST
from omniops.cli.cases._check import Check
from omniops.ops.multi_scale_deform_attn import multi_scale_deform_attn

NAME = "multi_scale_deform_attn"

_Sizes = tuple[tuple[int, int], ...]


def checks() -> Iterator[Check]:
    """Odd sizes, one level and several, heads of every width, levels with different points, one without pixels, both
    methods, layouts, and points outside of the map."""
    yield _check(((9, 11), (5, 6), (3, 3)), n=2, queries=13, heads=3, channels=8, points=4)
    yield _check(((20, 27), (10, 14), (5, 7), (3, 4)), n=1, queries=300, heads=8, channels=32, points=4)
    yield _check(((7, 5),), n=3, queries=35, heads=1, channels=5, points=1)
    yield _check(((12, 9), (6, 5)), n=1, queries=11, heads=4, channels=64, points=2, layout="heads first")
    yield _check(((6, 7), (3, 4)), n=2, queries=9, heads=2, channels=24, points=3, layout="expanded")
    yield _check(((16, 12), (8, 6), (4, 3)), n=1, queries=20, heads=8, channels=32, points=(4, 4, 6))
    yield _check(((16, 12), (8, 6), (4, 3)), n=1, queries=20, heads=8, channels=16, points=4, method="discrete")
    yield _check(((8, 8), (0, 5), (4, 4)), n=1, queries=7, heads=2, channels=16, points=(3, 2, 1))
    yield _check(((5, 4), (1, 1)), n=2, queries=1, heads=5, channels=1, points=8)


def _check(
    sizes: _Sizes,
    *,
    n: int,
    queries: int,
    heads: int,
    channels: int,
    points: int | tuple[int, ...],
    method: str = "default",
    layout: str = "contiguous",
) -> Check:
    generator = torch.Generator().manual_seed(queries + channels)
    pixels = sum(height * width for height, width in sizes)
    counts = (points,) * len(sizes) if isinstance(points, int) else points
    k = sum(counts)
    value = torch.randn((n, pixels, heads, channels), dtype=torch.float64, generator=generator)
    weights = torch.rand((n, queries, heads, k), dtype=torch.float64, generator=generator)
    if layout == "heads first":
        value, weights = value.transpose(1, 2).contiguous().transpose(1, 2), weights.mT.contiguous().mT
    if layout == "expanded":
        value = value[:1].expand(n, -1, -1, -1)
    inputs = {
        "value": value,
        "sampling_locations": _locations((n, queries, heads), sizes, counts, generator),
        "attention_weights": weights,
    }
    points_per_level = None if isinstance(points, int) else points
    if points_per_level is None:
        inputs = {key: x if key == "value" else x.unflatten(3, (len(sizes), points)) for key, x in inputs.items()}
    words = [f"{height}x{width}" for height, width in sizes] + [f"Q{queries} M{heads} D{channels} P{points}"]
    words += [word for word in (method, layout) if word not in ("default", "contiguous")]
    return Check(
        " ".join(words),
        lambda value, locations, weights: multi_scale_deform_attn(
            value, sizes, locations, weights, points_per_level, method
        ),
        partial(_oracle, sizes=sizes, points=counts, discrete=method == "discrete"),
        inputs,
    )


def _locations(shape: tuple[int, int, int], sizes: _Sizes, points: Sequence[int], generator: torch.Generator) -> Tensor:
    """From a tenth outside of the map on. No sample is so near to a pixel's centre or border that the last digit of its
    position, in any dtype, decides on its derivative or its pixel."""
    found = []
    for (height, width), count in zip(sizes, points, strict=True):
        level_points = torch.rand((*shape, count, 2), dtype=torch.float64, generator=generator) * 1.2 - 0.1
        for _ in range(100):
            near = torch.zeros_like(level_points, dtype=torch.bool)
            for dtype in (torch.float64, torch.float16, torch.bfloat16):
                position = level_points.to(dtype).double() * torch.tensor([width, height]) * 2
                near |= (position - position.round()).abs() < 1e-3
            if not near.any():
                break
            level_points = torch.where(
                near, torch.rand(level_points.shape, dtype=torch.float64, generator=generator), level_points
            )
        found.append(level_points)
    return torch.cat(found, 3)


def _oracle(
    value: Tensor, locations: Tensor, weights: Tensor, *, sizes: _Sizes, points: Sequence[int], discrete: bool
) -> Tensor:
    k = sum(points)
    locations, weights = locations.reshape(*locations.shape[:3], k, 2), weights.reshape(*weights.shape[:3], k)
    result = kernels.multi_scale_deform_attn(value, _flat(sizes), locations, weights, points, discrete)
    # Where it has no derivative by the locations, autograd gives zeros for them too.
    return result + 0 * locations.sum() if discrete else result


def _flat(sizes: _Sizes) -> list[int]:
    return [side for pair in sizes for side in pair]


# N, Q, and the height and width of the finest of four levels, each half as large as the one before; 8 heads of 32
# channels, 4 points. With a fifth number points lie so many pixels from the pixel that a query is, as an encoder's do;
# without it anywhere.
_ANYWHERE = (2, 17821, 100, 134)
_ENCODER = (2, 17821, 100, 134, 4)
_DECODER = (2, 300, 100, 134)
_TINY = (1, 10, 8, 8)
_HEADS, _CHANNELS, _POINTS = 8, 32, 4

_PEER, _COMPOSITION = "deformops", "grid_sample"
_ON_CUDA = (_ANYWHERE, _ENCODER, _DECODER)
_ON_CPU = (_ENCODER, _DECODER)

GOALS = (
    *(
        Goal(f"{text} faster than deformops", "cuda", way, _PEER, way, 1, _ON_CUDA, mode=GRAPH)
        for text, way in (("forward", FORWARD), ("both ways", BOTH))
    ),
    TimeGoal("the host's forward", "cuda", FORWARD, 40, (_TINY,), HOST),
    TimeGoal("the host's both ways", "cuda", BOTH, 250, (_TINY,), HOST),
    *(
        Goal(f"{text} at least 5x grid_sample", "cpu", way, _COMPOSITION, way, 1 / 5, _ON_CPU, "float32")
        for text, way in (("forward", FORWARD), ("both ways", BOTH))
    ),
)
"""The project's goals; they are for an H200 and two CPU threads, so only benchmarks/ judges them."""


def shapes(device_type: str, quick: bool) -> tuple[Shape, ...]:
    """N, Q, the finest level, and how far points lie from the pixel of their query where that is not anywhere."""
    if quick:
        return ((1, 12, 6, 7),)
    return _ON_CPU if device_type == "cpu" else _ON_CUDA


def host_shape(device_type: str) -> Shape:
    """An input so small that its kernels take no time."""
    return _TINY


def traffic(shape: Shape) -> dict[str, int]:
    """Elements read and written if each were moved once: the inputs and the result; then their gradients too."""
    inputs = _inputs(shape, torch.float32, torch.device("meta"))
    forward = sum(x.numel() for x in inputs) + shape[0] * shape[1] * _HEADS * _CHANNELS
    return {FORWARD: forward, BOTH: 2 * forward}


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Contender]:
    """omniops, its reference kernels, deformops where it is installed, and what models fall back on without any."""
    inputs, sizes = _inputs(shape, dtype, device), _levels(shape)
    yield contender(OURS, lambda *tensors: multi_scale_deform_attn(tensors[0], sizes, *tensors[1:]), inputs)
    yield _reference(inputs, sizes)
    if device.type == "cuda":
        with suppress(ImportError, SyntaxError):  # the latter from Pythons that it is not for
            yield contender(_PEER, _peer_call(import_module("deformops.registry").msda, sizes, device), inputs)
    yield contender(_COMPOSITION, lambda *tensors: grid_sample_composition(tensors[0], sizes, *tensors[1:]), inputs)


def _peer_call(msda: Callable[..., Tensor], sizes: _Sizes, device: torch.device) -> Callable[..., Tensor]:
    shapes = torch.tensor(sizes, device=device)
    areas = shapes.prod(1)
    starts = areas.cumsum(0) - areas
    return lambda value, locations, weights: msda(value, shapes, starts, locations, weights)


class _Inputs(NamedTuple):
    value: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor


def _levels(shape: Shape) -> _Sizes:
    height, width = shape[2:4]
    return tuple((-(-height // 2**level), -(-width // 2**level)) for level in range(4))


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> _Inputs:
    """Weights from a softmax, as models have them."""
    n, queries, *_ = shape
    sizes = _levels(shape)
    points = n, queries, _HEADS, len(sizes), _POINTS
    value = torch.randn((n, sum(h * w for h, w in sizes), _HEADS, _CHANNELS), device=device)
    if len(shape) == 4 or device.type == "meta":
        locations = torch.rand((*points, 2), device=device)
    else:
        moves = torch.randn((*points, 2), device=device) * shape[4]
        pixels = moves.new_tensor([[width, height] for height, width in sizes])[:, None]
        locations = _centres(sizes, device)[None, :queries, None, None, None] + moves / pixels
    weights = torch.randn(points, device=device).flatten(3).softmax(3).view(points)
    return _Inputs(value.to(dtype), locations.to(dtype), weights.to(dtype))


def _centres(sizes: _Sizes, device: torch.device) -> Tensor:
    """(S, 2): the position of each pixel of each level, from 0 to 1."""
    return torch.cat(
        [
            torch.cartesian_prod(
                (torch.arange(height, device=device) + 0.5) / height, (torch.arange(width, device=device) + 0.5) / width
            ).flip(1)
            for height, width in sizes
        ]
    )


def _reference(inputs: _Inputs, sizes: _Sizes) -> Contender:
    value, locations, weights = (
        inputs.value,
        inputs.sampling_locations.flatten(3, 4),
        inputs.attention_weights.flatten(3),
    )
    numbers = [_POINTS] * len(sizes), False
    n, queries, heads, _ = weights.shape
    grad = torch.randn((n, queries, heads * value.shape[3]), device=value.device).to(value.dtype)

    def forward() -> Tensor:
        return kernels.multi_scale_deform_attn(value, _flat(sizes), locations, weights, *numbers)

    def forward_backward() -> tuple[Tensor, ...]:
        gradients = kernels.multi_scale_deform_attn_backward(
            grad, value, _flat(sizes), locations, weights, *numbers, [True] * 3
        )
        return forward(), *gradients

    return Contender("reference kernels", forward, forward_backward, on_host=False)


def grid_sample_composition(value: Tensor, sizes: _Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Level by level by ``torch.nn.functional.grid_sample``, then one weighted sum, as models do without a kernel."""
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    samples = []
    for level, pixels in enumerate(value.split([height * width for height, width in sizes], 1)):
        maps = pixels.permute(0, 2, 3, 1).reshape(n * heads, channels, *sizes[level])
        samples.append(F.grid_sample(maps, grids[:, :, level], align_corners=False))
    factors = weights.transpose(1, 2).reshape(n * heads, 1, queries, -1)
    summed = (torch.stack(samples, -2).flatten(-2) * factors).sum(-1)
    return summed.view(n, heads * channels, queries).mT.contiguous()
