"""The operators that have Metal kernels, and arguments for them: for the tests of this folder and for run_nvcc.py."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from masks import adversarial
from operator_sizes import DeformConv2d
from torch import Tensor

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of a result, relative to its largest element."""


EXACT = dict.fromkeys((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), 0.0)
"""Of integers."""


class Carafe(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    kernel_size: int
    group_size: int
    scale_factor: int
    stride: int


class ConnectedComponents(NamedTuple):
    n: int
    h: int
    w: int
    connectivity: int
    masks: float | str = "adversarial"
    """The density of noise, or the name of an adversarial mask, or all of these in turn."""


class MultiScaleDeformAttn(NamedTuple):
    n: int
    shapes: tuple[tuple[int, int], ...]
    queries: int
    heads: int
    channels: int
    points: tuple[int, ...]
    """Of each level."""
    discrete: bool = False
    wide: str = ""
    """Of ``locations`` and ``weights`` those that are float32 beside half precision."""


Case = Carafe | DeformConv2d | ConnectedComponents | MultiScaleDeformAttn

OPERATORS = {
    Carafe: ("carafe", "carafe_backward_features", "carafe_backward_masks"),
    DeformConv2d: ("deform_conv2d", "deform_conv2d_backward"),
    ConnectedComponents: ("connected_components",),
    MultiScaleDeformAttn: ("multi_scale_deform_attn", "multi_scale_deform_attn_backward"),
}


def arguments(operator: str, case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[Any]:
    """What the operator's kernel takes, the tensors made on the CPU, or on the device "meta"."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        if device == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return torch.randn(size, generator=generator).to(dtype)

    if isinstance(case, ConnectedComponents):
        if isinstance(case.masks, float):
            foreground = torch.rand((case.n, case.h, case.w), generator=generator) < case.masks
        else:
            named = adversarial(case.h, case.w)
            masks = [named[case.masks]] if case.masks in named else list(named.values())
            foreground = torch.stack([masks[i % len(masks)] for i in range(case.n)])
        # Of a wide integer a bit that a narrower one has not.
        bit = True if dtype == torch.bool else 1 << torch.iinfo(dtype).bits - 2
        return [torch.where(foreground[:, None], bit, False).to(dtype), case.connectivity]
    if isinstance(case, Carafe):
        n, c, h, w, k, g, s, t = case
        rows, columns = -(-h // t) * s, -(-w // t) * s
        features, masks, grad = random(n, c, h, w), random(n, g * k * k, rows, columns), random(n, c, rows, columns)
        tensors: dict[str, list[Any]] = {
            "carafe": [features, masks],
            "carafe_backward_features": [grad, masks, h, w],
            "carafe_backward_masks": [grad, features],
        }
        return [*tensors[operator], k, g, s, t]
    if isinstance(case, MultiScaleDeformAttn):
        return _attention(operator, case, random)
    height, width = case.out_size
    samples = case.offset_groups * case.kernel_size[0] * case.kernel_size[1]
    input, weight, bias = (
        random(case.n, case.c, case.h, case.w),
        random(case.c_out, case.c // case.groups, *case.kernel_size),
        random(case.c_out),
    )
    offset, grad = 2 * random(case.n, 2 * samples, height, width), random(case.n, case.c_out, height, width)
    mask = random(case.n, samples, height, width) if case.masked else None
    return {
        "deform_conv2d": [input, offset, weight, bias, mask, *case.numbers],
        "deform_conv2d_backward": [grad, input, offset, weight, mask, *case.numbers, [*[True] * 4, case.masked]],
    }[operator]


def _attention(operator: str, case: MultiScaleDeformAttn, random: Callable[..., Tensor]) -> list[Any]:
    """Each query looks at some pixels around a position: its own where it is a pixel, as in an encoder, or any."""
    n, shapes, queries, heads, channels, points, discrete, wide = case
    pixels = sum(height * width for height, width in shapes)
    value = random(n, pixels, heads, channels)
    if queries == pixels:
        centres = torch.cat([_centres(height, width) for height, width in shapes])
    else:
        centres = torch.rand((queries, 2), generator=torch.Generator().manual_seed(queries))
    sizes = torch.tensor([max(size, 1) for height, width in shapes for size in (width, height)]).view(-1, 2)
    moves = random(n, queries, heads, sum(points), 2)
    locations = moves.float() * 2 / sizes.repeat_interleave(torch.tensor(points), 0).to(moves.device)
    locations = (locations + centres[:, None, None].to(moves.device)).to(value.dtype)
    weights, grad = random(n, queries, heads, sum(points)), random(n, queries, heads * channels)
    locations, weights = (
        tensor.float() if name in wide else tensor for name, tensor in (("locations", locations), ("weights", weights))
    )
    flat = [size for shape in shapes for size in shape]
    inputs = [value, flat, locations, weights, list(points), discrete]
    return inputs if operator == "multi_scale_deform_attn" else [grad, *inputs, [True] * 3]


def _centres(height: int, width: int) -> Tensor:
    """Of the pixels of a map that reaches from 0 to 1, x and y."""
    y, x = ((torch.arange(size) + 0.5) / max(size, 1) for size in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def doubled(arguments: list[Any]) -> list[Any]:
    """The same with floating tensors in float64, for the oracle."""
    return [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments]


def results(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All results of an operator that have elements: the gradient of a mask that is not there has none."""
    return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if x.numel())


def oracle(reference: ModuleType, operator: str, args: list[Any]) -> tuple[Tensor, ...]:
    """The reference's results in float64."""
    return results(getattr(reference, operator)(*doubled(args)))


def error(result: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest element expected."""
    return float((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
