"""Counts what Triton compiles for an H200 where there is no GPU, for ``test_compilations.py``.

    python compilations.py OPERATOR DTYPE [HxW ...]

Calls forward and backward with each size, on tensors without memory, and has Triton compile what would be launched. It
prints the kernels in Triton's cache after each size. With TRITON_INTERPRET=1 nothing would be compiled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from omniops.backends.cuda import _launch, carafe, connected_components, deform_conv2d, multi_scale_deform_attn


class Driver:
    """All that Triton asks of a GPU before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: _launch.Launch, stream: int, *tensors: torch.Tensor) -> None:
    launch._kernel.warmup(*tensors, *launch._numbers, grid=launch._grid, **launch._constants)


def gradients_of(make: Callable[..., torch.Tensor], *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a result: any, and that of its sum, which is one element."""
    return make(*shape), make(1, 1, 1, 1).expand(shape)


def run_carafe(make: Callable[..., torch.Tensor], h: int, w: int) -> None:
    features, masks = make(2, 256, h, w), make(2, 25, 2 * h, 2 * w)
    carafe.carafe(features, masks, 5, 1, 2, 1)
    for grad in gradients_of(make, 2, 256, 2 * h, 2 * w):
        carafe.carafe_backward(grad, features, masks, h, w, 5, 1, 2, 1)


def run_deform_conv2d(make: Callable[..., torch.Tensor], h: int, w: int) -> None:
    inputs = make(2, 64, h, w), make(2, 18, h, w), make(64, 64, 3, 3)
    mask, pairs = make(2, 9, h, w), ((1, 1),) * 3
    deform_conv2d.deform_conv2d(*inputs, make(64), mask, *pairs)
    for grad in gradients_of(make, 2, 64, h, w):
        deform_conv2d.deform_conv2d_backward(grad, *inputs, mask, *pairs, [True] * 5)


def run_multi_scale_deform_attn(make: Callable[..., torch.Tensor], h: int, w: int, discrete: bool = False) -> None:
    sizes = [h, w, -(-h // 2), -(-w // 2)]
    value = make(2, h * w + sizes[2] * sizes[3], 8, 32)
    for queries in (10, 4096 + h):  # as of a decoder, and of an encoder
        inputs = value, sizes, make(2, queries, 8, 8, 2), make(2, queries, 8, 8), [4, 4], discrete
        multi_scale_deform_attn.multi_scale_deform_attn(*inputs)
        for grad in (make(2, queries, 256), make(1, 1, 1).expand(2, queries, 256)):
            multi_scale_deform_attn.multi_scale_deform_attn_backward(grad, *inputs, [True] * 3)


def run_discrete_multi_scale_deform_attn(make: Callable[..., torch.Tensor], h: int, w: int) -> None:
    run_multi_scale_deform_attn(make, h, w, discrete=True)


def run_deterministic_multi_scale_deform_attn(make: Callable[..., torch.Tensor], h: int, w: int) -> None:
    """The gradients without atomics."""
    inputs = make(2, h * w, 8, 32), [h, w], make(2, 10, 8, 4, 2), make(2, 10, 8, 4), [4]
    torch.use_deterministic_algorithms(True)
    for discrete in (False, True):
        multi_scale_deform_attn.multi_scale_deform_attn_backward(make(2, 10, 256), *inputs, discrete, [True] * 3)
    torch.use_deterministic_algorithms(False)


def run_connected_components(make: Callable[..., torch.Tensor], h: int, w: int) -> None:
    masks = make(3, 1, h, w)
    for connectivity in (4, 8):
        connected_components.connected_components(masks, connectivity)
        # One of a batch, which begins anywhere.
        connected_components.connected_components(masks[1:2], connectivity)


def main() -> None:
    """Count."""
    operator, dtype, *sizes = sys.argv[1:]
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    triton.runtime.driver.set_active(Driver())
    _launch.Launch.__call__ = compile_only  # type: ignore[method-assign]

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    for size in sizes:
        globals()[f"run_{operator}"](make, *map(int, size.split("x")))
        print(sum(1 for _ in cache.rglob("*.cubin")), flush=True)


if __name__ == "__main__":
    main()
