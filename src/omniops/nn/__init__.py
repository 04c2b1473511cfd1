"""Modules."""

from omniops.nn.carafe import CARAFE, CARAFEDownsamplePack, CARAFENaive, CARAFEPack, CARAFEPacks
from omniops.nn.deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from omniops.nn.fpn_carafe import FPNCarafe, PAFPNCarafe
from omniops.nn.multi_scale_deform_attn import MultiScaleDeformableAttention
from omniops.nn.replace_upsampling import UpsamplingReport, replace_upsampling

__all__ = [
    "CARAFE",
    "CARAFEDownsamplePack",
    "CARAFENaive",
    "CARAFEPack",
    "CARAFEPacks",
    "DeformConv2d",
    "DeformConv2dPack",
    "FPNCarafe",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
    "PAFPNCarafe",
    "UpsamplingReport",
    "replace_upsampling",
]
