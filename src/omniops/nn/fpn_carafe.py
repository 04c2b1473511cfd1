"""Feature pyramids whose top-down path upsamples with CARAFE: MMDetection's parameters, torchvision's interface too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import script_if_tracing

from omniops.nn._torchscript import compiled_as
from omniops.nn.carafe import CARAFEPack
from omniops.ops import _checks
from omniops.ops._torchscript import is_tracing


class FPNCarafe(nn.Module):
    """Feature pyramid with CARAFE in its top-down path (MMDetection's ``FPN_CARAFE``; arXiv:1905.02188, section 4).

    1x1 convolutions bring every level to ``out_channels``; from the top down each is upsampled by a ``CARAFEPack``
    and added to the one below; 3x3 convolutions make the results. A state dict of MMDetection's neck loads strictly.

    It is called as MMDetection's neck, with a list or tuple of maps, finest first, or as torchvision's
    ``FeaturePyramidNetwork``, with a dict of them (``backbone.fpn = FPNCarafe(...)`` in torchvision's
    ``BackboneWithFPN``). Each level should have half the size of the one before, of odd sizes rounded either way: an
    upsampled map that is one pixel too large is cropped, as MMDetection does, and one of any other size, which
    MMDetection refuses or crops, is resized to the nearest pixels, as torchvision does.

    ``torch.jit.script`` compiles it with dicts alone, as torchvision's, also in torchvision's detectors;
    ``torch.jit.trace`` takes lists too.

    Where MMDetection takes the configurations ``norm_cfg`` and ``act_cfg`` this takes torchvision's callables; its
    other kinds of upsampling, and its ``order`` with the activation first, are not offered.

    Args:
        in_channels: the channels of each input map, finest first.
        out_channels: the channels of every result.
        num_outs: how many results: those beyond the levels used are of further levels, each half the size of the one
            before, made by convolutions of stride 2 and part of the top-down path. By default the levels used.
        start_level: the index of the first input that is used.
        end_level: the index of the last input that is used, -1 for the last of all.
        norm_layer: makes the normalisation after each convolution, given its channels (``nn.BatchNorm2d``); the
            convolutions then have no bias.
        activation_layer: makes the activation after each convolution (``nn.ReLU``).
        upsample_cfg: arguments for every ``CARAFEPack``, by name; MMDetection's ``type="carafe"`` may be among them.
        extra_blocks: torchvision's ``LastLevelMaxPool``, ``LastLevelP6P7`` or anything called as they are, with the
            results, the inputs and the results' names, which returns the longer lists of results and names.

    Raises:
        TypeError, ValueError: for an argument that no such pyramid can have.

    Example:
        >>> neck = omniops.nn.FPNCarafe([16, 32], 8, num_outs=3)
        >>> [level.shape[2:] for level in neck([torch.randn(1, 16, 8, 8), torch.randn(1, 32, 4, 4)])]
        [torch.Size([8, 8]), torch.Size([4, 4]), torch.Size([2, 2])]
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, but not those that are strings
        extra_blocks: Callable[..., tuple[list[Tensor], list[str]]] | None

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int | None = None,
        start_level: int = 0,
        end_level: int = -1,
        *,
        norm_layer: Callable[[int], nn.Module] | None = None,
        activation_layer: Callable[[], nn.Module] | None = None,
        upsample_cfg: Mapping[str, Any] | None = None,
        extra_blocks: Callable[..., tuple[list[Tensor], list[str]]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(in_channels, (list, tuple)):
            raise TypeError(f"in_channels must be a list or a tuple of ints, got {type(in_channels).__name__}")
        *in_channels, out_channels = _checks.integer(
            **{f"in_channels[{level}]": channels for level, channels in enumerate(in_channels)},
            out_channels=out_channels,
        )
        start_level, end_level = _checks.an_int(start_level=start_level, end_level=end_level)
        last = len(in_channels) - 1 if end_level == -1 else end_level
        if not 0 <= start_level <= last < len(in_channels):
            raise ValueError(
                f"start_level and end_level must be the first and the last of the {len(in_channels)} levels to use, "
                f"got {start_level} and {end_level}"
            )
        upsampling = dict(upsample_cfg or {})
        if (kind := upsampling.pop("type", "carafe")) != "carafe":
            raise ValueError(f"upsample_cfg must be CARAFE's, got type={kind!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.start_level = start_level
        self.end_level = end_level
        used = self.in_channels[start_level : last + 1]
        self._used = len(used)
        self.num_outs = _num_outs(self._used, num_outs)
        convolution = partial(_convolution, out_channels, norm_layer, activation_layer)
        extra = self.num_outs - self._used
        self.lateral_convs = nn.ModuleList(convolution(channels, 1) for channels in used)
        self.lateral_convs.extend(
            convolution(channels, 3, stride=2) for channels in (used[-1:] + [out_channels] * extra)[:extra]
        )
        self.fpn_convs = nn.ModuleList(convolution(out_channels, 3) for _ in self.lateral_convs)
        self.upsample_modules = nn.ModuleList(
            CARAFEPack(out_channels, 2, **upsampling) for _ in range(self.num_outs - 1)
        )
        self.extra_blocks = extra_blocks

    def _pyramid(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._top_down(inputs)

    def _top_down(self, inputs: list[Tensor]) -> list[Tensor]:
        laterals: list[Tensor] = []
        for level, lateral in enumerate(self.lateral_convs):
            # The first extra level is made from the last input, the others each from the one before.
            laterals.append(lateral(inputs[min(level, self._used - 1)] if level <= self._used else laterals[-1]))
        for level in range(len(laterals) - 1, 0, -1):
            # TorchScript takes no module out of a list but by going through it.
            for index, upsample in enumerate(self.upsample_modules):
                if index == level - 1:
                    laterals[index] = laterals[index] + _fit(upsample(laterals[level]), laterals[index])
        results: list[Tensor] = []
        for level, convolution in enumerate(self.fpn_convs):
            results.append(convolution(laterals[level]))
        return results

    def _forward_dict(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """``forward`` of a dict."""
        names, inputs = list(x.keys()), list(x.values())
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"x must have {len(self.in_channels)} maps, as in_channels has, got {len(inputs)}")
        last = self.start_level + self._used
        for level in range(self.start_level, last):
            if inputs[level].dim() != 4 or inputs[level].shape[1] != self.in_channels[level]:
                shape = f"(N, {self.in_channels[level]}, H, W)"
                raise ValueError(f"x['{names[level]}'] must have shape {shape}, got {inputs[level].shape}")
        results = self._pyramid(inputs[self.start_level : last])
        names = names[self.start_level : last]
        for level in range(self.num_outs - self._used):
            names.append(f"extra{level}")
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, inputs, names)
        named: dict[str, Tensor] = {}
        for index, name in enumerate(names):
            named[name] = results[index]
        return named

    @compiled_as(_forward_dict)
    def forward(self, x: Mapping[str, Tensor] | Sequence[Tensor]) -> OrderedDict[str, Tensor] | tuple[Tensor, ...]:
        """Maps (N, C_l, H_l, W_l), finest first -> maps (N, out_channels, H_l, W_l), and those of the extra levels.

        Args:
            x: a list or tuple of maps, as many as ``in_channels``, or a dict of them by name.

        Returns:
            A tuple; or, of a dict, an OrderedDict: the inputs' names for the levels used, ``"extra0"``, ``"extra1"``
            and so on for those that ``num_outs`` adds, and the names that ``extra_blocks`` gives to its own.

        Raises:
            TypeError, ValueError: for maps that are not those of ``in_channels``, named by their index or name.
        """
        if not isinstance(x, (Mapping, list, tuple)):
            raise TypeError(f"x must be a dict, a list or a tuple of tensors, got {type(x).__name__}")
        named = x if isinstance(x, Mapping) else {str(level): tensor for level, tensor in enumerate(x)}
        names, inputs = list(named), list(named.values())
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"x must have {len(self.in_channels)} maps, as in_channels has, got {len(inputs)}")
        used = slice(self.start_level, self.start_level + self._used)
        for name, tensor, channels in zip(names[used], inputs[used], self.in_channels[used], strict=True):
            called = f"x[{name!r}]" if isinstance(x, Mapping) else f"x[{name}]"
            _checks.tensor(**{called: tensor})
            _checks.four_dimensional(**{called: tensor})
            if not is_tracing() and tensor.shape[1] != channels:
                raise ValueError(f"{called} must have {channels} channels, got shape {tuple(tensor.shape)}")
        results = self._pyramid(inputs[used])
        names = [*names[used], *(f"extra{level}" for level in range(self.num_outs - self._used))]
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, inputs, names)
        return OrderedDict(zip(names, results, strict=True)) if isinstance(x, Mapping) else tuple(results)


class PAFPNCarafe(FPNCarafe):
    """Path aggregation pyramid with CARAFE in its top-down path (PANet, arXiv:1803.01534; MMDetection's ``PAFPN``).

    ``FPNCarafe`` with a bottom-up path: from the finest level up, each result is downsampled by a convolution of stride
    2 and added to the one above, then convolved once more. Parameters have the names of MMDetection's ``PAFPN``, and of
    ``FPNCarafe`` for ``upsample_modules``: a state dict of the former lacks those alone.

    Args:
        in_channels: the channels of each input map, finest first.
        out_channels: the channels of every result.
        num_outs: how many results: those beyond the levels used are every second pixel of the one before, as
            MMDetection's ``PAFPN`` makes them by default. By default the levels used.
        start_level: the index of the first input that is used.
        end_level: the index of the last input that is used, -1 for the last of all.
        norm_layer: makes the normalisation after each convolution, given its channels (``nn.BatchNorm2d``); the
            convolutions then have no bias.
        activation_layer: makes the activation after each convolution (``nn.ReLU``).
        upsample_cfg: arguments for every ``CARAFEPack``, by name; MMDetection's ``type="carafe"`` may be among them.
        extra_blocks: as for ``FPNCarafe``.

    Raises:
        TypeError, ValueError: for an argument that no such pyramid can have.

    Example:
        >>> neck = omniops.nn.PAFPNCarafe([16, 32], 8)
        >>> [level.shape[2:] for level in neck([torch.randn(1, 16, 8, 8), torch.randn(1, 32, 4, 4)])]
        [torch.Size([8, 8]), torch.Size([4, 4])]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int | None = None,
        start_level: int = 0,
        end_level: int = -1,
        *,
        norm_layer: Callable[[int], nn.Module] | None = None,
        activation_layer: Callable[[], nn.Module] | None = None,
        upsample_cfg: Mapping[str, Any] | None = None,
        extra_blocks: Callable[..., tuple[list[Tensor], list[str]]] | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, None, start_level, end_level, norm_layer=norm_layer,
            activation_layer=activation_layer, upsample_cfg=upsample_cfg, extra_blocks=extra_blocks,
        )  # fmt: skip
        self.num_outs = _num_outs(self._used, num_outs)
        channels = self.out_channels
        convolution = partial(_convolution, channels, norm_layer, activation_layer, channels, 3)
        self.downsample_convs = nn.ModuleList(convolution(stride=2) for _ in range(self._used - 1))
        self.pafpn_convs = nn.ModuleList(convolution() for _ in range(self._used - 1))

    def _pyramid(self, inputs: list[Tensor]) -> list[Tensor]:
        results = self._top_down(inputs)
        for level, downsample in enumerate(self.downsample_convs):
            results[level + 1] = results[level + 1] + _fit(downsample(results[level]), results[level + 1])
        for level, convolution in enumerate(self.pafpn_convs):
            results[level + 1] = convolution(results[level + 1])
        while len(results) < self.num_outs:
            results.append(F.max_pool2d(results[-1], 1, stride=2))
        return results


def _convolution(
    out_channels: int,
    norm_layer: Callable[[int], nn.Module] | None,
    activation_layer: Callable[[], nn.Module] | None,
    in_channels: int,
    kernel_size: int,
    stride: int = 1,
) -> nn.Sequential:
    """mmcv's ``ConvModule``, with its names and MMDetection's initialisation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=norm_layer is None)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm_layer is not None:
        norm = norm_layer(out_channels)
        layers[{nn.GroupNorm: "gn", nn.InstanceNorm2d: "in"}.get(type(norm), "bn")] = norm
    if activation_layer is not None:
        layers["activate"] = activation_layer()
    return nn.Sequential(layers)


def _num_outs(used: int, num_outs: int | None) -> int:
    if num_outs is None:
        return used
    (num_outs,) = _checks.integer(num_outs=num_outs)
    if num_outs < used:
        raise ValueError(f"num_outs must be at least the {used} levels used, got {num_outs}")
    return num_outs


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """Crop x to the size of ``like`` where it is at most a pixel larger, else resize it."""
    height, width = like.shape[-2:]
    if 0 <= x.shape[-2] - height <= 1 and 0 <= x.shape[-1] - width <= 1:
        return x[..., :height, :width]
    return F.interpolate(x, size=(height, width))


_fit: Callable[[Tensor, Tensor], Tensor] = script_if_tracing(_fitted)
"""A trace would keep what it does with the sizes that it sees."""
