"""What can be timed side by side."""

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
class Contender:
    """What a user could call, ready to be timed."""

    name: str
    forward: Callable[[], object]
    forward_backward: Callable[[], object] | None = None
    """None where the operator has no gradients."""
    capturable: bool = True
    """Whether a CUDA graph of a call holds all its kernels."""
    on_host: bool = True
    """Whether the host's time is taken: of what a user would call, and what does not wait for the device."""


def contender(
    name: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], capturable: bool = True
) -> Contender:
    """A function whose backward is autograd's: ``forward_backward`` runs it and the gradients of all its inputs.

    ``forward`` is of tensors that need no gradient, so it records none and needs no ``torch.no_grad()``.
    """
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    grad: Tensor | None = None

    def forward() -> Tensor:
        return function(*inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        nonlocal grad
        result = function(*leaves)
        if grad is None:
            grad = torch.randn_like(result)
        return torch.autograd.grad(result, leaves, grad)

    return Contender(name, forward, forward_backward, capturable)


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
