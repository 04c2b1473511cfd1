"""Focal loss (Lin et al., arXiv:1708.02002), of each element or row: mmcv reduces it.

``target`` holds class indices; ``weight``, of no elements or one a class, is that of the *target's* class. A target
that is no class, such as the background's, has weight 1: mmcv's kernels read beyond the weights there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omniops.backends import accumulated
from omniops.dropin.mmcv_ext._kernel import kernel


@kernel
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output``, (N, C): the loss of each class by the logits ``input``; a target of C is the background."""
    p = accumulated(input).sigmoid()
    positive = -alpha * (1 - p) ** gamma * _log(p)
    negative = -(1 - alpha) * p**gamma * _log(1 - p)
    output.copy_(torch.where(_is_target(target, p), positive, negative) * _weights(target, weight)[:, None])


@kernel
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input``, (N, C), with the derivative of each loss by its logit."""
    p = accumulated(input).sigmoid()
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _log(p))
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * _log(1 - p) - p)
    grad_input.copy_(torch.where(_is_target(target, p), positive, negative) * _weights(target, weight)[:, None])


@kernel
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output``, (N,), by the probabilities ``input``, (N, C); rows of a negative target have none."""
    p = _of_target(accumulated(input), target)
    loss = -alpha * (1 - p) ** gamma * _log(p) * _weights(target, weight)
    output.copy_(torch.where(target >= 0, loss, 0))


@kernel
def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input``, (N, C), with the derivative of each row's loss by its logits, and ``buff`` on the way."""
    probabilities = accumulated(input)
    p = _of_target(probabilities, target)
    # p dL/dp: with d p / d logit_c = p (1 where c is the target - p_c) it makes the derivative by a logit
    factor = alpha * (gamma * (1 - p) ** (gamma - 1) * p * _log(p) - (1 - p) ** gamma) * _weights(target, weight)
    factor = torch.where(target >= 0, factor, 0)
    buff.copy_(factor)
    grad_input.copy_(factor[:, None] * (_is_target(target, probabilities).to(p.dtype) - probabilities))


def _log(p: Tensor) -> Tensor:
    """Of what is at least the smallest normal float32, which MPS would take for 0 as a bound of p itself."""
    return p.clamp(min=0).log().clamp(min=math.log(torch.finfo(torch.float32).tiny))


def _is_target(target: Tensor, values: Tensor) -> Tensor:
    return target[:, None] == torch.arange(values.shape[1], device=target.device)


def _of_target(probabilities: Tensor, target: Tensor) -> Tensor:
    return probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]


def _weights(target: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=target.device)[None]
    is_class = (target >= 0) & (target < len(weight))
    return torch.where(is_class, accumulated(weight)[target.where(is_class, 0)], 1)
