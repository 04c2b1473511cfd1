"""CARAFE as modules, with mmcv's names, parameters and initialisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.backends import memory_format
from omniops.ops import _checks
from omniops.ops.carafe import carafe


class CARAFE(nn.Module):
    """Content-aware upsampling with masks given by the caller: ``omniops.carafe`` as a module (mmcv's ``CARAFE``).

    Args:
        kernel_size: the side of the reassembly kernel, odd.
        group_size: the number of channel groups.
        scale_factor: the upsampling factor.

    Raises:
        TypeError, ValueError: for a number that no CARAFE can have.
    """

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        _checks.integer(kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
        _odd(kernel_size=kernel_size)
        self.kernel_size = kernel_size
        self.group_size = group_size
        self.scale_factor = scale_factor

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """(N, C, H, W), (N, G*k*k, H*s, W*s) -> (N, C, H*s, W*s)."""
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor)

    def extra_repr(self) -> str:
        """The sizes, as they are given."""
        return f"kernel_size={self.kernel_size}, group_size={self.group_size}, scale_factor={self.scale_factor}"


CARAFENaive = CARAFE
"""mmcv's other name of the same module."""


class CARAFEPack(nn.Module):
    """Content-aware upsampling that predicts its own masks (mmcv's ``CARAFEPack``; arXiv:1905.02188, section 3.2).

    A 1x1 convolution compresses the channels, a second convolution predicts the masks of each pixel's block of
    results, pixel shuffle lays them out at the new resolution and softmax normalises them over the kernel. A state
    dict of mmcv's module loads strictly.

    Args:
        channels: C of the features.
        scale_factor: the upsampling factor.
        up_kernel: the side of the reassembly kernel, odd.
        up_group: the number of channel groups of the reassembly.
        encoder_kernel: the side of the mask predictor's kernel, odd.
        encoder_dilation: its dilation.
        compressed_channels: the channels that the predictor sees.
        kernel_size: another name of ``up_kernel``; where both are given it is this one.
        group_size: another name of ``up_group``; where both are given it is this one.

    Raises:
        TypeError, ValueError: for a number that no CARAFE can have.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        *,
        kernel_size: int | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        # Named as the caller named them, for the errors.
        kernel = {"up_kernel": up_kernel} if kernel_size is None else {"kernel_size": kernel_size}
        groups = {"up_group": up_group} if group_size is None else {"group_size": group_size}
        _checks.integer(
            channels=channels,
            scale_factor=scale_factor,
            **kernel,
            **groups,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
            compressed_channels=compressed_channels,
        )
        _odd(**kernel, encoder_kernel=encoder_kernel)
        ((name, self.up_group),) = groups.items()
        if channels % self.up_group != 0:
            raise ValueError(f"{name} must divide the {channels} channels, got {self.up_group}")
        self.channels = channels
        self.scale_factor = scale_factor
        (self.up_kernel,) = kernel.values()
        self.encoder_kernel = encoder_kernel
        self.encoder_dilation = encoder_dilation
        self.compressed_channels = compressed_channels
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            self.up_kernel**2 * self.up_group * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """mmcv's initialisation: Xavier for the compressor, nearly equal weights in each predicted kernel."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for convolution in (self.channel_compressor, self.content_encoder):
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """(N, G*k*k*s*s, H, W) -> (N, G*k*k, H*s, W*s), each kernel's weights summing to one."""
        n, c, h, w = mask.shape
        s = self.scale_factor
        # PyTorch's pixel_shuffle fails in the backward of an empty batch.
        mask = F.pixel_shuffle(mask, s) if mask.numel() > 0 else mask.reshape(n, c // s**2, h * s, w * s)
        # A softmax over an axis in the middle gives contiguous results, so channels_last takes it over the last axis.
        channels_last = memory_format(mask) == torch.channels_last
        kernels = (mask.permute(0, 2, 3, 1) if channels_last else mask).unflatten(
            -1 if channels_last else 1, (self.up_group, self.up_kernel**2)
        )
        # The dtype is said because autocast would make it float32, which the reassembly would cast back.
        weights = F.softmax(kernels, dim=-1 if channels_last else 2, dtype=mask.dtype)
        return weights.flatten(3).permute(0, 3, 1, 2) if channels_last else weights.flatten(1, 2)

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, C, H, W), (N, G*k*k, H*s, W*s) -> (N, C, H*s, W*s)."""
        return carafe(x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H*s, W*s)."""
        _checks.tensor(x=x)
        _checks.four_dimensional(x=x)
        mask = self.content_encoder(self.channel_compressor(x))
        return self.feature_reassemble(x, self.kernel_normalizer(mask))


def _odd(**arguments: int) -> None:
    for name, value in arguments.items():
        if value % 2 == 0:
            raise ValueError(f"{name} must be odd, got {value}")
