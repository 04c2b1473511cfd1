"""What ``selftest`` checks of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One call of an operator, and who knows the right answer."""

    label: str
    """The shape in words."""
    operator: Callable[..., Tensor | tuple[Tensor, ...]]
    """The public function, of the inputs alone."""
    oracle: Callable[..., Tensor | tuple[Tensor, ...]]
    """The same in plain PyTorch, on the CPU. Floating inputs come in float64, and it is differentiable in them; what it
    makes of integers is exact."""
    inputs: dict[str, Tensor]
    """Name and value on the CPU, in the memory layout that the operator shall get, float64 or int64."""
    results: tuple[str, ...] = ("result",)
    """The names of what the operator returns."""


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in memory as ``layout`` says: channels_last, transposed, or as they are."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    return tensor
