"""Modules."""

from omniops.nn.carafe import CARAFE, CARAFENaive, CARAFEPack
from omniops.nn.deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)

__all__ = [
    "CARAFE",
    "CARAFENaive",
    "CARAFEPack",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
]
