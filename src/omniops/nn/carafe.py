"""CARAFE as modules, with mmcv's names, parameters and initialisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from omniops.ops.carafe import carafe


class CARAFE(nn.Module):
    """Content-aware upsampling with masks given by the caller: ``omniops.carafe`` as a module (mmcv's ``CARAFE``).

    Args:
        kernel_size: the side of the reassembly kernel, odd.
        group_size: the number of channel groups.
        scale_factor: the upsampling factor.
    """

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
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
        kernel_size: another name of ``up_kernel``.
        group_size: another name of ``up_group``.
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
        self.channels = channels
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel if kernel_size is None else kernel_size
        self.up_group = up_group if group_size is None else group_size
        self.encoder_kernel = encoder_kernel
        self.encoder_dilation = encoder_dilation
        self.compressed_channels = compressed_channels
        if self.up_kernel % 2 == 0:
            raise ValueError(f"up_kernel must be odd, got {self.up_kernel}")
        if encoder_kernel % 2 == 0:
            raise ValueError(f"encoder_kernel must be odd, got {encoder_kernel}")
        if channels % self.up_group != 0:
            raise ValueError(f"up_group must divide the {channels} channels, got {self.up_group}")
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
        mask = F.pixel_shuffle(mask, self.scale_factor)
        kernels = mask.unflatten(1, (self.up_group, self.up_kernel**2))
        return F.softmax(kernels, dim=2, dtype=mask.dtype).flatten(1, 2)

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, C, H, W), (N, G*k*k, H*s, W*s) -> (N, C, H*s, W*s)."""
        return carafe(x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H*s, W*s)."""
        mask = self.content_encoder(self.channel_compressor(x))
        return self.feature_reassemble(x, self.kernel_normalizer(mask))
