"""CARAFE as modules, with mmcv's names, parameters and initialisation, and the downsampling of CARAFE++."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.ops import _checks
from omniops.ops._torchscript import check_four_dimensional, is_scripting, is_tracing, shape_of, sizes
from omniops.ops.carafe import carafe, carafe_downsample


class CARAFE(nn.Module):
    """Content-aware upsampling with masks given by the caller: ``omniops.carafe`` as a module (mmcv's ``CARAFE``).

    Args:
        kernel_size: the side of the reassembly kernel, odd.
        group_size: the number of channel groups.
        scale_factor: the upsampling factor.

    Raises:
        TypeError, ValueError: for a number that no CARAFE can have.

    Example:
        >>> upsample = omniops.CARAFE(kernel_size=5, group_size=1, scale_factor=2)
        >>> upsample(torch.randn(1, 8, 4, 4), torch.randn(1, 25, 8, 8).softmax(1)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        self.kernel_size, self.group_size, self.scale_factor = _checks.integer(
            kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor
        )
        _odd(kernel_size=self.kernel_size)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """(N, C, H, W), (N, G*k*k, H*s, W*s) -> (N, C, H*s, W*s)."""
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor)

    def extra_repr(self) -> str:
        """The sizes, as they are given."""
        return f"kernel_size={self.kernel_size}, group_size={self.group_size}, scale_factor={self.scale_factor}"


CARAFENaive = CARAFE
"""mmcv's other name of the same module."""


class _Pack(nn.Module):
    """A reassembly that predicts its own masks: ``content_encoder`` from what ``channel_compressor`` makes of x."""

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, and knows no modules among them
        channel_compressor: nn.Conv2d
        content_encoder: nn.Conv2d

    def init_weights(self) -> None:
        """mmcv's initialisation: Xavier for the compressor, nearly equal weights in each predicted kernel."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for convolution in (self.channel_compressor, self.content_encoder):
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """What ``content_encoder`` gives -> the masks, each kernel's weights summing to one."""
        raise NotImplementedError

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """The features, the masks -> the result."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The features, (N, C, H, W) -> the result, of as many channels."""
        if not is_scripting():
            _checks.tensor(x=x)
        check_four_dimensional("x", x)
        mask = self.content_encoder(self.channel_compressor(x))
        return self.feature_reassemble(x, self.kernel_normalizer(mask))


class CARAFEPack(_Pack):
    """Content-aware upsampling that predicts its own masks (mmcv's ``CARAFEPack``; arXiv:1905.02188, section 3.2).

    A 1x1 convolution compresses the channels, a second convolution predicts the masks of each pixel's block of
    results, pixel shuffle lays them out at the new resolution and softmax normalises them over the kernel. A state
    dict of mmcv's module loads strictly.

    Args:
        channels: C of the features.
        scale_factor: the upsampling factor; a float too, as for ``nn.Upsample``, where it is a whole number.
        up_kernel: the side of the reassembly kernel, odd.
        up_group: the number of channel groups of the reassembly.
        encoder_kernel: the side of the mask predictor's kernel, odd.
        encoder_dilation: its dilation.
        compressed_channels: the channels that the predictor sees.
        kernel_size: another name of ``up_kernel``; where both are given it is this one.
        group_size: another name of ``up_group``; where both are given it is this one.

    Raises:
        TypeError, ValueError: for a number that no CARAFE can have.

    Example:
        >>> upsample = omniops.CARAFEPack(channels=64, scale_factor=2)
        >>> upsample(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 64, 16, 16])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: float,
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
        kernel = "up_kernel" if kernel_size is None else "kernel_size"
        group = "up_group" if group_size is None else "group_size"
        (self.channels,) = _checks.integer(channels=channels)
        (self.scale_factor,) = _checks.whole_number(scale_factor=scale_factor)
        self.up_kernel, self.up_group, self.encoder_kernel, self.encoder_dilation, self.compressed_channels = (
            _checks.integer(
                **{
                    kernel: up_kernel if kernel_size is None else kernel_size,
                    group: up_group if group_size is None else group_size,
                },
                encoder_kernel=encoder_kernel,
                encoder_dilation=encoder_dilation,
                compressed_channels=compressed_channels,
            )
        )
        _odd(**{kernel: self.up_kernel}, encoder_kernel=self.encoder_kernel)
        _divides(group, self.up_group, self.channels)
        self.channel_compressor = nn.Conv2d(self.channels, self.compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            self.compressed_channels,
            self.up_kernel**2 * self.up_group * self.scale_factor**2,
            self.encoder_kernel,
            padding=(self.encoder_kernel - 1) * self.encoder_dilation // 2,
            dilation=self.encoder_dilation,
        )
        self.init_weights()

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """(N, G*k*k*s*s, H, W) -> (N, G*k*k, H*s, W*s), each kernel's weights summing to one."""
        n, c, h, w = mask.shape
        s = self.scale_factor
        if is_tracing() or mask.numel() > 0:
            mask = F.pixel_shuffle(mask, s)
        else:  # PyTorch's pixel_shuffle fails in the backward of an empty batch
            mask = mask.reshape(n, c // (s * s), h * s, w * s)
        return _softmax(mask, self.up_group, self.up_kernel)

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, C, H, W), (N, G*k*k, H*s, W*s) -> (N, C, H*s, W*s)."""
        return carafe(x, mask, self.up_kernel, self.up_group, self.scale_factor)


class CARAFEPacks(nn.ModuleDict):
    """Several ``CARAFEPack`` in the place of one layer: each call takes that of as many channels as its input has.

    What ``replace_upsampling`` puts in the place of an ``nn.Upsample`` that is called at several levels. The choice
    depends on the input alone, so that calls may be in any order, again (activation checkpointing), and at once.

        >>> upsample = omniops.nn.CARAFEPacks([omniops.CARAFEPack(64, 2), omniops.CARAFEPack(32, 2)])
        >>> upsample(torch.randn(1, 64, 8, 8)).shape, upsample(torch.randn(1, 32, 16, 16)).shape
        (torch.Size([1, 64, 16, 16]), torch.Size([1, 32, 32, 32]))
        >>> list(upsample)
        ['64', '32']

    Args:
        packs: of different numbers of channels, which are their names in the state dict.

    Raises:
        TypeError, ValueError: for no packs, or others.
    """

    def __init__(self, packs: Iterable[CARAFEPack]) -> None:
        super().__init__()
        for pack in packs:
            if not isinstance(pack, CARAFEPack):
                raise TypeError(f"packs must be several CARAFEPack, got {type(pack).__name__}")
            if str(pack.channels) in self:
                raise ValueError(f"packs must have different numbers of channels, got {pack.channels} twice")
            self[str(pack.channels)] = pack
        if not self:
            raise ValueError("packs must be at least one, got none")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H*s, W*s), with the factor s of the pack of C channels."""
        if not is_scripting():
            _checks.tensor(x=x)
        check_four_dimensional("x", x)
        given = x.shape[1]
        if not is_scripting() and is_tracing():
            given = sizes(x)[1]
        for channels, pack in self.items():
            if given == int(channels):
                result: Tensor = pack(x)
                return result
        names = " or ".join(list(self.keys()))
        raise ValueError(f"x must have {names} channels, got shape {shape_of(x)}")


class CARAFEDownsamplePack(_Pack):
    """Content-aware downsampling that predicts its own masks (CARAFE++, arXiv:2012.04733): ``carafe_downsample``.

    ``CARAFEPack`` in the other direction: a 1x1 convolution compresses the channels, a second one, of the stride of
    the downsampling, predicts the masks of each result, and softmax normalises them over the kernel. Initialised as
    ``CARAFEPack``: at first it is nearly the mean of each kernel.

        >>> downsample = omniops.CARAFEDownsamplePack(channels=64, stride=2)
        >>> downsample(torch.randn(1, 64, 32, 31)).shape
        torch.Size([1, 64, 16, 16])

    Args:
        channels: C of the features.
        stride: the downsampling factor; a float too where it is a whole number.
        kernel_size: the side of the reassembly kernel, odd.
        group_size: the number of channel groups of the reassembly.
        encoder_kernel: the side of the mask predictor's kernel, odd.
        encoder_dilation: its dilation.
        compressed_channels: the channels that the predictor sees.

    Raises:
        TypeError, ValueError: for a number that no CARAFE can have.
    """

    def __init__(
        self,
        channels: int,
        stride: float,
        kernel_size: int = 5,
        group_size: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        (self.channels,) = _checks.integer(channels=channels)
        (self.stride,) = _checks.whole_number(stride=stride)
        self.kernel_size, self.group_size, self.encoder_kernel, self.encoder_dilation, self.compressed_channels = (
            _checks.integer(
                kernel_size=kernel_size,
                group_size=group_size,
                encoder_kernel=encoder_kernel,
                encoder_dilation=encoder_dilation,
                compressed_channels=compressed_channels,
            )
        )
        _odd(kernel_size=self.kernel_size, encoder_kernel=self.encoder_kernel)
        _divides("group_size", self.group_size, self.channels)
        self.channel_compressor = nn.Conv2d(self.channels, self.compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            self.compressed_channels,
            self.kernel_size**2 * self.group_size,
            self.encoder_kernel,
            stride=self.stride,
            padding=(self.encoder_kernel - 1) * self.encoder_dilation // 2,
            dilation=self.encoder_dilation,
        )
        self.init_weights()

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """(N, G*k*k, ceil(H / t), ceil(W / t)) -> the same, each kernel's weights summing to one."""
        return _softmax(mask, self.group_size, self.kernel_size)

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, C, H, W), (N, G*k*k, ceil(H / t), ceil(W / t)) -> (N, C, ceil(H / t), ceil(W / t))."""
        return carafe_downsample(x, mask, self.kernel_size, self.group_size, self.stride)


def _softmax(mask: Tensor, group_size: int, kernel_size: int) -> Tensor:
    """Over each kernel of (N, G*k*k, H, W)."""
    # A softmax over an axis in the middle gives contiguous results, so channels_last takes it over the last axis.
    channels_last = not mask.is_contiguous() and mask.is_contiguous(memory_format=torch.channels_last)
    kernels = (mask.permute(0, 2, 3, 1) if channels_last else mask).unflatten(
        -1 if channels_last else 1, (group_size, kernel_size * kernel_size)
    )
    # The dtype is said because autocast would make it float32, which the reassembly would cast back.
    weights = F.softmax(kernels, dim=-1 if channels_last else 2, dtype=mask.dtype)
    return weights.flatten(3).permute(0, 3, 1, 2) if channels_last else weights.flatten(1, 2)


def _divides(name: str, groups: int, channels: int) -> None:
    if channels % groups != 0:
        raise ValueError(f"{name} must divide the {channels} channels, got {groups}")


def _odd(**arguments: int) -> None:
    for name, value in arguments.items():
        if value % 2 == 0:
            raise ValueError(f"{name} must be odd, got {value}")
