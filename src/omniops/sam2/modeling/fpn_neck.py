"""The image encoder: Hiera's stages joined by a feature pyramid (Lin et al., 2017, https://arxiv.org/abs/1612.03144)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from omniops.sam2.modeling.hiera import Hiera, HieraSize
from omniops.sam2.modeling.position_encoding import PositionEmbeddingSine


class FpnNeck(nn.Module):
    """Lateral 1x1 convolutions to d_model channels; only the two coarsest stages are joined.

    Args:
        d_model: channels of the results.
        backbone_channel_list: channels of the stages, from the coarsest to the finest.
    """

    def __init__(self, d_model: int, backbone_channel_list: Sequence[int]) -> None:
        super().__init__()
        self.position_encoding = PositionEmbeddingSine(d_model)
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, d_model, kernel_size=1)))
            for channels in backbone_channel_list
        )

    def forward(self, coarse: Tensor, coarsest: Tensor) -> Tensor:
        """The stages of strides 16 and 32, (N, C, H, W) and (N, 2C, H/2, W/2) -> (N, d_model, H, W)."""
        from_above = F.interpolate(self.convs[0](coarsest), scale_factor=2.0, mode="nearest")
        pixel_features: Tensor = self.convs[1](coarse) + from_above
        return pixel_features

    def project(self, level: int, stage: Tensor, then: nn.Conv2d) -> Tensor:
        """The lateral convolution of a stage and another 1x1 convolution after it, as one.

        The mask decoder takes 32 and 64 channels of the fine stages, whose maps of d_model channels are never made.
        """
        lateral: nn.Conv2d = self.convs[level].conv  # type: ignore[assignment]
        assert lateral.bias is not None
        assert then.bias is not None
        outer = then.weight.flatten(1)
        weight = outer @ lateral.weight.flatten(1)
        bias = outer @ lateral.bias + then.bias
        return F.conv2d(stage, weight[..., None, None], bias)


class ImageEncoder(nn.Module):
    """The trunk and its neck."""

    def __init__(self, size: HieraSize, d_model: int) -> None:
        super().__init__()
        self.trunk = Hiera(size)
        self.neck = FpnNeck(d_model, self.trunk.channel_list)
