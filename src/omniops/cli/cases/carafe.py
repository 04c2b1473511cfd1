"""CARAFE for selftest and bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends.reference import carafe as kernels
from omniops.benchmarking.contenders import BOTH, FLOOR, FORWARD, OURS, Contender, Shape, contender
from omniops.benchmarking.goals import Goal, TimeGoal
from omniops.benchmarking.timing import CALL, GRAPH, HOST
from omniops.cli.cases._check import Check, in_layout
from omniops.ops.carafe import carafe, carafe_downsample

NAME = "carafe"


def checks() -> Iterator[Check]:
    """Odd sizes, groups, every kind of layout, up and down, maps smaller than the kernel."""
    yield _check((2, 8, 9, 11), kernel_size=5)
    yield _check((1, 40, 33, 47), kernel_size=5)
    yield _check((1, 40, 33, 47), kernel_size=5, layout="channels_last")
    yield _check((1, 12, 7, 5), kernel_size=3, group_size=4, layout="channels_last")
    yield _check((2, 6, 8, 6), kernel_size=7, group_size=2, scale_factor=3)
    yield _check((1, 6, 10, 7), kernel_size=3, group_size=3, scale_factor=4, layout="transposed")
    yield _check((2, 4, 5, 13), kernel_size=1, scale_factor=1)
    yield _check((1, 3, 1, 1), kernel_size=9)
    yield _check((1, 8, 13, 10), kernel_size=5, group_size=2, stride=2)
    yield _check((2, 5, 11, 16), kernel_size=3, stride=3, layout="channels_last")


def _check(
    shape: Shape,
    *,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
    stride: int = 1,
    layout: str = "contiguous",
) -> Check:
    n, c, h, w = shape
    if stride > 1:
        scale_factor = 1
        operator: Callable[..., Tensor] = partial(
            carafe_downsample, kernel_size=kernel_size, group_size=group_size, stride=stride
        )
        what = f"down {stride}"
    else:
        operator = partial(carafe, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
        what = f"up {scale_factor}"
    rows, columns = -(-h // stride) * scale_factor, -(-w // stride) * scale_factor
    generator = torch.Generator().manual_seed(h * w + c)
    inputs = {
        name: in_layout(torch.randn(size, dtype=torch.float64, generator=generator), layout)
        for name, size in (("features", shape), ("masks", (n, group_size * kernel_size**2, rows, columns)))
    }
    oracle = partial(
        kernels.carafe, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor, stride=stride
    )
    label = f"{shape} k{kernel_size} G{group_size} {what}{'' if layout == 'contiguous' else ' ' + layout}"
    return Check(label, operator, oracle, inputs)


K, G, S = 5, 1, 2

_SMALL = (1, 256, 64, 64)
_LARGE = (2, 256, 100, 152)
_BATCH = (8, 256, 64, 64)
_LARGE_ON_CPU = (1, 256, 100, 152)
_TINY = (1, 16, 8, 8)

_ALL = (_SMALL, _LARGE, _BATCH)
_FLOOR_TEXT = "forward at most {}x the byte floor in {}"

GOALS = (
    Goal("forward faster than bilinear", "cuda", FORWARD, "bilinear", FORWARD, 1, _ALL, mode=GRAPH),
    *(
        Goal(_FLOOR_TEXT.format(times, dtype), "cuda", FORWARD, FLOOR, FORWARD, times, (_LARGE,), dtype, mode=GRAPH)
        for dtype, times in (("float32", 2), ("float16", 3), ("bfloat16", 3))
    ),
    Goal("both ways at least 15x mmcv", "cuda", BOTH, "mmcv", BOTH, 1 / 15, _ALL, mode=GRAPH),
    Goal("a call both ways at least 3x mmcv", "cuda", BOTH, "mmcv", BOTH, 1 / 3, (_SMALL,), mode=CALL),
    Goal("a call both ways at least 10x mmcv", "cuda", BOTH, "mmcv", BOTH, 1 / 10, (_LARGE,), mode=CALL),
    TimeGoal("the host's forward", "cuda", FORWARD, 30, (_TINY,), HOST),
    TimeGoal("the host's both ways", "cuda", BOTH, 200, (_TINY,), HOST),
    Goal("the host's forward at most 3x bilinear", "cpu", FORWARD, "bilinear", FORWARD, 3, (_TINY,), mode=HOST),
    Goal("the host's both ways at most 3x bilinear", "cpu", BOTH, "bilinear", BOTH, 3, (_TINY,), mode=HOST),
    Goal("forward no slower than bilinear", "cpu", FORWARD, "bilinear", FORWARD, 1, (_LARGE_ON_CPU,)),
    Goal("both ways at most 3x bilinear both ways", "cpu", BOTH, "bilinear", BOTH, 3, (_LARGE_ON_CPU,)),
    Goal("both ways at most 3x bilinear forward", "cpu", BOTH, "bilinear", FORWARD, 3, (_LARGE_ON_CPU,)),
)
"""The project's goals; they are for an H200 and two CPU threads, so only benchmarks/ judges them."""


def shapes(device_type: str, quick: bool) -> tuple[Shape, ...]:
    """The features' shapes."""
    if quick:
        return ((1, 16, 12, 16),)
    return (_SMALL, _LARGE_ON_CPU) if device_type == "cpu" else (_SMALL, _LARGE, _BATCH)


def host_shape(device_type: str) -> Shape:
    """Features so small that their kernels take no time."""
    return _TINY


def traffic(shape: Shape) -> dict[str, int]:
    """Elements read and written if each were moved once: features, masks, result; then their gradients too."""
    n, c, h, w = shape
    features, masks, result = n * c * h * w, n * G * K**2 * h * S * w * S, n * c * h * S * w * S
    forward = features + masks + result
    return {FORWARD: forward, BOTH: forward + result + 2 * (features + masks)}


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Contender]:
    """omniops, its reference kernels, a composition of PyTorch's operators, mmcv where installed; bilinear beside them.

    Bilinear interpolation is another operation, the one that CARAFE takes the place of: a yardstick.
    """
    n, _, h, w = shape
    features = torch.randn(shape, device=device).to(dtype)
    masks = torch.randn((n, G, K * K, h * S, w * S), device=device).softmax(2).flatten(1, 2).to(dtype)
    yield contender(OURS, partial(carafe, kernel_size=K, group_size=G, scale_factor=S), (features, masks))
    yield _reference(features, masks)
    yield contender("unfold + einsum", _unfold_einsum, (features, masks))
    yield contender("bilinear", partial(F.interpolate, scale_factor=S, mode="bilinear"), (features,))
    if device.type == "cuda":
        with suppress(ImportError):
            from mmcv.ops import carafe as mmcv_carafe

            yield contender("mmcv", lambda *inputs: mmcv_carafe(*inputs, K, G, S), (features, masks))


def _reference(features: Tensor, masks: Tensor) -> Contender:
    n, c, h, w = features.shape
    grad = torch.randn((n, c, h * S, w * S), device=features.device).to(features.dtype)

    def forward() -> Tensor:
        return kernels.carafe(features, masks, K, G, S, 1)

    def forward_backward() -> tuple[Tensor, ...]:
        return (
            forward(),
            kernels.carafe_backward_features(grad, masks, h, w, K, G, S, 1),
            kernels.carafe_backward_masks(grad, features, K, G, S, 1),
        )

    return Contender("reference kernels", forward, forward_backward, on_host=False)


def _unfold_einsum(features: Tensor, masks: Tensor) -> Tensor:
    n, c, h, w = features.shape
    taps = F.unfold(features, K, padding=K // 2).view(n, G, c // G, K * K, h, w)
    weights = masks.view(n, G, K * K, h, S, w, S)
    return torch.einsum("ngckyx,ngkyaxb->ngcyaxb", taps, weights).reshape(n, c, h * S, w * S)
