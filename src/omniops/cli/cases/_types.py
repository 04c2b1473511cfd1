"""The parts of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD = "forward"
BOTH = "forward + backward"
DIRECTIONS = (FORWARD, BOTH)

OURS = "omniops"
FLOOR = "byte floor"

Shape = tuple[int, ...]


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


@dataclass(frozen=True)
class Contender:
    """What a user could call, ready to be timed."""

    name: str
    forward: Callable[[], object]
    both: Callable[[], object] | None = None
    """None where the operator has no gradients."""
    capturable: bool = True
    """Whether a CUDA graph of a call holds all its kernels."""
    on_host: bool = True
    """Whether the host's time is taken: of what a user would call, and what does not wait for the device."""


@dataclass(frozen=True)
class Goal:
    """omniops takes at most ``at_most`` times as long as ``against`` does."""

    text: str
    device_type: str
    direction: str
    against: str
    against_direction: str
    at_most: float
    shapes: tuple[Shape, ...]
    dtype: str = ""
    """The only one that the goal is for; without it it is for all."""
    against_dtype: str = ""
    """That of ``against``, where it is another than that of omniops."""
    mode: str = ""
    """The only one of ``timing.METHOD`` that the goal is for; without it it is for all."""


@dataclass(frozen=True)
class TimeGoal:
    """omniops takes at most ``at_most`` microseconds."""

    text: str
    device_type: str
    direction: str
    at_most: float
    shapes: tuple[Shape, ...]
    mode: str
    dtype: str = ""


def contender(
    name: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], capturable: bool = True
) -> Contender:
    """A function whose backward is autograd's: ``both`` runs it and the gradients of all its inputs.

    ``forward`` is of tensors that need no gradient, so it records none and needs no ``torch.no_grad()``.
    """
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    grad: Tensor | None = None

    def forward() -> Tensor:
        return function(*inputs)

    def both() -> tuple[Tensor, ...]:
        nonlocal grad
        result = function(*leaves)
        if grad is None:
            grad = torch.randn_like(result)
        return torch.autograd.grad(result, leaves, grad)

    return Contender(name, forward, both, capturable)


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def bare_function(device: torch.device) -> Contender:
    """The least that a differentiable function written in Python takes, without a kernel: a yardstick of the host."""
    return contender("bare autograd.Function", _Bare.apply, (torch.zeros(1, device=device),))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in memory as ``layout`` says: channels_last, transposed, or as they are."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    return tensor
