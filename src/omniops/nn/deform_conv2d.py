"""Deformable convolution as modules: torchvision's, which is given the offsets, and mmcv's, which predict them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from omniops.ops import _checks
from omniops.ops.deform_conv2d import deform_conv2d


class DeformConv2d(nn.Module):
    """Deformable convolution with offsets given by the caller (torchvision's ``DeformConv2d``).

    Parameters and their initialisation are torchvision's: ``weight``, (C_out, C / groups, kh, kw), and ``bias``,
    (C_out,), as those of ``torch.nn.Conv2d``.

    Args:
        in_channels: C of the input.
        out_channels: C_out.
        kernel_size: a number or (height, width).
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal).
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        groups: the number of weight groups, which divides C and C_out.
        bias: whether there is a bias.

    Raises:
        TypeError, ValueError: for an argument that no convolution can have.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _checks.integer(in_channels=in_channels, out_channels=out_channels, groups=groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups != 0:
                raise ValueError(f"groups must divide {name}, {channels}, got {groups}")
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be a bool, got {bias!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, least=1)
        self.stride = _pair("stride", stride, least=1)
        self.padding = _pair("padding", padding, least=0)
        self.dilation = _pair("dilation", dilation, least=1)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of ``torch.nn.Conv2d``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C, H, W), (N, D*kh*kw*2, H_out, W_out), (N, D*kh*kw, H_out, W_out) -> (N, C_out, H_out, W_out)."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        """The arguments, without those that are as usual."""
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1}
        told = {name: getattr(self, name) for name in ("kernel_size", "stride", *usual)}
        words = [f"{name}={value}" for name, value in told.items() if usual.get(name) != value]
        return ", ".join(
            [str(self.in_channels), str(self.out_channels), *words, *(["bias=False"] if self.bias is None else [])]
        )


class _Pack(DeformConv2d):
    """A deformable convolution that is called as a plain one: ``conv_offset`` predicts what moves its taps.

    State dicts of mmcv's first version have ``<name>_offset.*`` for ``<name>.conv_offset.*``. They load where the
    loader hands every module the whole dict, as mmengine's does. PyTorch's hands it only what lies below its name: for
    that one the keys must be renamed before.
    """

    _version = 2  # mmcv's

    _numbers_of_a_tap: int
    """How many channels ``conv_offset`` has for each offset group and tap."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        dilation: int | tuple[int, int],
        groups: int,
        offset_groups: int,
        bias: bool,
        deform_groups: int | None,
    ) -> None:
        # Named as the caller named it, for the errors.
        name, offset_groups = (
            ("offset_groups", offset_groups) if deform_groups is None else ("deform_groups", deform_groups)
        )
        _checks.integer(**{name: offset_groups})
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if in_channels % offset_groups != 0:
            raise ValueError(f"{name} must divide in_channels, {in_channels}, got {offset_groups}")
        self.offset_groups = offset_groups
        self.conv_offset = nn.Conv2d(
            in_channels,
            offset_groups * self._numbers_of_a_tap * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self.init_offset()

    def init_offset(self) -> None:
        """Zeros: every tap starts where a plain convolution has it."""
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Before its version 2 mmcv had the predictor beside the module, <name>_offset, not in it, <name>.conv_offset.
        if (local_metadata.get("version") or 1) < 2:
            for parameter in ("weight", "bias"):
                old, new = f"{prefix.removesuffix('.')}_offset.{parameter}", f"{prefix}conv_offset.{parameter}"
                if old in state_dict and new not in state_dict:
                    state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        """The arguments, without those that are as usual."""
        return super().extra_repr() + (f", offset_groups={self.offset_groups}" if self.offset_groups != 1 else "")


class DeformConv2dPack(_Pack):
    """Deformable convolution that predicts its own offsets (mmcv's ``DeformConv2dPack``; arXiv:1703.06211).

    At first the offsets are zero, and it is a plain convolution. A state dict of mmcv's module loads strictly, and by
    mmengine's loader also one of before mmcv's version 2, with ``<name>_offset.*`` for ``<name>.conv_offset.*``.

    Args:
        in_channels: C of the input.
        out_channels: C_out.
        kernel_size: a number or (height, width).
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal).
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        groups: the number of weight groups, which divides C and C_out.
        offset_groups: D, the number of channel groups with offsets of their own, which divides C.
        bias: whether there is a bias; mmcv's module has none.
        deform_groups: mmcv's name of ``offset_groups``; where both are given it is this one.

    Raises:
        TypeError, ValueError: for an argument that no convolution can have.
    """

    _numbers_of_a_tap = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = False,
        *,
        deform_groups: int | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups, bias,
            deform_groups,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """mmcv's initialisation: Kaiming, for what a ReLU follows."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # torchvision's module, which this is in all else, is called with offsets.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
        _checks.tensor(x=x)
        _checks.four_dimensional(x=x)
        return super().forward(x, self.conv_offset(x))


class ModulatedDeformConv2d(_Pack):
    """Deformable convolution that predicts its own offsets and masks (DCNv2, arXiv:1811.11168).

    mmcv's ``ModulatedDeformConv2dPack``, whose state dict loads strictly, and by mmengine's loader also one of before
    mmcv's version 2, with ``<name>_offset.*`` for ``<name>.conv_offset.*``. The first 2 * D * kh * kw channels of
    ``conv_offset`` are the offsets, and the sigmoid of the others is the mask. At first the offsets are zero and the
    masks 0.5: it is half a plain convolution, and the bias.

    Args:
        in_channels: C of the input.
        out_channels: C_out.
        kernel_size: a number or (height, width).
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal).
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        groups: the number of weight groups, which divides C and C_out.
        offset_groups: D, the number of channel groups with offsets and masks of their own, which divides C.
        bias: whether there is a bias.
        deform_groups: mmcv's name of ``offset_groups``; where both are given it is this one.

    Raises:
        TypeError, ValueError: for an argument that no convolution can have.
    """

    _numbers_of_a_tap = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        *,
        deform_groups: int | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups, bias,
            deform_groups,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """mmcv's initialisation, whose bound does not know of groups."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # torchvision's module, which this is in all else, is called with offsets.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
        _checks.tensor(x=x)
        _checks.four_dimensional(x=x)
        predicted = self.conv_offset(x)
        offsets = predicted.shape[1] // 3 * 2
        return super().forward(x, predicted[:, :offsets], predicted[:, offsets:].sigmoid())


ModulatedDeformConv2dPack = ModulatedDeformConv2d
"""mmcv's name of the same module."""


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    vertical, horizontal = _checks.pair(name, value)
    if min(vertical, horizontal) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return vertical, horizontal
