"""Deformable convolution as modules: torchvision's, which is given the offsets, and mmcv's, which may predict them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omniops.ops import _checks
from omniops.ops._torchscript import check_four_dimensional, is_scripting
from omniops.ops.deform_conv2d import deform_conv2d, modulated_deform_conv2d


class DeformConv2d(nn.Module):
    """Deformable convolution with offsets given by the caller (torchvision's ``DeformConv2d``).

    Parameters and their initialisation are torchvision's: ``weight``, (C_out, C / groups, kh, kw), and ``bias``,
    (C_out,), as those of ``torch.nn.Conv2d``. mmcv's class of the same name has no bias, and is given the number of
    offset groups, which here follows from the shape of the offset: ``DeformConv2d(..., bias=False)`` loads its state
    dict strictly.

        >>> conv = omniops.DeformConv2d(64, 128, kernel_size=3, padding="same")
        >>> conv(torch.randn(1, 64, 32, 32), torch.zeros(1, 2 * 9, 32, 32)).shape
        torch.Size([1, 128, 32, 32])

    Args:
        in_channels: C of the input.
        out_channels: C_out.
        kernel_size: a number or (height, width).
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal), or as in ``torch.nn.Conv2d``
            "valid", which is 0, or "same", with a stride of 1.
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        groups: the number of weight groups, which divides C and C_out.
        bias: whether there is a bias.

    Raises:
        TypeError, ValueError: for an argument that no convolution can have.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, but not those that are strings
        bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = _checks.integer(
            in_channels=in_channels, out_channels=out_channels, groups=groups
        )
        for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups != 0:
                raise ValueError(f"groups must divide {name}, {channels}, got {self.groups}")
        (bias,) = _checks.boolean(bias=bias)
        self.kernel_size = _pair("kernel_size", kernel_size, least=1)
        self.stride = _pair("stride", stride, least=1)
        self.padding = _padding(padding, self.stride)
        self.dilation = _pair("dilation", dilation, least=1)
        self.weight = nn.Parameter(torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(self.out_channels)) if bias else None)
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
        arguments = {name: getattr(self, name) for name in ("kernel_size", "stride", *usual)}
        words = [f"{name}={value}" for name, value in arguments.items() if usual.get(name) != value]
        return ", ".join(
            [str(self.in_channels), str(self.out_channels), *words, *(["bias=False"] if self.bias is None else [])]
        )


class _Pack(DeformConv2d):
    """A deformable convolution that can be called as a plain one: ``conv_offset`` predicts what moves its taps.

    State dicts of mmcv's first version have ``<name>_offset.*`` for ``<name>.conv_offset.*``. They load where the
    loader hands every module the whole dict, as mmengine's does. PyTorch's hands it only what lies below its name: for
    that one the keys must be renamed before.
    """

    # mmcv's ConvModule reads them of every convolution.
    transposed = False
    output_padding = (0,)

    _version = 2  # mmcv's

    _channels_per_tap: int
    """How many channels ``conv_offset`` has for each offset group and tap."""
    _state_dict_may_lack_conv_offset = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | str,
        dilation: int | tuple[int, int],
        groups: int,
        offset_groups: int,
        bias: bool,
        deform_groups: int | None,
        deformable_groups: int | None,
    ) -> None:
        # Named as the caller named it, for the errors.
        name = "offset_groups"
        if deform_groups is not None:
            name, offset_groups = "deform_groups", deform_groups
        elif deformable_groups is not None:
            name, offset_groups = "deformable_groups", deformable_groups
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        (self.offset_groups,) = _checks.integer(**{name: offset_groups})
        if self.in_channels % self.offset_groups != 0:
            raise ValueError(f"{name} must divide in_channels, {self.in_channels}, got {self.offset_groups}")
        self.conv_offset: nn.Conv2d | None = nn.Conv2d(
            self.in_channels,
            self.offset_groups * self._channels_per_tap * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        if self._state_dict_may_lack_conv_offset:
            # Of this one alone: what a subclass puts in its place is loaded as strictly as any module.
            self.conv_offset.register_load_state_dict_pre_hook(_keep_missing_conv_offset)
        self.init_offset()

    @property
    def deform_groups(self) -> int:
        """mmcv's name of ``offset_groups``."""
        return self.offset_groups

    def init_offset(self) -> None:
        """Zeros: every tap starts where a plain convolution has it."""
        if self.conv_offset is not None:
            for parameter in self.conv_offset.parameters():
                nn.init.zeros_(parameter)

    def _predict(self, x: Tensor) -> Tensor:
        if not is_scripting():
            _checks.tensor(x=x)
        check_four_dimensional("x", x)
        if self.conv_offset is None:
            raise ValueError("x alone needs conv_offset, which is None here: give offset and mask too")
        predicted: Tensor = self.conv_offset(x)
        return predicted

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Before its version 2 mmcv had the predictor beside the module, <name>_offset, not in it, <name>.conv_offset.
        if (local_metadata.get("version") or 1) < 2 and self.conv_offset is not None:
            for name, parameter in self.conv_offset.named_parameters():
                old, new = f"{prefix.removesuffix('.')}_offset.{name}", f"{prefix}conv_offset.{name}"
                # A predictor that the network itself has beside it is not taken away from there.
                if old in state_dict and new not in state_dict and state_dict[old].shape == parameter.shape:
                    state_dict[new] = state_dict[old]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.conv_offset is None:
            # PyTorch looks for these keys at a module, and passes over those of a module that is None.
            unexpected_keys.extend(key for key in state_dict if key.startswith(f"{prefix}conv_offset."))

    def extra_repr(self) -> str:
        """The arguments, without those that are as usual."""
        return super().extra_repr() + (f", offset_groups={self.offset_groups}" if self.offset_groups != 1 else "")


class DeformConv2dPack(_Pack):
    """Deformable convolution that predicts its own offsets (mmcv's ``DeformConv2dPack``; arXiv:1703.06211).

    At first the offsets are zero, and it is a plain convolution. A state dict of mmcv's module loads strictly, and by
    mmengine's loader also one of before mmcv's version 2, with ``<name>_offset.*`` for ``<name>.conv_offset.*``.

        >>> conv = omniops.DeformConv2dPack(64, 128, kernel_size=3, padding=1)
        >>> conv(torch.randn(1, 64, 32, 32)).shape
        torch.Size([1, 128, 32, 32])

    Args:
        in_channels: C of the input.
        out_channels: C_out.
        kernel_size: a number or (height, width).
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal), or as in ``torch.nn.Conv2d``
            "valid", which is 0, or "same", with a stride of 1.
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        groups: the number of weight groups, which divides C and C_out.
        offset_groups: D, the number of channel groups with offsets of their own, which divides C.
        bias: whether there is a bias; mmcv's module has none.
        im2col_step: mmcv's, without effect: memory is bounded for any batch.
        deform_groups: mmcv's name of ``offset_groups``; where both are given it is this one.
        deformable_groups: mmcv's older name of the same.

    Raises:
        TypeError, ValueError: for an argument that no convolution can have.
    """

    _channels_per_tap = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
        *,
        deform_groups: int | None = None,
        deformable_groups: int | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups, bias,
            deform_groups, deformable_groups,
        )  # fmt: skip
        (self.im2col_step,) = _checks.integer(im2col_step=im2col_step)

    def reset_parameters(self) -> None:
        """mmcv's initialisation: Kaiming, for what a ReLU follows."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # torchvision's module, which this is in all else, is called with offsets.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
        offset = self._predict(x)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation)


class ModulatedDeformConv2d(_Pack):
    """Deformable convolution with masks (DCNv2, arXiv:1811.11168), whose offsets and masks are given or predicted.

    Called with ``(x, offset, mask)`` it is mmcv's ``ModulatedDeformConv2d``. Called with ``x`` alone it is mmcv's
    ``ModulatedDeformConv2dPack``: of what ``conv_offset`` predicts the first 2 * D * kh * kw channels are the offsets,
    and the sigmoid of the others is the mask. At first these offsets are zero and the masks 0.5: half a plain
    convolution, and the bias.

        >>> conv = omniops.ModulatedDeformConv2d(64, 128, kernel_size=3, padding=1)
        >>> x = torch.randn(1, 64, 32, 32)
        >>> conv(x).shape
        torch.Size([1, 128, 32, 32])
        >>> conv(x, torch.zeros(1, 2 * 9, 32, 32), torch.ones(1, 9, 32, 32)).shape
        torch.Size([1, 128, 32, 32])

    State dicts of both of mmcv's classes load strictly, and by mmengine's loader also one of a Pack of before mmcv's
    version 2, with ``<name>_offset.*`` for ``<name>.conv_offset.*``. One without ``conv_offset``, as mmcv's
    ``ModulatedDeformConv2d`` saves it, leaves that as it was, zeros in a new module; where this should be an error use
    ``ModulatedDeformConv2dPack``.

    Where offset and mask are always given, ``conv.conv_offset = None`` leaves mmcv's parameters, ``weight`` and
    ``bias`` alone: mmcv's own class loads this state dict strictly, and ``DistributedDataParallel`` finds no unused
    parameter.

    Args:
        in_channels: C of the input.
        out_channels: C_out.
        kernel_size: a number or (height, width).
        stride: of the output positions, in pixels; a number or (vertical, horizontal).
        padding: zeros around the map, in pixels; a number or (vertical, horizontal), or as in ``torch.nn.Conv2d``
            "valid", which is 0, or "same", with a stride of 1.
        dilation: the distance of the taps, in pixels; a number or (vertical, horizontal).
        groups: the number of weight groups, which divides C and C_out.
        offset_groups: D, the number of channel groups with offsets and masks of their own, which divides C.
        bias: whether there is a bias.
        deform_groups: mmcv's name of ``offset_groups``; where both are given it is this one.
        deformable_groups: mmcv's older name of the same.

    Raises:
        TypeError, ValueError: for an argument that no convolution can have.
    """

    _channels_per_tap = 3
    _state_dict_may_lack_conv_offset = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        *,
        deform_groups: int | None = None,
        deformable_groups: int | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups, bias,
            deform_groups, deformable_groups,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """mmcv's initialisation, whose bound does not know of groups."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """mmcv's name of the initialisation, of all parameters."""
        self.reset_parameters()
        self.init_offset()

    def forward(self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H_out, W_out).

        Args:
            x: (N, C, H, W).
            offset: (N, D * kh * kw * 2, H_out, W_out), as for ``omniops.deform_conv2d``; with it comes the mask.
            mask: (N, D * kh * kw, H_out, W_out).
        """
        return self._convolve(x, offset, mask)

    def _convolve(self, x: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        if offset is None and mask is None:
            predicted = self._predict(x)
            offsets = predicted.shape[1] // 3 * 2
            offset, mask = predicted[:, :offsets], predicted[:, offsets:].sigmoid()
        elif offset is None or mask is None:
            missing = "offset" if offset is None else "mask"
            raise TypeError(f"{missing} must be a torch.Tensor, got NoneType: give both offset and mask, or neither")
        return modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias,
            self.stride, self.padding, self.dilation, self.groups, self.offset_groups,
        )  # fmt: skip


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """``ModulatedDeformConv2d`` that always predicts its own offsets and masks: mmcv's ``ModulatedDeformConv2dPack``.

    Arguments are those of ``ModulatedDeformConv2d``. It is called with x alone, and a strict load asks for
    ``conv_offset``.

        >>> conv = omniops.ModulatedDeformConv2dPack(64, 128, kernel_size=3, padding=1)
        >>> conv(torch.randn(1, 64, 32, 32)).shape
        torch.Size([1, 128, 32, 32])
    """

    _state_dict_may_lack_conv_offset = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
        return self._convolve(x, None, None)


def _keep_missing_conv_offset(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(module.state_dict(prefix=prefix, keep_vars=True))


def _padding(padding: int | tuple[int, int] | str, stride: tuple[int, int]) -> tuple[int, int] | str:
    if not isinstance(padding, str):
        return _pair("padding", padding, least=0)
    if padding not in ("valid", "same"):
        raise ValueError(f"padding must be 'valid', 'same', an int or two, got {padding!r}")
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"stride must be 1 with padding='same', got {stride}")
    return padding


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    vertical, horizontal = _checks.pair(name, value)
    if min(vertical, horizontal) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return vertical, horizontal
