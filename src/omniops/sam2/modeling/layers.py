"""Layers that several parts of the network share."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops import device as devices

LONGEST_SUM = 2**14
"""Terms of a sum within the gradient of a matrix product on MPS. From 32767 on, products of PyTorch read past their
operands on M1 and M2, before macOS 27 (pytorch issue 195163)."""


class Linear(nn.Linear):
    """A linear layer that can be trained on MPS: the gradient of its weight is a product with a sum over all rows."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if torch.is_grad_enabled() and input.device.type == "mps":
            rows = input.shape[:-1].numel()
            parts = input.flatten(0, -2).chunk(max(1, -(-rows // LONGEST_SUM)))  # none of them a single row
            if len(parts) > 1:
                results = torch.cat([F.linear(part, self.weight, self.bias) for part in parts])
                return results.reshape(*input.shape[:-1], self.out_features)
        return F.linear(input, self.weight, self.bias)


class MLP(nn.Module):
    """Linear layers with an activation between them: (..., input_dim) -> (..., output_dim)."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        activation: Callable[[Tensor], Tensor] = F.relu,
        sigmoid_output: bool = False,
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(itertools.starmap(Linear, itertools.pairwise(widths)))
        self.activation = activation
        self.sigmoid_output = sigmoid_output

    def forward(self, x: Tensor) -> Tensor:
        """The last layer has no activation, but a sigmoid where one is asked for."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        x = last(x)
        return x.sigmoid() if self.sigmoid_output else x


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def project_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """``module(rows)`` of (N, C), none of whose linear layers sees a single row on MPS."""
    result: Tensor = module(devices.without_single_row(rows))
    return result if result.shape[0] == rows.shape[0] else result[: rows.shape[0]]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on the device; CUDA copies so little aside at once, so that nothing is waited for."""
    return tensor.to(device, non_blocking=device.type == "cuda")
